"""Data loaders for training and evaluation; both training loops use these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from imgcls.data.datasets.source import Source
from imgcls.data.mapper import BadSample, ClsMapper, MappedDataset, collate_dicts, collate_tensors
from imgcls.data.samplers import CounterBatchSampler
from imgcls.data.transforms import test_transform, train_transform
from imgcls.structures import Batch


class Loader:
    """A DataLoader that turns a broken sample into one ``ValueError`` naming it, raised in the main process."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch | list[dict[str, Any]]]:
        for batch in self.loader:
            if isinstance(batch, BadSample):
                # Ends workers that were to persist; when the garbage collector does, it waits 5 seconds for each.
                self.loader._iterator = None
                raise ValueError(batch.reason)
            yield batch


def build_train_loader(cfg: CfgNode, source: Source, *, start: int = 0) -> Loader:
    """Batches of iterations ``start`` .. MAX_ITER - 1 for this rank, the same ones after any restart."""
    transform = train_transform(cfg.INPUT.TRAIN_TRANSFORMS, cfg.INPUT.TRAIN_SIZE, cfg.INPUT.INTERPOLATION)
    sampler = CounterBatchSampler(
        len(source),
        global_batch=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        start=start,
        stop=cfg.SOLVER.MAX_ITER,
        rank=comm.get_rank(),
        world=comm.get_world_size(),
    )
    mapper = ClsMapper(transform, seed=cfg.SEED, side=cfg.INPUT.TRAIN_SIZE)
    return _loader(cfg, MappedDataset(source, mapper), sampler, persist=False)


def build_test_loader(cfg: CfgNode, source: Source) -> Loader:
    """Every sample of ``source`` once over all ranks: contiguous shares, none padded."""
    transform = test_transform(cfg.INPUT.TEST_RESIZE, cfg.INPUT.TEST_SIZE, cfg.INPUT.INTERPOLATION)
    if not len(source):
        raise ValueError(f"the evaluation set {source.name} is empty; change DATASETS.TEST")
    indices = [(0, index) for index in InferenceSampler(len(source))]
    size = cfg.TEST.IMS_PER_BATCH
    batches = [indices[first : first + size] for first in range(0, len(indices), size)]
    # Evaluation comes back to its loader again and again; starting workers costs seconds each time.
    return _loader(cfg, MappedDataset(source, ClsMapper(transform)), batches, persist=True)


def _loader(cfg: CfgNode, dataset: MappedDataset, batch_sampler: Any, *, persist: bool) -> Loader:
    workers = cfg.DATALOADER.NUM_WORKERS
    return Loader(
        DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=collate_dicts if cfg.DATALOADER.PACKING == "dicts" else collate_tensors,
            pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
            persistent_workers=persist and workers > 0,
            timeout=cfg.DATALOADER.TIMEOUT if workers else 0,
        )
    )
