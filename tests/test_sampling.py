"""Which samples come how often: repeated, weighted and balanced sampling, and progressive image size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from test_loops import losses, run_in_process, same, weights

import imgcls
from imgcls.data import build_train_loader
from imgcls.data.datasets import ArraySource
from imgcls.data.datasets.hold_out import HeldOutSource, HoldOut
from imgcls.data.random_stream import mix
from imgcls.data.samplers import (
    CounterBatchSampler,
    Draw,
    Order,
    SizeSteps,
    balanced_weights,
    repeated,
    shuffled,
    weighted,
)
from imgcls.modeling import ClsNet
from imgcls.structures import Batch

SIDE = 16


def draws(order: Order, size: int, batch: int, **where: int) -> list[Draw]:
    """One rank's draws of 20 iterations, one after another."""
    where = {"start": 0, "stop": 20, **where}
    return list(chain.from_iterable(CounterBatchSampler(size, global_batch=batch, seed=0, order=order, **where)))


def of_epoch(order: Order, epoch: int) -> list[tuple[int, int]]:
    indices, repeats = order(epoch)
    assert indices.dtype == torch.int64
    return list(zip(indices.tolist(), [0] * len(indices) if repeats is None else repeats.tolist(), strict=True))


# --------------------------------------------------------------------------------------------- repeated augmentation


@pytest.mark.parametrize(("size", "times"), [(12, 3), (13, 3), (14, 3), (10, 4), (3, 5), (1, 2), (7, 1)])
def test_repeats_against_a_slow_reference(size: int, times: int) -> None:
    """As the paper says it: shuffle, put each sample down ``times`` times, stop when the epoch is full."""
    for epoch in range(3):
        shuffle = torch.randperm(size, generator=torch.Generator().manual_seed(mix(5, epoch))).tolist()
        slow = [(index, repeat) for index in shuffle for repeat in range(times)][:size]
        assert of_epoch(repeated(shuffled(size, 5), times), epoch) == slow


def test_repeats_are_timms() -> None:
    """timm 1.0's RepeatAugSampler on one rank, its shuffle seeded as ours is."""
    sampler_module = pytest.importorskip("timm.data.distributed_sampler")
    theirs = sampler_module.RepeatAugSampler(range(512), num_replicas=1, rank=0, num_repeats=3)
    theirs.epoch = mix(5, 2)
    ours = repeated(shuffled(512, 5), 3)(2).indices.tolist()
    assert ours == list(theirs)[:512]


def test_repeats_show_other_samples_in_each_epoch_and_all_of_them_in_time() -> None:
    order = repeated(shuffled(30, 0), 3)
    shown = [set(order(epoch).indices.tolist()) for epoch in range(40)]
    assert {len(part) for part in shown} == {10}
    assert len({frozenset(part) for part in shown}) == 40
    assert set.union(*shown) == set(range(30))


def test_one_repeat_is_the_plain_shuffle() -> None:
    assert of_epoch(repeated(shuffled(9, 4), 1), 3) == of_epoch(shuffled(9, 4), 3)


# ------------------------------------------------------------------------------------------------- weighted sampling


def slowly_weighted(weights: list[float], seed: int, epoch: int) -> list[tuple[int, int]]:
    """Walk along the weights to each mark; count how often each sample came before."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    marks = torch.rand(len(weights), generator=generator, dtype=torch.float64).tolist()
    found: list[tuple[int, int]] = []
    for mark in marks:
        left, index = mark * sum(weights), 0
        while left >= weights[index]:
            left -= weights[index]
            index += 1
        found.append((index, sum(index == other for other, _ in found)))
    return found


@pytest.mark.parametrize("weights", [[1, 2, 4, 8, 1], [0, 1, 0, 0, 3, 0], [5], [2] * 40, [0, 0, 1]])
def test_weights_against_a_slow_reference(weights: list[float]) -> None:
    """Whole numbers, whose sums are exact in every order."""
    for epoch in range(4):
        assert of_epoch(weighted(np.array(weights, np.float64), 3), epoch) == slowly_weighted(weights, 3, epoch)


def test_weights_are_probabilities() -> None:
    """Pearson's chi-square of 30,000 draws; 11 degrees of freedom: above 31.3 in one case of a thousand."""
    weights = np.arange(12, dtype=np.float64)
    counts = np.zeros(12)
    order = weighted(np.tile(weights, 100), 8)  # 1,200 draws an epoch
    for epoch in range(25):
        counts += np.bincount(order(epoch).indices.numpy() % 12, minlength=12)
    expected = 30_000 * weights / weights.sum()

    def chi_square(expected: np.ndarray) -> float:
        return float(((counts - expected)[1:] ** 2 / expected[1:]).sum())

    assert counts[0] == 0
    assert chi_square(expected) < 31.3
    assert chi_square(np.full(12, 2500.0)) > 1000  # the twin: they are not uniform


