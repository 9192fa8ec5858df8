"""From a data set to batches: the same stream whatever the workers, the ranks and the restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image_folder
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.utils import comm

import imgcls
from imgcls.data import ClsMapper, build_test_loader, build_train_loader
from imgcls.data.datasets import ArraySource, FolderSource
from imgcls.data.mapper import SampleError
from imgcls.data.samplers import Draw
from imgcls.data.transforms import test_transform as evaluation_transform  # pytest would take the name for a test
from imgcls.structures import Batch

SIDE = 16


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    """Ten random pictures of 20 pixels in two classes."""
    return FolderSource(write_image_folder(tmp_path / "data", {"ant": 6, "bee": 4}, side=20))


@pytest.fixture
def cfg() -> CfgNode:
    """Four images a batch, ten iterations, crops and flips to 16 pixels, in the process itself."""
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 10),
            *("INPUT.TRAIN_SIZE", SIDE, "INPUT.TEST_SIZE", SIDE, "INPUT.TEST_RESIZE", SIDE),
            *("INPUT.TRAIN_TRANSFORMS", [["random_crop", 2], ["horizontal_flip", 0.5]]),
            *("DATALOADER.NUM_WORKERS", 0, "TEST.IMS_PER_BATCH", 4),
        ]
    )
    return made


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """``as_rank(1, 3)``: detectron2 now says that this is rank 1 of 3."""

    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world)

    return pretend


def train_batches(cfg: CfgNode, source: Any, start: int = 0) -> list[Any]:
    return list(build_train_loader(cfg, source, start=start))


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("images", "targets", "ids"))


# ------------------------------------------------------------------------------------------------------- the stream


def test_a_batch(cfg: CfgNode, folder: FolderSource) -> None:
    loader: Any = build_train_loader(cfg, folder)
    assert len(loader) == 10 and len(loader.dataset) == 10
    batch = next(iter(loader))
    assert isinstance(batch, Batch)
    assert isinstance(batch.images, torch.Tensor)
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, SIDE, SIDE), torch.uint8)
    assert batch.targets is not None and batch.targets.dtype == torch.int64
    assert batch.ids is not None
    assert batch.targets.tolist() == [0 if index < 6 else 1 for index in batch.ids.tolist()]


def test_the_stream_does_not_depend_on_workers_or_restarts(cfg: CfgNode, folder: FolderSource) -> None:
    """Pixels included; what else draws from the global generators in between does not matter either."""
    alone = train_batches(cfg, folder)
    assert len(alone) == 10
    cfg.DATALOADER.NUM_WORKERS = 2
    with_workers = train_batches(cfg, folder)
    assert all(same(a, b) for a, b in zip(alone, with_workers, strict=True))
    cfg.DATALOADER.NUM_WORKERS = 0
    torch.manual_seed(99)
    np.random.seed(99)
    for start in (1, 7):
        assert all(same(a, b) for a, b in zip(alone[start:], train_batches(cfg, folder, start), strict=True))


def test_the_comparison_would_notice(cfg: CfgNode, folder: FolderSource) -> None:
    """The twin: another seed, another start, another pixel."""
    one = train_batches(cfg, folder)
    assert not same(one[0], one[1])
    cfg.SEED = 4
    assert not same(one[0], train_batches(cfg, folder)[0])
    first = one[0].images.clone()
    first[0, 0, 0, 0] ^= 1
    assert not same(one[0], Batch(first, one[0].targets, one[0].ids))


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_share_the_same_stream(
    world: int, cfg: CfgNode, folder: FolderSource, as_rank: Callable[[int, int], None]
) -> None:
    alone = train_batches(cfg, folder)
    shares = []
    for rank in range(world):
        as_rank(rank, world)
        shares.append(train_batches(cfg, folder))
    for whole, *parts in zip(alone, *shares, strict=True):
        images = torch.cat([part.images for part in parts])
        assert torch.equal(images, whole.images)


def test_augmentation_differs_between_epochs_and_between_samples(cfg: CfgNode) -> None:
    """Three copies of one picture, for as many epochs: a draw that ignored the epoch or the sample would repeat."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    source = ArraySource("same", picture.repeat(3, axis=0), np.zeros(3, np.int64), ["only"])
    cfg.INPUT.TRAIN_TRANSFORMS = [["random_crop", 0]]
    cfg.SOLVER.IMS_PER_BATCH = 3
    epochs = train_batches(cfg, source)
    seen = {image.numpy().tobytes() for batch in epochs for image in batch.images}
    assert len(seen) == 30  # of 49 x 49 possible crops
    cfg.INPUT.TRAIN_TRANSFORMS = [["resize"]]  # the twin: nothing random, nothing differs
    assert len({image.numpy().tobytes() for batch in train_batches(cfg, source) for image in batch.images}) == 1


def test_both_outcomes_of_the_flip_are_seen(cfg: CfgNode) -> None:
    picture = np.arange(SIDE, dtype=np.uint8)[None, None, :].repeat(SIDE, axis=1)
    source = ArraySource("ramp", picture, np.zeros(1, np.int64), ["only"])
    cfg.INPUT.TRAIN_TRANSFORMS = [["horizontal_flip", 0.5]]
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.SOLVER.MAX_ITER = 60
    lefts = [int(batch.images[0][0, 0, 0]) for batch in train_batches(cfg, source)]
    assert set(lefts) == {0, SIDE - 1}
    assert 15 < lefts.count(0) < 45


# ----------------------------------------------------------------------------------------------------------- packings


