"""Gradient accumulation: the update of the whole batch, from micro-batches."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from test_loops import run_in_process, same

from imgcls.engine import TrainStep
from imgcls.engine.step import seed_iteration
from imgcls.solver import build_optimizer, build_schedule
from imgcls.structures import Batch


@pytest.fixture
def make_step(classifier_cfg):
    def make(*overrides, norm="GN"):
        # BatchNorm looks at the micro-batch; with another norm the sum of gradients is that of the whole batch.
        cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", 4, "MODEL.BACKBONE.NORM", norm, *overrides)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        return TrainStep.from_cfg(cfg, model, optimizer, build_schedule(cfg, optimizer))

    return make


def a_batch(count=7):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 4, torch.arange(count))


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("packing", ["tensors", "dicts"])
def test_the_update_is_that_of_the_whole_batch(parts, packing, make_step):
    """Also where the parts are not equal: 7 pictures are 4 + 3, or 3 + 3 + 1."""
    whole, cut = make_step(), make_step("SOLVER.ACCUMULATE", parts)
    batch = a_batch()
    if packing == "dicts":
        batch = [
            {"image": i, "label": int(t), "image_id": n}
            for n, (i, t) in enumerate(zip(batch.images, batch.targets, strict=False))
        ]
    for step in (whole, cut):
        step.model.double()
    losses = [step(batch, 0)["loss_cls"] for step in (whole, cut)]
    assert losses[0] == pytest.approx(float(losses[1]), rel=1e-9)
    moved = False
    nets = (cut.model, whole.model, make_step().model)
    for ours, theirs, start in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
        moved |= not torch.equal(ours.float(), start)
    assert moved


def test_the_parts_see_pictures_of_their_own_and_draw_differently(make_step):
    seen = []
    step = make_step("SOLVER.ACCUMULATE", 2, "MODEL.HEAD.DROPOUT", 0.5)
    step.model.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].ids.tolist(), torch.initial_seed()))
    )
    step(a_batch(), 3)
    step(a_batch(), 4)
    assert [ids for ids, _ in seen] == [[0, 1, 2, 3], [4, 5, 6]] * 2
    assert len({seed for _, seed in seen}) == 4


def test_one_part_is_one_backward_pass_to_the_bit(make_step):
    step, by_hand = (make_step("SOLVER.ACCUMULATE", 1, "MODEL.HEAD.DROPOUT", 0.5, norm="BN") for _ in range(2))
    losses = step.gradients(a_batch(), 3)
    seed_iteration(by_hand.seed, 3)
    expected = by_hand.model(a_batch())
    sum(expected.values()).backward()
    assert losses == expected
    for ours, theirs in zip(step.parameters, by_hand.parameters, strict=True):
        assert torch.equal(ours.grad, theirs.grad) and ours.grad.any()


def test_a_run_with_parts_resumes_exactly(classifier_cfg, tmp_path):
    words = ("SOLVER.ACCUMULATE", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", ())
    words += ("MODEL.HEAD.DROPOUT", 0.3, "INPUT.MIXUP_ALPHA", 0.5)
    whole, _ = run_in_process("plain", classifier_cfg("mobilenet_v1_0.25", *words))
    for path in (tmp_path / "run").glob("model_final*"):
        path.unlink()
    again, _ = run_in_process("builtin", classifier_cfg("mobilenet_v1_0.25", *words), resume=True)
    assert again.start_iter == 2 and same(again.model.state_dict(), whole.model.state_dict())
