"""How fast the loader feeds and how fast the network eats: a few seconds of each, apart from each other."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from imgcls.data import build_train_loader
from imgcls.engine.run import Run
from imgcls.engine.setup import Data

CPU_BATCH = 32  # images: a step on a CPU takes long enough with these
_MANY = 1_000_000  # iterations, more than are measured


@dataclass(frozen=True)
class Speed:
    """loader, step: images per second of the training loader alone, and of the training step on a batch that is there.

    workers: of the loader. memory: MiB that one of them holds (PSS: what it shares is counted in parts), the largest;
    0 where that is not known. batch: images. device: of the step. parameters: of the network.
    """

    loader: float
    step: float
    workers: int
    memory: int
    batch: int
    device: str
    parameters: int


def measure_speed(cfg: CfgNode, data: Data, seconds: float = 4.0) -> Speed:
    """Measure for ``seconds`` each, and at least two batches, of ``CPU_BATCH`` images at most on a CPU.

    cfg: with everything decided, as engine.setup does. data: with a training set.
    """
    assert data.train is not None
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = _MANY
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.IMS_PER_BATCH = min(CPU_BATCH, cfg.SOLVER.IMS_PER_BATCH)
    before = set(multiprocessing.active_children())
    memory: list[int] = []

    def look_at_workers() -> None:
        memory.extend(_pss(worker.pid) for worker in set(multiprocessing.active_children()) - before)

    batches: Any = iter(build_train_loader(cfg, data.train))
    try:
        batch = next(batches)
        # What the workers have prepared while the first batch was waited for says nothing of their pace.
        ready = cfg.DATALOADER.NUM_WORKERS
        loader = _per_second(batches, len(batch), seconds, ready, look_at_workers)
    finally:
        batches.close()
    run = Run(cfg, data)
    with EventStorage(0):
        step = _per_second(_steps(run, batch), len(batch), seconds, 1)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return Speed(
        loader, step, cfg.DATALOADER.NUM_WORKERS, max(memory, default=0), len(batch), cfg.MODEL.DEVICE, parameters
    )


def _steps(run: Run, batch: Any) -> Iterator[None]:
    if not isinstance(batch, list):
        batch = batch.to(run.cfg.MODEL.DEVICE)
    for iteration in cycle(range(_MANY)):
        run.step(batch, iteration)
        if run.cfg.MODEL.DEVICE.startswith("cuda"):
            torch.cuda.synchronize()
        yield


def _per_second(
    rounds: Iterator[Any], images: int, seconds: float, warm_up: int, at_end: Callable[[], None] = lambda: None
) -> float:
    """Images per second over rounds of ``images`` each, after ``warm_up`` of them."""
    for _ in range(warm_up):
        next(rounds)
    start, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - start < seconds:
        next(rounds)
        done += 1
    rate = done * images / (time.perf_counter() - start)
    at_end()
    return rate


def _pss(process: int | None) -> int:
    """MiB, from Linux' account; 0 where there is none."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("Pss:")), 0)
