"""``--tune``: measure precision and memory format once, and write the faster ones into the config."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from imgcls.engine.machine.cpu_settings import has_fast_bfloat16
from imgcls.engine.measuring.made_up import made_up_batch, made_up_data
from imgcls.engine.run import Run
from imgcls.engine.setup import Data
from imgcls.structures import Problem

logger = logging.getLogger(__name__)

STEPS = 5  # of each candidate, by turns, after one that is not counted
WORTH = 1.03  # times faster than as stated: less may be chance, and is left


@dataclass
class Candidate:
    """bfloat16: autocast. seconds: of each step."""

    bfloat16: bool
    channels_last: bool
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of its seconds."""
        return statistics.median(self.seconds)

    def put_into(self, cfg: CfgNode) -> None:
        """Set the keys, in place; ``SOLVER.CPU_SETTINGS`` becomes decided."""
        cfg.MODEL.CHANNELS_LAST = self.channels_last
        if self.bfloat16:
            cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
        cfg.SOLVER.CPU_SETTINGS = "decided"

    def __str__(self) -> str:
        return (
            f"{'bfloat16' if self.bfloat16 else 'as stated'}, {'channels last' if self.channels_last else 'contiguous'}"
        )


def tune(cfg: CfgNode, data: Data, measure: Callable[[Sequence[Any]], None] | None = None) -> list[Candidate]:
    """Measure a few steps of each candidate and set the fastest, in place; what is True stays. Collective.

    cfg: with everything decided, as engine.setup does. measure: for tests, what fills the candidates' seconds.
    """
    if cfg.SOLVER.CPU_SETTINGS == "off":
        allowed = "auto, with neither SOLVER.AMP.ENABLED nor MODEL.CHANNELS_LAST False stated"
        raise Problem("--tune may not change what is stated", "off", allowed, "SOLVER.CPU_SETTINGS").error()
    candidates = _candidates(cfg)
    if measure is None:
        _measure(cfg, data, candidates)
    else:
        measure(candidates)
    best = candidates[_agreed(candidates)]
    rows = [(str(one), f"{1000 * one.median:.1f}", "chosen" if one is best else "") for one in candidates]
    logger.info("--tune:\n%s", tabulate(rows, headers=("precision, maps", "ms a step", ""), disable_numparse=True))
    best.put_into(cfg)
    return candidates


def _candidates(cfg: CfgNode) -> list[Candidate]:
    """The stated settings first."""
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    may_bfloat16 = not cfg.SOLVER.AMP.ENABLED and (not on_cpu or has_fast_bfloat16())
    orders = [True] if cfg.MODEL.CHANNELS_LAST else [False, True]
    return [Candidate(*one) for one in product([False, True] if may_bfloat16 else [False], orders)]


def _measure(cfg: CfgNode, data: Data, candidates: Sequence[Candidate]) -> None:
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    batch, stand_in = made_up_batch(cfg, images).to(cfg.MODEL.DEVICE), made_up_data(data)
    runs = []
    for candidate in candidates:
        own = cfg.clone()
        own.defrost()
        candidate.put_into(own)
        runs.append(Run(own, stand_in))
    for iteration in range(STEPS + 1):
        for candidate, run in zip(candidates, runs, strict=True):
            start = time.perf_counter()
            run.step(batch, iteration)
            run.step.settle()
            if cfg.MODEL.DEVICE.startswith("cuda"):
                torch.cuda.synchronize()
            if iteration:
                candidate.seconds.append(time.perf_counter() - start)


def _agreed(candidates: Sequence[Candidate]) -> int:
    """The place of the fastest, as the first rank finds; of those that are hardly faster, the stated one."""
    fastest = min(range(len(candidates)), key=lambda place: candidates[place].median)
    if candidates[0].median < WORTH * candidates[fastest].median:
        fastest = 0
    return int(comm.all_gather(fastest)[0])
