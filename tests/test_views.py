"""Several views of each picture: what they are drawn from, and how they reach a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image_folder
from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image

import imgcls
from imgcls.config import all_problems
from imgcls.data import build_train_loader, build_view_loader
from imgcls.data.datasets import ArraySource, FolderSource
from imgcls.data.mapper import SampleError
from imgcls.data.random_stream import mix, seed_cpu
from imgcls.data.samplers import Draw
from imgcls.data.transforms import train_transform
from imgcls.data.views import View, ViewsMapper
from imgcls.structures import Views

CROP = [["random_resized_crop", 0.2, 0.6]]
LARGE_AND_SMALL = [[2, 16, CROP], [3, 8, [["random_resized_crop", 0.05, 0.2], ["horizontal_flip", 0.5]]]]


@pytest.fixture
def cfg() -> CfgNode:
    """Two large views and three small ones, four pictures a batch, five iterations."""
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 5),
            *("INPUT.VIEWS", LARGE_AND_SMALL, "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    return made


def noise(labels: Any = (0, 1, 0, 1, 0, 1, 0, 1, 0, 1), cls: type[ArraySource] = ArraySource) -> ArraySource:
    """Pictures of noise, 32 pixels: no two crops of them are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    return cls("noise", pixels, np.asarray(labels), ["a", "b"])


def batches(cfg: CfgNode, source: Any = None, **where: int) -> list[Views]:
    return list(build_view_loader(cfg, noise() if source is None else source, **where))


def same(one: Views, two: Views) -> bool:
    pairs = [*zip(one.images, two.images, strict=True), (one.targets, two.targets), (one.ids, two.ids)]
    return all(torch.equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------------------------------------------------- a view


def test_a_batch_of_views(cfg: CfgNode) -> None:
    first, *_ = found = batches(cfg)
    assert len(found) == 5 and all(isinstance(batch, Views) and len(batch) == 4 for batch in found)
    assert [tuple(images.shape) for images in first.images] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 3
    assert {images.dtype for images in first.images} == {torch.uint8}
    assert torch.equal(first.targets, first.ids % 2) and first.targets.dtype == torch.int64


def test_a_view_against_a_slow_reference(cfg: CfgNode) -> None:
    """View k of a picture: its transforms after the generators were set from (seed, epoch, index, 0, k)."""
    source = noise()
    mapper: Any = build_view_loader(cfg, source).dataset.mapper
    views = mapper(source[7], Draw(epoch=2, index=7))["views"]
    for number, (row, found) in enumerate(zip((0, 0, 1, 1, 1), views, strict=True)):
        _, side, rows = LARGE_AND_SMALL[row]
        seed_cpu(mix(3, 2, 7, 0, number))
        expected = train_transform(rows, side, "bilinear")(Image.fromarray(source.pixels[7]))
        assert torch.equal(found, expected)


def test_views_epochs_pictures_and_repeats_differ() -> None:
    transform = train_transform(CROP, 8, "bilinear")
    source = ArraySource("one", noise().pixels[:1].repeat(2, axis=0), np.zeros(2, np.int64), ["a"])
    mapper = ViewsMapper([View(8, transform)] * 3, seed=1)
    draws = [Draw(epoch, index, repeat) for epoch in range(2) for index in range(2) for repeat in range(2)]
    seen = [view.numpy().tobytes() for draw in draws for view in mapper(source[draw.index], draw)["views"]]
    assert len(set(seen)) == 3 * 8
    other = ViewsMapper([View(8, transform)] * 3, seed=2)(source[0], draws[0])["views"]
    assert other[0].numpy().tobytes() not in seen
    resize = ViewsMapper([View(8, train_transform([["resize"]], 8, "bilinear"))] * 3)  # the twin: nothing is drawn
    assert len({view.numpy().tobytes() for view in resize(source[0], draws[0])["views"]}) == 1


def test_a_view_is_the_same_whatever_the_others_are(cfg: CfgNode) -> None:
    five = batches(cfg)
    cfg.INPUT.VIEWS = [[1, 24, [["color_jitter", 0.5], ["resize"]]], [1, 16, CROP], [1, 12, [["resize"]]]]
    others = batches(cfg)
    for one, two in zip(five, others, strict=True):
        assert torch.equal(one.images[1], two.images[1])
        assert not torch.equal(one.images[0], two.images[0][..., :16, :16])


def test_a_policy_by_its_name(cfg: CfgNode) -> None:
    cfg.INPUT.VIEWS = [[1, 16, "randaugment"]]
    named = batches(cfg)
    cfg.INPUT.VIEWS = [[1, 16, [["policy", "randaugment"]]]]
    assert all(same(a, b) for a, b in zip(named, batches(cfg), strict=True))


# ----------------------------------------------------------------------------------------------------------- the stream


def test_workers_and_restarts_change_nothing(cfg: CfgNode) -> None:
    alone = batches(cfg)
    cfg.DATALOADER.NUM_WORKERS = 2
    torch.manual_seed(99)
    assert all(same(a, b) for a, b in zip(alone, batches(cfg), strict=True))
    cfg.DATALOADER.NUM_WORKERS = 0
    assert all(same(a, b) for a, b in zip(alone[2:], batches(cfg, start=2), strict=True))
    assert not same(alone[0], alone[1])  # the twin


def test_ranks_share_the_stream(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shares = batches(cfg), []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(cfg))
    for whole, *parts in zip(alone, *shares, strict=True):
        for number, images in enumerate(whole.images):
            assert torch.equal(torch.cat([part.images[number] for part in parts]), images)


def test_the_pictures_are_those_of_ordinary_training(cfg: CfgNode) -> None:
    cfg.DATALOADER.REPEATS = 2
    views = [batch.ids.tolist() for batch in batches(cfg)]
    cfg.INPUT.VIEWS = []
    assert views == [batch.ids.tolist() for batch in build_train_loader(cfg, noise())]


# ---------------------------------------------------------------------------------------------- labels, channels, files


class Unlabelled(ArraySource):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value for key, value in super().__getitem__(index).items() if key != "label"}


