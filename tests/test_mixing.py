"""Mixup and CutMix: what is drawn, what becomes of pictures and labels, and that both loops do the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from scipy import stats
from torchvision.transforms import v2

from imgcls.data import Mixing
from imgcls.engine import ClsTrainer, Run, TrainStep, train
from imgcls.engine.output.output_dir import release
from imgcls.engine.setup import setup
from imgcls.solver import build_optimizer, build_schedule
from imgcls.structures import Batch

CLASSES = 4


def a_batch(count: int = 6, side: int = 16) -> Batch:
    """Picture i is full of the value 10 (i + 1), of class i % 4."""
    images = (10 * torch.arange(1, count + 1, dtype=torch.uint8))[:, None, None, None].expand(-1, 3, side, side)
    return Batch(images.contiguous(), torch.arange(count) % CLASSES, torch.arange(count))


def mixed(mixing: Mixing, batch: Batch, seed: int) -> Any:
    torch.manual_seed(seed)
    return mixing(batch)


def one_hot(targets: torch.Tensor) -> torch.Tensor:
    return torch.eye(CLASSES)[targets]


def kept(batch: Batch, result: Batch) -> float:
    """The share of the first picture that stayed, from the labels."""
    assert batch.targets is not None and result.targets is not None
    return float(result.targets[0, batch.targets[0]])


# -- one at a time -----------------------------------------------------------------------------------------------------


def test_mixup_by_hand() -> None:
    """Each picture with the one half a batch away: x = l a + (1 - l) b, pixels and labels with the same l."""
    batch, mixing = a_batch(), Mixing(0.5, 0.0, num_classes=CLASSES)
    shares = set()
    for seed in range(10):
        result = mixed(mixing, batch, seed)
        share = kept(batch, result)
        for i in range(6):
            j = (i + 3) % 6
            value = share * 10 * (i + 1) + (1 - share) * 10 * (j + 1)
            torch.testing.assert_close(result.images[i], torch.full((3, 16, 16), value), rtol=0, atol=1e-4)
        expected = share * one_hot(batch.targets) + (1 - share) * one_hot(batch.targets.roll(3))
        torch.testing.assert_close(result.targets, expected)
        shares.add(share)
    assert len(shares) == 10
    assert result.images.dtype == result.targets.dtype == torch.float32
    assert torch.equal(result.ids, batch.ids)


@pytest.mark.parametrize("side", [16, 7])
def test_the_area_of_the_box_is_the_weight_of_the_label(side: int) -> None:
    """Exactly, pixel for pixel: also where the border cuts the box off."""
    batch, mixing = a_batch(side=side), Mixing(0.0, 1.0, num_classes=CLASSES)
    areas = set()
    for seed in range(60):
        result = mixed(mixing, batch, seed)
        for i in range(6):
            j = (i + 3) % 6
            foreign = result.images[i, 0] == 10 * (j + 1)
            assert torch.equal(result.images[i, 0] == 10 * (i + 1), ~foreign)
            rows, columns = torch.where(foreign)
            if len(rows):  # a rectangle
                assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            weight = foreign.sum().item() / side**2
            expected = (1 - weight) * one_hot(batch.targets)[i] + weight * one_hot(batch.targets)[j]
            torch.testing.assert_close(result.targets[i], expected, rtol=0, atol=1e-6)
        areas.add(weight)
    assert len(areas) > 8


@pytest.mark.parametrize(("alphas", "theirs"), [((0.4, 0.0), v2.MixUp), ((0.0, 1.0), v2.CutMix)])
def test_pairs_are_what_torchvision_makes_of_them(alphas: tuple[float, float], theirs: Any) -> None:
    """Of two pictures each is the other's partner, in torchvision's order as in ours."""
    batch = Batch(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.tensor([1, 3]))
    for seed in range(8):
        result = mixed(Mixing(*alphas, num_classes=CLASSES), batch, seed)
        torch.manual_seed(seed)
        torch.rand(())  # of INPUT.MIX_PROB
        images, targets = theirs(alpha=max(alphas), num_classes=CLASSES)(batch.images.float(), batch.targets)
        torch.testing.assert_close(result.images, images)
        torch.testing.assert_close(result.targets, targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_share_comes_from_the_beta_distribution(alpha: float) -> None:
    """Kolmogorov-Smirnov against scipy's Beta; the twin: not from that of another alpha."""
    mixing, batch = Mixing(alpha, 0.0, num_classes=CLASSES), a_batch(2, 1)
    shares = [kept(batch, mixed(mixing, batch, seed)) for seed in range(1500)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.kstest(shares, stats.beta(alpha + 1, alpha + 1).cdf).pvalue < 1e-6


def test_a_batch_of_one_is_mixed_with_itself() -> None:
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        result = mixed(Mixing(*alphas, num_classes=CLASSES), a_batch(1), 0)
        torch.testing.assert_close(result.images, a_batch(1).images.float())
        torch.testing.assert_close(result.targets, one_hot(torch.tensor([0])))


def test_copies_in_a_row_meet_other_pictures() -> None:
    """Repeated augmentation puts three copies of a picture next to each other; none is mixed with its copy."""
    batch = Batch(torch.zeros(12, 3, 4, 4), torch.arange(12) // 3)
    targets = mixed(Mixing(1.0, 0.0, num_classes=CLASSES), batch, 0).targets
    assert ((targets > 0).sum(1) == 2).all()


# -- both, or neither --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("switch", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_the_share_of_cutmix(switch: float, low: int, high: int) -> None:
    mixing = Mixing(1.0, 1.0, cutmix_share=switch, num_classes=CLASSES)
    values = torch.tensor([10.0, 20.0])
    cut = 0
    for seed in range(200):
        result = mixed(mixing, a_batch(2), seed)
        cut += bool(torch.isin(result.images, values).all())
    assert low <= cut <= high


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_the_probability_of_mixing(probability: float, low: int, high: int) -> None:
    mixing, batch = Mixing(1.0, 0.0, probability=probability, num_classes=CLASSES), a_batch(2)
    results = [mixed(mixing, batch, seed) for seed in range(200)]
    assert {(result.images.dtype, result.targets.dtype) for result in results} == {(torch.float32, torch.float32)}
    untouched = sum(torch.equal(result.images, batch.images.float()) for result in results)
    assert low <= 200 - untouched <= high
    assert all(torch.equal(r.targets, one_hot(batch.targets)) for r in results if kept(batch, r) == 1)


# -- forms of batches --------------------------------------------------------------------------------------------------


def test_several_labels_are_weighted_as_single_ones_are() -> None:
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]])
    batch = Batch(a_batch(2).images, labels)
    result = mixed(Mixing(1.0, 0.0), batch, 3)
    share = float(result.targets[0, 0])
    assert 0.01 < share < 0.99
    torch.testing.assert_close(result.targets, share * labels + (1 - share) * labels.flip(0))


