"""torch.compile over the network: same names, same numbers, no end of forms, and a clear word where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_model
from test_loops import run_in_process, same

from imgcls.engine import Run, finalize
from imgcls.engine.machine import compiling
from imgcls.engine.machine.compiling import compile_network
from imgcls.engine.replay import replay
from imgcls.structures import Batch

ON = ("MODEL.COMPILE", "aot_eager", "DATALOADER.NUM_WORKERS", 0, "TEST.IMS_PER_BATCH", 500)


# torch looks at it while it traces, and hides its own warning from those for whom a warning is none but a line.
pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def counters():
    from torch._dynamo.utils import counters

    return counters


def batch(side, count=4):
    generator = torch.Generator().manual_seed(side)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 4, torch.arange(count))


def pair(classifier_cfg, *overrides):
    """Two networks with the same weights in float64, the second compiled."""
    torch.manual_seed(0)
    cfg = classifier_cfg("classic_cnn_8", "MODEL.HEAD.NUM_CLASSES", 4, "MODEL.HEAD.DROPOUT", 0.0, *ON, *overrides)
    plain = build_model(cfg).double()
    compiled = copy.deepcopy(plain)
    compile_network(cfg, compiled)
    return plain, compiled


def test_a_compiled_network_computes_the_same_under_the_same_names(classifier_cfg, counters):
    plain, compiled = pair(classifier_cfg)
    counters.clear()
    losses = []
    for net in (plain, compiled):
        torch.manual_seed(0)  # the trunk has dropout
        losses.append(net.train()(batch(32))["loss_cls"])
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(batch(32).images), plain.eval()(batch(32).images))
    # A copy, as an average is one, is not tied to the compiled network.
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(batch(32).images), compiled(batch(32).images))


def test_sizes_that_change_are_compiled_once_more_and_no_further(classifier_cfg, counters):
    plain, compiled = pair(classifier_cfg)
    plain.eval(), compiled.eval()
    counters.clear()
    seen = []
    with torch.no_grad():
        for side, count in ((32, 4), (40, 4), (48, 3), (56, 2)):
            torch.testing.assert_close(compiled(batch(side, count).images), plain(batch(side, count).images))
            seen.append(counters["stats"]["unique_graphs"])
        images = [{"image": batch(side).images[0]} for side in (32, 64, 40)]
        for ours, theirs in zip(compiled(images), plain(images), strict=True):
            torch.testing.assert_close(ours["logits"], theirs["logits"])
    # One for each of trunk and head at first, and so for another side, and for another number of images.
    assert seen[0] == 2 and seen[-1] == seen[-2] <= 6


def test_runs_are_repeated_resumed_and_continued_by_the_other_loop(classifier_cfg, tmp_path):
    def run(loop, name, *overrides, resume=False):
        folder = str(tmp_path / name)
        words = (*ON, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.EMA.ENABLED", True, "OUTPUT_DIR", folder, *overrides)
        words = (*words, "DATASETS.TEST", ())
        done, _ = run_in_process(loop, classifier_cfg("mobilenet_v1_0.25", *words), resume=resume)
        assert done.network is not done.model
        assert all(each.backbone._compiled_call_impl is not None for each in done.networks)
        return {**done.model.state_dict(), **{f"ema.{k}": v for k, v in done.network.state_dict().items()}}

    straight = run("plain", "first")
    (tmp_path / "first" / "model_final.pth").unlink()
    assert same(run("builtin", "first", resume=True), straight)


def test_a_step_is_taken_again_without_the_compiler(classifier_cfg):
    """What --replay finds hangs on hooks, which the compiled network would not stop for."""
    cfg = classifier_cfg("mobilenet_v1_0.25", *ON, "SOLVER.BASE_LR", 1e30, "SOLVER.MAX_ITER", 50)
    with pytest.raises(ValueError, match=r"not finite at iteration"):
        run_in_process("plain", cfg)
    from pathlib import Path

    (kept,) = Path(cfg.OUTPUT_DIR).glob("replay_*.pth")
    found = replay(Run(*finalize(cfg)), kept)
    assert found["outputs"] and found["outputs"][0].startswith("backbone.")


def test_what_is_missing_is_said_before_training(classifier_cfg, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("\nno C++ toolchain\nmore about it")

    monkeypatch.setattr(compiling.torch, "compile", fails)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.COMPILE", "default")
    with pytest.raises(
        ValueError, match=r"\(no C\+\+ toolchain\).*install g\+\+: got 'default'.*'' \(not.*MODEL.COMPILE"
    ):
        Run(*finalize(cfg))


def test_without_the_key_nothing_is_compiled(classifier_cfg):
    plain = build_model(classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", 4))
    compile_network(classifier_cfg(), plain)
    assert plain.backbone._compiled_call_impl is None and not plain._forward_pre_hooks