def test_a_weight_of_nothing_is_never_drawn_not_even_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    order = weighted(np.array([0.0, 0.3, 0.0, 0.7, 0.0]), 0)
    extremes = torch.tensor([0.0, 0.3, np.nextafter(0.3, 0), np.nextafter(1, 0), 0.5], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: extremes)
    assert order(0).indices.tolist() == [1, 3, 1, 3, 3]


def test_epochs_and_seeds_draw_differently() -> None:
    weights = np.ones(50)
    epochs = {tuple(weighted(weights, seed)(epoch).indices.tolist()) for seed in range(3) for epoch in range(3)}
    assert len(epochs) == 9
    assert of_epoch(weighted(weights, 1), 2) == of_epoch(weighted(weights, 1), 2)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, np.nan], [1, np.inf]], ids=str)
def test_weights_that_cannot_be_sampled_by(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="sampling weights are finite numbers >= 0, not all of them 0"):
        weighted(np.array(weights, np.float64), 0)


@pytest.mark.parametrize(
    "order", [repeated(shuffled(25, 3), 3), weighted(np.arange(25.0), 3)], ids=["repeated", "weighted"]
)
def test_any_order_is_the_same_for_ranks_and_restarts(order: Order) -> None:
    alone = draws(order, 25, 12)
    assert {draw.epoch for draw in alone} == set(range(10))
    assert any(draw.repeat for draw in alone)
    for world in (1, 2, 3):
        share = 12 // world
        parts = [draws(order, 25, 12, rank=rank, world=world) for rank in range(world)]
        for step in range(20):
            together = chain.from_iterable(part[step * share : (step + 1) * share] for part in parts)
            assert list(together) == alone[step * 12 : (step + 1) * 12]
    for start in (1, 7, 19):
        assert draws(order, 25, 12, start=start) == alone[start * 12 :]
    keys = [draw[:3] for draw in alone]
    assert len(set(keys)) == len(keys)  # no two draws would be augmented alike


# ------------------------------------------------------------------------------------------------------- balanced


def test_balanced_weights_draw_every_class_equally_often() -> None:
    labels = np.array([0] * 1 + [2] * 10 + [3] * 89)  # class 1 has no samples
    weights = balanced_weights(labels)
    totals = [weights[labels == label].sum() for label in range(4)]
    np.testing.assert_allclose(totals, [1, 0, 1, 1])
    order = weighted(weights, 4)
    counts = Counter(chain.from_iterable(labels[order(epoch).indices.numpy()].tolist() for epoch in range(60)))
    assert set(counts) == {0, 2, 3}  # 6,000 draws, 2,000 each: a standard deviation is 37
    assert all(abs(counts[label] - 2000) < 4 * 37 for label in counts)


def test_with_several_labels_the_rarest_counts() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    slow = []
    for row in labels:  # one in as many as the class has; without a label, as the most frequent class's
        shares = [1 / labels[:, c].sum() for c in range(3) if row[c]]
        slow.append(max(shares, default=1 / 4))
    np.testing.assert_allclose(balanced_weights(labels), slow)
    assert slow == [1 / 4, 1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4]
    np.testing.assert_allclose(balanced_weights(np.zeros((3, 2), np.float32)), 1)  # no labels at all


# ------------------------------------------------------------------------------------------------- through the loader


@pytest.fixture
def cfg() -> CfgNode:
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 12),
            *("INPUT.TRAIN_SIZE", SIDE, "INPUT.TRAIN_TRANSFORMS", [["random_crop", 4]], "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    return made


class Noise(ArraySource):
    """Ten pictures of noise, 20 pixels: every crop of every one is another."""

    def __init__(self, labels: Any = (0,) * 7 + (1,) * 3, weights: Any = None) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 20, 3), dtype=np.uint8)
        super().__init__("noise", pixels, np.asarray(labels), ["a", "b"])
        self.weights = None if weights is None else np.asarray(weights, np.float64)


