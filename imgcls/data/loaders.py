"""Data loaders for training and evaluation; both training loops use these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from imgcls.config import iterations_for
from imgcls.data.batch_buffers import WithBuffers
from imgcls.data.datasets.source import Source
from imgcls.data.fast_jpeg import from_jpeg
from imgcls.data.guarded_loader import BadFiles, Loader
from imgcls.data.mapper import (
    ClsMapper,
    Mapped,
    MappedDataset,
    Packed,
    Transform,
    collate_dicts,
    collate_tensors,
)
from imgcls.data.samplers import (
    CounterBatchSampler,
    Draw,
    Order,
    SizeSteps,
    balanced_weights,
    in_blocks,
    repeated,
    shuffled,
    weighted,
)
from imgcls.data.transforms import test_transform, train_transform
from imgcls.data.workers import free_shared_memory, start_worker
from imgcls.structures import Problem

PREFETCH = 2  # batches that a worker is asked for ahead
BUFFER_BYTES = 1 << 30  # of a loader's buffers for batches, at most

Collate = Callable[[Sequence[Mapped]], Packed]


def build_train_loader(cfg: CfgNode, source: Source, *, start: int = 0) -> Loader:
    """Batches of iterations ``start`` .. MAX_ITER - 1 for this rank, the same ones after any restart."""
    if cfg.INPUT.VIEWS:
        what, allowed = "a classifier trains on one view of a picture", "[]; build_view_loader is for several views"
        raise Problem(what, cfg.INPUT.VIEWS, allowed, "INPUT.VIEWS").error()
    steps = _size_steps(cfg, len(source))
    rows, interpolation = cfg.INPUT.TRAIN_TRANSFORMS, cfg.INPUT.INTERPOLATION

    def transform(side: int) -> Transform:
        return _decoding(cfg, cfg.INPUT.TRAIN_DECODE, train_transform(rows, side, interpolation))

    mapper = ClsMapper(
        transform(cfg.INPUT.TRAIN_SIZE),
        seed=cfg.SEED,
        side=cfg.INPUT.TRAIN_SIZE,
        at_side={side: transform(side) for _, side in steps},
        channels=len(cfg.MODEL.PIXEL_MEAN),
        max_pixels=cfg.INPUT.MAX_PIXELS,
    )
    dataset = MappedDataset(source, mapper, on_bad_in_training(cfg))
    sampler = train_sampler(cfg, source, start, SizeSteps(steps))
    largest = max([cfg.INPUT.TRAIN_SIZE, *(side for _, side in steps)])
    return make_loader(cfg, dataset, _with_buffers(cfg, sampler, sampler.share * largest**2))


def _decoding(cfg: CfgNode, how: str, transform: v2.Compose) -> Transform:
    """``transform``, made to decode JPEGs itself where ``how`` is "fast" and it can."""
    return from_jpeg(transform) if how == "fast" and len(cfg.MODEL.PIXEL_MEAN) == 3 else transform


def train_sampler(
    cfg: CfgNode, source: Source, start: int, side_at: Callable[[int], int] | None = None
) -> CounterBatchSampler:
    """This rank's draws of iterations ``start`` .. MAX_ITER - 1. side_at: :class:`CounterBatchSampler`'s."""
    return CounterBatchSampler(
        len(source),
        global_batch=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        start=start,
        stop=cfg.SOLVER.MAX_ITER,
        rank=comm.get_rank(),
        world=comm.get_world_size(),
        order=_order(cfg, source),
        side_at=side_at,
    )


def on_bad_in_training(cfg: CfgNode) -> str:
    """:class:`MappedDataset`'s ``on_bad`` for ``DATALOADER.ON_ERROR``."""
    return "replace" if cfg.DATALOADER.ON_ERROR == "skip" else "raise"


