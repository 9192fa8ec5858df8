"""Several views of each picture for self-supervision: two alike (SimCLR, MoCo) or large and small ones (SwAV, DINO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode

from imgcls.config import register_check
from imgcls.config.checks import CLASSIFIER
from imgcls.data.datasets.source import Source
from imgcls.data.guarded_loader import Loader
from imgcls.data.loaders import make_loader, on_bad_in_training, train_sampler
from imgcls.data.mapper import (
    Mapped,
    MappedDataset,
    Packed,
    Transform,
    label_of,
    name_of,
    pack,
    read_sample,
    transformed,
)
from imgcls.data.random_stream import mix, seed_cpu
from imgcls.data.reading import MAX_PIXELS
from imgcls.data.samplers import Draw
from imgcls.data.transforms import train_transform, transform_problems
from imgcls.structures import Problem, Views

KEY = "INPUT.VIEWS"
UNLABELLED = -1


class View(NamedTuple):
    """One way to look at a picture: ``transform`` makes (C, side, side) uint8 of it; side in pixels."""

    side: int
    transform: Transform


class ViewsMapper:
    """Makes ``{"views": [(C, S, S) uint8, ...], "label", "image_id"}`` of a sample; label -1 where it has none.

    The picture is read once. View k draws from (seed, epoch, index, repeat, k): the same whatever the others are.
    """

    def __init__(
        self, views: Sequence[View], *, seed: int = 0, channels: int = 3, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.views, self.seed, self.channels, self.max_pixels = list(views), seed, channels, max_pixels

    def __call__(self, sample: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """Raises what :class:`~imgcls.data.mapper.ClsMapper` raises."""
        index, images = sample["image_id"], []
        picture = read_sample(sample, self.max_pixels)
        if self.channels == 1:
            picture = picture.convert("L")
        for number, (side, transform) in enumerate(self.views):
            seed_cpu(mix(self.seed, draw.epoch, index, draw.repeat, number))
            images.append(transformed(picture, transform, side, name_of(sample), (KEY, KEY)))
        return {"views": images, "label": label_of(sample.get("label", UNLABELLED)), "image_id": index}


def build_view_loader(cfg: CfgNode, source: Source, *, start: int = 0) -> Loader:
    """:class:`~imgcls.structures.Views` of iterations ``start`` .. MAX_ITER - 1 for this rank.

    The pictures of an iteration are those that :func:`~imgcls.data.loaders.build_train_loader` would give.
    """
    _require_views_alone(cfg)
    mapper = ViewsMapper(
        _views(cfg), seed=cfg.SEED, channels=len(cfg.MODEL.PIXEL_MEAN), max_pixels=cfg.INPUT.MAX_PIXELS
    )
    dataset = MappedDataset(source, mapper, on_bad_in_training(cfg))
    return make_loader(cfg, dataset, train_sampler(cfg, source, start), collate=collate_views)


def _require_views_alone(cfg: CfgNode) -> None:
    """Keys that would not act on views are not passed over in silence."""
    if not cfg.INPUT.VIEWS:
        raise Problem("no views are asked for", cfg.INPUT.VIEWS, "rows [count, side, transforms]", KEY).error()
    if cfg.INPUT.TRAIN_SIZE_STEPS:
        what, steps = f"the sides of views stand in {KEY}", cfg.INPUT.TRAIN_SIZE_STEPS
        raise Problem(what, steps, "[] with views", "INPUT.TRAIN_SIZE_STEPS").error()
    if cfg.DATALOADER.PACKING != "tensors":
        what, packing = "views come as tensors only", cfg.DATALOADER.PACKING
        raise Problem(what, packing, "tensors", "DATALOADER.PACKING").error()


def _views(cfg: CfgNode) -> list[View]:
    """The views of ``INPUT.VIEWS``, each row's as often as it says."""
    views = []
    for count, side, transforms in cfg.INPUT.VIEWS:
        views += [View(side, train_transform(_rows(transforms), side, cfg.INPUT.INTERPOLATION, KEY))] * count
    return views


def _rows(transforms: str | Sequence[Any]) -> Sequence[Any]:
    return [["policy", transforms]] if isinstance(transforms, str) else transforms


@register_check
def check_views(cfg: CfgNode) -> list[Problem]:
    """Every transform of ``INPUT.VIEWS``, before anything is built."""
    rows, interpolation = cfg.INPUT.VIEWS, cfg.INPUT.INTERPOLATION
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet":
        return []
    if not (CLASSIFIER[KEY].holds(rows) and CLASSIFIER["INPUT.INTERPOLATION"].holds(interpolation)):
        return []  # said by the check of single keys
    return [
        problem
        for _, side, transforms in rows
        for problem in transform_problems(_rows(transforms), side, interpolation, KEY)
    ]


def collate_views(mapped: Sequence[Mapped]) -> Packed:
    """One :class:`Views`, stacked in the worker."""
    return pack(mapped, _stack)


def _stack(samples: Sequence[dict[str, Any]]) -> Views:
    return Views(
        images=[torch.stack(images) for images in zip(*(sample["views"] for sample in samples), strict=True)],
        targets=torch.stack([torch.as_tensor(sample["label"]) for sample in samples]),
        ids=torch.tensor([sample["image_id"] for sample in samples]),
    )