@pytest.mark.parametrize("source", [noise([-1] * 10), noise(cls=Unlabelled)], ids=["minus one", "absent"])
def test_pictures_without_labels(source: ArraySource, cfg: CfgNode) -> None:
    assert {label for batch in batches(cfg, source) for label in batch.targets.tolist()} == {-1}


def test_several_labels_and_one_channel(cfg: CfgNode) -> None:
    source = noise(np.eye(2, dtype=np.float32)[[0, 1] * 5])
    assert batches(cfg, source)[0].targets.shape == (4, 2)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0], [50.0]
    assert [images.shape[1] for images in batches(cfg)[0].images] == [1] * 5


def test_a_bad_file_is_replaced_or_named(cfg: CfgNode, tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "data", {"ant": 6, "bee": 4})
    good = batches(cfg, FolderSource(folder))
    (folder / "bee" / "001.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"bee/001\.png"):
        batches(cfg, FolderSource(folder))
    cfg.DATALOADER.ON_ERROR, cfg.DATALOADER.MAX_BAD_SHARE = "skip", 0.2
    found = batches(cfg, FolderSource(folder))
    ids = torch.cat([batch.ids for batch in found]), torch.cat([batch.ids for batch in good])
    assert 7 in ids[1] and 7 not in ids[0]
    unchanged = ids[1] != 7
    assert torch.equal(ids[0][unchanged], ids[1][unchanged])
    images = [torch.cat([batch.images[4] for batch in run]) for run in (found, good)]
    assert torch.equal(images[0][unchanged], images[1][unchanged])
    cfg.DATALOADER.NUM_WORKERS = 2
    assert all(same(a, b) for a, b in zip(found, batches(cfg, FolderSource(folder)), strict=True))


# ------------------------------------------------------------------------------------------------------------ the batch


def test_moving_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    views = Views([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 2, 2)], torch.tensor([0, -1]), torch.tensor([5, 6]))
    moved = views.to("meta")
    assert {image.device.type for image in moved.images} == {moved.targets.device.type} == {"meta"}
    assert moved.ids is views.ids and len(moved) == 2
    assert Views(views.images).to("meta").targets is None
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # where there is no GPU it fails
    pinned = views.pin_memory()
    assert [float(image.max()) for image in pinned.images] == [1, 2] and pinned.targets.tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[2, 16, "no_such"]], "there is no such policy: got 'no_such'; .*change INPUT.VIEWS"),
        ([[2, 16, CROP], [1, 8, [["resiz"]]]], "there is no such transform: got 'resiz'; .*resize.*change INPUT.VIEWS"),
        ([[1, 8, [["resize", 3]]]], "resize does not take these arguments .*change INPUT.VIEWS"),
    ],
)
def test_a_wrong_row_is_found_before_anything_is_built(rows: Any, message: str, cfg: CfgNode) -> None:
    cfg.INPUT.VIEWS = rows
    problems = "\n".join(str(problem) for problem in all_problems(cfg) if problem.key == "INPUT.VIEWS")
    with pytest.raises(ValueError, match=message) as told:
        build_view_loader(cfg, noise())
    assert str(told.value) == problems


@pytest.mark.parametrize("rows", [3, [[2, 16]], [[0, 16, CROP]], [[2, 16, 5]]], ids=str)
def test_what_is_no_row_is_said_once(rows: Any, cfg: CfgNode) -> None:
    cfg.INPUT.VIEWS = rows
    (problem,) = [problem for problem in all_problems(cfg) if problem.key == "INPUT.VIEWS"]
    assert problem.allowed.startswith("rows [count, side, transforms or policy]")


def test_right_rows_are_no_problem(cfg: CfgNode) -> None:
    assert [problem for problem in all_problems(cfg) if problem.key.startswith("INPUT")] == []
    cfg.MODEL.META_ARCHITECTURE, cfg.INPUT.VIEWS = "RetinaNet", 3  # whose configs do not read the key
    assert [problem for problem in all_problems(cfg) if problem.key == "INPUT.VIEWS"] == []


@pytest.mark.parametrize(
    ("build", "key", "value", "message"),
    [
        (build_view_loader, "INPUT.VIEWS", [], r"no views are asked for: got \[\]; .*change INPUT\.VIEWS"),
        (build_view_loader, "INPUT.TRAIN_SIZE_STEPS", [[1, 8]], r"sides of views.*\[\] with views; .*TRAIN_SIZE_STEPS"),
        (build_view_loader, "DATALOADER.PACKING", "dicts", "views come as tensors only: got 'dicts'; allowed: tensors"),
        (build_train_loader, "INPUT.TRAIN_SIZE", 16, "trains on one view of a picture.*change INPUT.VIEWS"),
    ],
)
def test_keys_that_would_not_act(build: Callable[..., Any], key: str, value: Any, message: str, cfg: CfgNode) -> None:
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build(cfg, noise())


def test_a_view_of_another_size_is_an_error() -> None:
    mapper = ViewsMapper([View(9, train_transform([["resize"]], 8, "bilinear"))])
    with pytest.raises(SampleError, match=r"gave \(8, 8\) pixels for sample 4; expected 9 x 9; change INPUT\.VIEWS"):
        mapper(noise()[4], Draw(0, 4))