def _order(cfg: CfgNode, source: Source) -> Order:
    """What ``DATALOADER.SAMPLING``, ``REPEATS`` and ``SHUFFLE_BLOCK`` say."""
    node = cfg.DATALOADER
    kind, times = node.SAMPLING, node.REPEATS
    if kind == "shuffle":
        order = _in_blocks(cfg, source) if node.SHUFFLE_BLOCK else shuffled(len(source), cfg.SEED)
        return repeated(order, times) if times > 1 else order
    for key, value, usual in (("REPEATS", times, 1), ("SHUFFLE_BLOCK", node.SHUFFLE_BLOCK, 0)):
        if value != usual:
            what = f"with DATALOADER.SAMPLING {kind} every draw is one of the whole set"
            raise Problem(what, value, str(usual), f"DATALOADER.{key}").error()
    if kind == "weighted":
        if source.weights is None:
            what = f"{source.name} has no weights to sample by"
            raise Problem(what, kind, "shuffle, balanced", "DATALOADER.SAMPLING").error()
        return weighted(source.weights, cfg.SEED)
    if source.labels is None:
        what = f"the labels of {source.name} are known only when its samples are read"
        raise Problem(what, kind, "shuffle", "DATALOADER.SAMPLING").error()
    if source.labels.ndim == 1 and np.min(source.labels, initial=0) < 0:
        what = f"{source.name} has pictures without a label, which are of no class to balance"
        raise Problem(what, kind, "shuffle, weighted", "DATALOADER.SAMPLING").error()
    return weighted(balanced_weights(source.labels), cfg.SEED)


def _in_blocks(cfg: CfgNode, source: Source) -> Order:
    if source.runs is None:
        what = f"{source.name} does not lie in shards"
        raise Problem(what, cfg.DATALOADER.SHUFFLE_BLOCK, "0", "DATALOADER.SHUFFLE_BLOCK").error()
    return in_blocks(source.runs.tolist(), cfg.DATALOADER.SHUFFLE_BLOCK, cfg.SEED)


def _size_steps(cfg: CfgNode, num_images: int) -> list[tuple[int, int]]:
    """``INPUT.TRAIN_SIZE_STEPS`` with first iterations for epochs."""
    key = "INPUT.TRAIN_SIZE_STEPS"
    return [
        (iterations_for(epoch, num_images, cfg.SOLVER.IMS_PER_BATCH, key=key), int(side))
        for epoch, side in cfg.INPUT.TRAIN_SIZE_STEPS
    ]


def build_test_loader(cfg: CfgNode, source: Source) -> Loader:
    """Every sample of ``source`` once over all ranks: contiguous shares, none padded."""
    exact = test_transform(cfg.INPUT.TEST_RESIZE, cfg.INPUT.TEST_SIZE, cfg.INPUT.INTERPOLATION)
    transform = _decoding(cfg, cfg.INPUT.TEST_DECODE, exact)
    if not len(source):
        raise ValueError(f"the evaluation set {source.name} is empty; change DATASETS.TEST")
    draws = [Draw(0, index) for index in InferenceSampler(len(source))]
    size = cfg.TEST.IMS_PER_BATCH
    batches = [draws[first : first + size] for first in range(0, len(draws), size)]
    mapper = ClsMapper(transform, channels=len(cfg.MODEL.PIXEL_MEAN), max_pixels=cfg.INPUT.MAX_PIXELS)
    dataset = MappedDataset(source, mapper, "leave_out" if cfg.DATALOADER.ON_ERROR == "skip" else "raise")
    # Evaluation comes back to its loader again and again; starting workers costs seconds each time.
    return make_loader(cfg, dataset, _with_buffers(cfg, batches, size * cfg.INPUT.TEST_SIZE**2), persist=True)


def _with_buffers(cfg: CfgNode, batches: Any, pixels: int) -> Any:
    """``batches`` of draws with buffers of so many pixels for their images, where there are workers to send them."""
    workers = cfg.DATALOADER.NUM_WORKERS
    if not workers or cfg.DATALOADER.PACKING != "tensors":
        return batches
    size = len(cfg.MODEL.PIXEL_MEAN) * pixels
    # Besides those that are asked for there is one to look at, the one before it and the one that has just come.
    count = min(PREFETCH * workers + 3, int(min(BUFFER_BYTES, free_shared_memory() / 2) // size))
    return WithBuffers(batches, count, size) if count > 0 else batches


def make_loader(
    cfg: CfgNode, dataset: MappedDataset, batch_sampler: Any, *, collate: Collate | None = None, persist: bool = False
) -> Loader:
    """The loader that ``DATALOADER`` describes.

    batch_sampler: lists of draws. collate: instead of what ``DATALOADER.PACKING`` says. persist: keep the workers from
    one pass to the next.
    """
    node = cfg.DATALOADER
    loader = DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=node.NUM_WORKERS,
        collate_fn=collate or (collate_dicts if node.PACKING == "dicts" else collate_tensors),
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
        persistent_workers=persist and node.NUM_WORKERS > 0,
        timeout=node.TIMEOUT if node.NUM_WORKERS else 0,
        prefetch_factor=PREFETCH if node.NUM_WORKERS else None,
        worker_init_fn=start_worker,
    )
    return Loader(loader, BadFiles(len(dataset), node.MAX_BAD_SHARE))