class Unknown(Noise):
    """Whose labels are known to the samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return 10


def test_repeats_of_a_picture_are_augmented_differently(cfg: CfgNode) -> None:
    plain = {}
    for batch in build_train_loader(cfg, Noise()):
        for place, image in zip(batch.ids.tolist(), batch.images, strict=True):
            plain.setdefault(place, []).append(image)
    cfg.DATALOADER.REPEATS = 2
    cfg.SOLVER.MAX_ITER = 5  # two epochs
    batches = list(build_train_loader(cfg, Noise()))
    ids = torch.cat([batch.ids for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(ids[0::2], ids[1::2]) and len(set(ids[:10].tolist())) == 5
    pairs = list(zip(ids[0:10:2].tolist(), images[0:10:2], images[1:10:2], strict=True))
    assert sum(not torch.equal(first, second) for _, first, second in pairs) >= 4  # of 81 crops
    # The first of them is the one that the picture gets without repeats.
    assert all(torch.equal(first, plain[place][0]) for place, first, _ in pairs)


@pytest.mark.parametrize(
    ("kind", "labels", "weights"),
    [("weighted", (0,) * 10, [0, 1, 0, 0, 0, 1, 0, 0, 0, 2]), ("balanced", (0,) * 9 + (1,), None)],
)
def test_sampling_reaches_the_loader(kind: str, labels: Any, weights: Any, cfg: CfgNode) -> None:
    source = Noise(labels, weights)
    cfg.SOLVER.MAX_ITER = 50  # 200 images
    plain = Counter(torch.cat([batch.ids for batch in build_train_loader(cfg, source)]).tolist())
    assert set(plain.values()) == {20}
    cfg.DATALOADER.SAMPLING = kind
    ids = torch.cat([batch.ids for batch in build_train_loader(cfg, source)]).tolist()
    assert 72 < ids.count(9) < 128  # half of 200, four standard deviations of 7 to each side
    assert set(ids) == ({1, 5, 9} if weights else set(range(10)))


@pytest.mark.parametrize(
    ("keys", "source", "message"),
    [
        ({"SAMPLING": "weighted"}, Noise(), "noise has no weights to sample by: got 'weighted'; .* shuffle, balanced"),
        ({"SAMPLING": "balanced"}, Unknown(), "known only when .* read: got 'balanced'; allowed: shuffle; .*SAMPLING"),
        ({"SAMPLING": "balanced"}, Noise([0] * 9 + [-1]), "noise has pictures without a label.*got 'balanced'"),
        ({"SAMPLING": "balanced", "SHUFFLE_BLOCK": 2}, Noise(), "whole set: got 2; allowed: 0; .*SHUFFLE_BLOCK"),
        ({"SHUFFLE_BLOCK": 2}, Noise(), "does not lie in shards: got 2; allowed: 0; .*SHUFFLE_BLOCK"),
        (
            {"SAMPLING": "balanced", "REPEATS": 3},
            Noise(),
            "every draw is one of the whole set: got 3; allowed: 1; .*REPEATS",
        ),
    ],
)
def test_sampling_that_the_set_does_not_allow(keys: Any, source: ArraySource, message: str, cfg: CfgNode) -> None:
    for name, value in keys.items():
        cfg.DATALOADER[name] = value
    with pytest.raises(ValueError, match=message):
        build_train_loader(cfg, source)


# ----------------------------------------------------------------------------------------------------- progressive size


def test_the_side_in_force_at_an_iteration() -> None:
    side_at = SizeSteps([(0, 96), (10, 128), (25, 160)])
    assert [side_at(i) for i in (0, 9, 10, 24, 25, 999)] == [96, 96, 128, 128, 160, 160]
    later = SizeSteps([(5, 64)])
    assert [later(i) for i in (0, 4, 5)] == [0, 0, 64]  # 0: the usual one
    assert SizeSteps()(7) == 0


def test_the_size_changes_at_the_exact_iteration(cfg: CfgNode) -> None:
    """Ten images at four a batch: an epoch ends within iteration 2, so epoch 1 begins, rounded up, at iteration 3."""
    cfg.INPUT.TRAIN_TRANSFORMS = [["random_resized_crop", 0.5, 1.0]]
    cfg.INPUT.TRAIN_SIZE_STEPS = [[1, 8], [2.5, 24]]
    sides = [tuple(batch.images.shape[1:]) for batch in build_train_loader(cfg, Noise())]
    assert sides == [(3, 16, 16)] * 3 + [(3, 8, 8)] * 4 + [(3, 24, 24)] * 5
    resumed = [tuple(batch.images.shape[1:]) for batch in build_train_loader(cfg, Noise(), start=5)]
    assert resumed == sides[5:]


def test_a_size_that_the_transforms_do_not_give_is_named(cfg: CfgNode) -> None:
    cfg.INPUT.TRAIN_SIZE_STEPS = [[0, 99]]
    with pytest.raises(ValueError, match=r"cannot work on sample \d.*change INPUT\.TRAIN_TRANSFORMS"):
        next(iter(build_train_loader(cfg, Noise())))


# ------------------------------------------------------------------------------------- training: loops, workers, resume

# 4,000 digits at 8 a batch: 0.004 epochs are two iterations.
GROWING = [[0.004, 48], [0.008, 40]]
TRANSFORMS = ("INPUT.TRAIN_TRANSFORMS", [["random_resized_crop", 0.3, 1.0], ["color_jitter"]])


@pytest.mark.parametrize("times", [1, 2])
def test_shards_are_mixed_a_few_at_a_time(times: int, cfg: CfgNode) -> None:
    """Ten pictures in shards of 4, 3 and 3, one at a time: the shards come whole, one after another."""
    source, shard_of = Noise(), [0] * 4 + [1] * 3 + [2] * 3
    source.runs = np.array([4, 3, 3])
    cfg.DATALOADER.SHUFFLE_BLOCK, cfg.DATALOADER.REPEATS = 1, times
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 10, 6
    orders = [batch.ids.tolist() for batch in build_train_loader(cfg, source)]
    for order in orders:
        shards = [shard_of[index] for index in order]
        assert sum(a != b for a, b in pairwise(shards)) == len(set(shards)) - 1
        assert len(set(order)) == 10 // times
    assert len({tuple(order) for order in orders}) == 6
    held = HeldOutSource(source, "train", HoldOut(0.4))
    assert held.runs is not None and len(held) == sum(held.runs) == 6
    assert [shard_of[index] for index in held._indices] == np.repeat([0, 1, 2], held.runs).tolist()


@pytest.fixture
def growing_cfg(classifier_cfg: Callable[..., CfgNode], tmp_path: Path) -> Callable[..., CfgNode]:
    """Six iterations at 32, 48 and 40 pixels, without evaluation; a checkpoint after three."""

    def make(folder: str, *overrides: object) -> CfgNode:
        keys = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "DATASETS.TEST", (), *TRANSFORMS)
        sizes = ("INPUT.TRAIN_SIZE_STEPS", GROWING, "OUTPUT_DIR", str(tmp_path / folder))
        return classifier_cfg("mobilenet_v1_0.25", *keys, *sizes, *overrides)

    return make


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sides of the batches that networks are given from now on."""
    seen: list[int] = []
    forward = ClsNet.forward

    def look(self: ClsNet, batch: Batch, *rest: Any, **more: Any) -> Any:
        seen.append(batch.images.shape[-1])  # type: ignore[union-attr]
        return forward(self, batch, *rest, **more)

    monkeypatch.setattr(ClsNet, "forward", look)
    return seen