def test_the_memory_format_stays_and_the_batch_too() -> None:
    batch = a_batch()
    images = batch.images.to(memory_format=torch.channels_last)
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        before = images.clone()
        result = mixed(Mixing(*alphas, num_classes=CLASSES), Batch(images, batch.targets), 1)
        assert result.images.is_contiguous(memory_format=torch.channels_last)
        floats = images.float()
        again = mixed(Mixing(*alphas, num_classes=CLASSES), Batch(floats, batch.targets), 1)
        assert torch.equal(result.images, again.images) and torch.equal(floats, before.float())
        assert torch.equal(images, before)


def test_a_list_of_dicts_comes_back_mixed_alike() -> None:
    batch = a_batch()
    dicts = [{"image": image, "label": int(batch.targets[i]), "image_id": i} for i, image in enumerate(batch.images)]
    mixing = Mixing(1.0, 1.0, num_classes=CLASSES)
    for seed in range(6):
        whole, parts = mixed(mixing, batch, seed), mixed(mixing, dicts, seed)  # type: ignore[arg-type]
        assert torch.equal(torch.stack([part["image"] for part in parts]), whole.images)
        assert torch.equal(torch.stack([part["label"] for part in parts]), whole.targets)
        assert [part["image_id"] for part in parts] == list(range(6))
    assert isinstance(dicts[0]["label"], int)