def test_both_packings_carry_the_same(cfg: CfgNode, folder: FolderSource) -> None:
    tensors = train_batches(cfg, folder)
    cfg.DATALOADER.PACKING = "dicts"
    dicts = train_batches(cfg, folder)
    for batch, samples in zip(tensors, dicts, strict=True):
        assert {key for sample in samples for key in sample} == {"image", "label", "image_id"}
        assert torch.equal(torch.stack([sample["image"] for sample in samples]), batch.images)
        assert [sample["label"] for sample in samples] == batch.targets.tolist()
        assert [sample["image_id"] for sample in samples] == batch.ids.tolist()


class Weighted(ArraySource):
    """Labels that are weights over the classes, in numpy's double precision."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "label": np.array([0.25, 0.75])}


def test_weights_as_labels_come_in_the_precision_of_the_logits(cfg: CfgNode) -> None:
    source = Weighted("soft", np.zeros((4, SIDE, SIDE), np.uint8), np.zeros(4, np.int64), ["a", "b"])
    batch = train_batches(cfg, source)[0]
    torch.testing.assert_close(batch.targets, torch.tensor([[0.25, 0.75]] * 4), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="dtype"):  # what numpy's doubles would have met
        torch.testing.assert_close(batch.targets, torch.tensor([[0.25, 0.75]] * 4).double())
    cfg.DATALOADER.PACKING = "dicts"
    assert train_batches(cfg, source)[0][0]["label"].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 2, 3, 10, 21])
def test_every_sample_is_evaluated_once(
    number: int, world: int, cfg: CfgNode, as_rank: Callable[[int, int], None]
) -> None:
    source = ArraySource(
        "n", np.zeros((number, SIDE, SIDE), np.uint8), np.arange(number), list(map(str, range(number)))
    )
    seen: list[int] = []
    for rank in range(world):
        as_rank(rank, world)
        for batch in build_test_loader(cfg, source):
            assert isinstance(batch, Batch) and 1 <= len(batch) <= 4
            assert batch.ids is not None and batch.targets is not None and torch.equal(batch.ids, batch.targets)
            seen += batch.ids.tolist()
    assert seen == list(range(number))


def test_evaluation_can_be_repeated(cfg: CfgNode, folder: FolderSource) -> None:
    cfg.DATALOADER.NUM_WORKERS = 1
    loader: Any = build_test_loader(cfg, folder)
    first, second = list(loader), list(loader)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_an_empty_evaluation_set_is_refused(cfg: CfgNode) -> None:
    empty = ArraySource("nothing", np.zeros((0, 4, 4), np.uint8), np.zeros(0, np.int64), ["a"])
    with pytest.raises(ValueError, match=r"the evaluation set nothing is empty; change DATASETS\.TEST"):
        build_test_loader(cfg, empty)


# ------------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["tensors", "dicts"])
@pytest.mark.parametrize("build", [build_train_loader, build_test_loader])
def test_a_broken_image_is_one_error_that_names_the_file(
    build: Callable[..., Any], packing: str, workers: int, cfg: CfgNode, folder: FolderSource
) -> None:
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.PACKING = workers, packing
    broken = Path(folder.path(7))
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ValueError, match=rf"^cannot read the image {broken}: .*replace the file") as told:
        list(build(cfg, folder))
    assert "\n" not in str(told.value)  # no traceback of the worker in the message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_size_names_the_key(workers: int, cfg: CfgNode, folder: FolderSource) -> None:
    cfg.INPUT.TRAIN_TRANSFORMS = [["horizontal_flip", 0.5]]
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(
        ValueError, match=r"^the training transforms gave \(20, 20\) .*/\d+\.png; expected 16 x 16"
    ) as told:
        train_batches(cfg, folder)
    assert "change INPUT.TRAIN_TRANSFORMS" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_too_small_for_the_crop_is_named(workers: int, cfg: CfgNode, folder: FolderSource) -> None:
    cfg.INPUT.TRAIN_SIZE = 32
    cfg.INPUT.TRAIN_TRANSFORMS = [["random_crop", 0]]
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match=r"^the transforms cannot work on .*/\d+\.png: .*; change INPUT\.TRAIN_TRANS"):
        train_batches(cfg, folder)


def test_an_array_has_a_number_instead_of_a_file() -> None:
    mapper = ClsMapper(evaluation_transform(0, 8, "bilinear"), side=9)
    with pytest.raises(SampleError, match=r"gave \(8, 8\) pixels for sample 5; expected 9 x 9"):
        mapper({"image_id": 5, "label": 0, "pixels": np.zeros((4, 4), np.uint8)}, Draw(0, 5))


# ---------------------------------------------------------------------------------------------------------- detectron2


@pytest.fixture
def in_catalog(folder: FolderSource) -> Iterator[str]:
    DatasetCatalog.register("ten_pictures", lambda: folder)
    MetadataCatalog.get("ten_pictures").classes = list(folder.classes)
    yield "ten_pictures"
    DatasetCatalog.remove("ten_pictures")
    MetadataCatalog.remove("ten_pictures")


def test_stock_detectron2_reads_a_registered_folder(in_catalog: str, cfg: CfgNode, folder: FolderSource) -> None:
    """Its own mapper and its own loader, which know nothing of imgcls, on a Source."""
    mapper = DatasetMapper(is_train=True, augmentations=[T.Resize((12, 12))], image_format="RGB")
    loader = build_detection_train_loader(
        DatasetCatalog.get(in_catalog), mapper=mapper, total_batch_size=2, num_workers=0, aspect_ratio_grouping=False
    )
    samples = list(chain.from_iterable(islice(loader, 10)))
    assert {tuple(sample["image"].shape) for sample in samples} == {(3, 12, 12)}
    assert {sample["label"] for sample in samples} == {0, 1}
    assert all(sample["file_name"] == folder.path(sample["image_id"]) for sample in samples)