def test_both_loops_train_through_growing_images_and_resume_exactly(
    growing_cfg: Callable[..., CfgNode], sides: list[int], tmp_path: Path
) -> None:
    run_in_process("plain", growing_cfg("plain"))
    assert sides == [32, 32, 48, 48, 40, 40]
    run_in_process("builtin", growing_cfg("builtin"))
    assert sides[6:] == sides[:6]
    straight = losses(tmp_path / "plain")
    assert sorted(straight) == list(range(6)) and losses(tmp_path / "builtin") == straight
    final = weights(tmp_path / "plain")
    (tmp_path / "plain" / "model_final.pth").unlink()
    run, _ = run_in_process("builtin", growing_cfg("plain"), resume=True)
    assert run.start_iter == 3 and sides[12:] == [48, 40, 40]
    assert losses(tmp_path / "plain") == straight
    assert same(weights(tmp_path / "plain"), final)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # of a machine with fewer cores
@pytest.mark.parametrize("sampling", [("DATALOADER.REPEATS", 3), ("DATALOADER.SAMPLING", "balanced")], ids=str)
def test_the_losses_do_not_depend_on_the_workers(
    sampling: tuple[Any, ...], growing_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    found = {}
    for workers in (0, 1, 4):
        run_in_process("plain", growing_cfg(str(workers), *sampling, "DATALOADER.NUM_WORKERS", workers))
        found[workers] = losses(tmp_path / str(workers))
    assert sorted(found[0]) == list(range(6)) and len(set(found[0].values())) == 6
    assert found[1] == found[0] and found[4] == found[0]  # bit for bit
    run_in_process("plain", growing_cfg("other", *sampling, "SEED", 99))
    assert losses(tmp_path / "other") != found[0]  # the twin