def test_what_cannot_be_mixed() -> None:
    mixing, batch = Mixing(1.0, 0.0, num_classes=CLASSES), a_batch(2)
    sizes = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]
    with pytest.raises(ValueError, match=r"mixing needs pictures of one size; change INPUT.TRAIN_TRANSFORMS"):
        mixing(Batch(sizes, batch.targets))
    with pytest.raises(ValueError, match="mixing needs pictures of one size"):
        mixing([{"image": image, "label": 0} for image in sizes])
    with pytest.raises(ValueError, match=r"mixing needs labels; set INPUT.MIXUP_ALPHA and INPUT.CUTMIX_ALPHA to 0"):
        mixing(Batch(batch.images))


# -- in the training step ----------------------------------------------------------------------------------------------


def a_step(classifier_cfg: Any, *overrides: object) -> tuple[TrainStep, list[Any]]:
    """A step, and the list into which it puts what the network is given."""
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", CLASSES, "SEED", 5, *overrides)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    given: list[Any] = []
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    optimizer = build_optimizer(cfg, model)
    return TrainStep.from_cfg(cfg, model, optimizer, build_schedule(cfg, optimizer)), given


def test_off_the_network_gets_the_very_batch(classifier_cfg: Any) -> None:
    batch = a_batch(8, 32)
    for overrides in ((), ("INPUT.MIXUP_ALPHA", 1.0, "INPUT.CUTMIX_ALPHA", 1.0, "INPUT.MIX_PROB", 0.0)):
        step, given = a_step(classifier_cfg, *overrides)
        assert step.mixing is None
        step(batch, 0)
        assert given[0][0] is batch


def test_what_is_mixed_is_a_function_of_seed_and_iteration(classifier_cfg: Any) -> None:
    batch = a_batch(8, 32)
    on = ("INPUT.MIXUP_ALPHA", 0.8, "INPUT.CUTMIX_ALPHA", 1.0, "MODEL.HEAD.DROPOUT", 0.2, "SOLVER.BASE_LR", 0.0)
    step, given = a_step(classifier_cfg, *on)
    losses = [step(batch, iteration)["loss_cls"] for iteration in (0, 1, 2, 1)]
    images = [mixed.images for (mixed,) in given]
    assert torch.equal(images[1], images[3]) and losses[1] == losses[3]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    assert all(mixed.targets.shape == (8, CLASSES) for (mixed,) in given)
    dicts = [{"image": image, "label": int(batch.targets[i])} for i, image in enumerate(batch.images)]
    assert step(dicts, 1)["loss_cls"] == losses[1]


def test_a_batch_of_nearly_black_pictures_is_no_mistake(classifier_cfg: Any) -> None:
    """Mixed, it is floats near 0: from a caller that would be a batch scaled to 0..1."""
    step, given = a_step(classifier_cfg, "INPUT.MIXUP_ALPHA", 1.0)
    dark = Batch(torch.randint(0, 8, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % CLASSES)
    assert torch.isfinite(step(dark, 0)["loss_cls"]) and given[0][0].images.is_floating_point()
    with pytest.raises(ValueError, match=r"expected RGB values in 0\.\.255"):
        step.model(given[0][0].images, given[0][0].targets)


def test_both_loops_and_a_resumed_run_agree(classifier_cfg: Any, tmp_path: Path) -> None:
    on = ("INPUT.MIXUP_ALPHA", 0.8, "INPUT.CUTMIX_ALPHA", 1.0)

    def trained(folder: str, loop: str, *overrides: object, resume: bool = False) -> list[torch.Tensor]:
        short = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0)
        cfg = classifier_cfg("mobilenet_v1_0.25", *short, *overrides, "OUTPUT_DIR", str(tmp_path / folder))
        cfg, data = setup(cfg, resume=resume)
        try:
            if loop == "builtin":
                trainer = ClsTrainer(cfg, data)
                trainer.resume_or_load(resume=resume)
                run = trainer.run
                trainer.train()
            else:
                run = Run(cfg, data)
                run.start(resume=resume)
                train(run)
        finally:
            release(cfg.OUTPUT_DIR)
        assert run.start_iter == (2 if resume else 0)
        return list(run.model.state_dict().values())

    def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    whole = trained("run", "plain", *on)
    assert same(whole, trained("other", "builtin", *on))
    for final in (tmp_path / "run").glob("model_final*"):
        final.unlink()
    assert same(whole, trained("run", "builtin", *on, resume=True))
    assert not same(whole, trained("off", "plain"))
