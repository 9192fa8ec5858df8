"""Averages of a network's weights, kept beside training: a moving one (EMA), or equal shares of its end (SWA).

Both are torch's ``AveragedModel``. What is evaluated, saved as ``model`` and handed over is the average, once
it exists.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from imgcls.config import register_check
from imgcls.structures import Problem

logger = logging.getLogger(__name__)


class Average:
    """What a training step needs of an average.

    updates: how often weights were taken in. needs_statistics: whether running statistics of the average have to be
    computed anew before it is used, because averaged weights give other activations.
    """

    needs_statistics = False

    def __init__(self, average: AveragedModel) -> None:
        self._average, self.updates = average, 0

    @property
    def begun(self) -> bool:
        """Whether there is an average yet."""
        return self.updates > 0

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights; of the same class, never trained."""
        return self._average.module

    def update(self, model: nn.Module, iteration: int) -> None:
        """``model`` has done ``iteration``: take its weights in if they are due. The first become the average."""
        self._average.update_parameters(model)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by the network's own names."""
        state: dict[str, Tensor] = self.network.state_dict()
        return state

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Go on from ``weights`` after ``updates`` updates."""
        self.network.load_state_dict(weights)
        self.updates = updates
        self._average.n_averaged.fill_(updates)


class Ema(Average):
    """The exponential moving average (Polyak & Juditsky 1992; Tarvainen & Valpola 2017), running statistics included.

    decay: share of the average that one update keeps, in [0, 1). warmup: keep less at first, ``(1 + t) / (10 + t)`` at
    update t, so that the random weights of the beginning are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        super().__init__(AveragedModel(model, multi_avg_fn=self._mix, use_buffers=True))

    def keeps(self) -> float:
        """The share that the next update keeps."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def _mix(self, averaged: Any, current: Any, _: Any) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1.0 - self.keeps())
        else:  # counters
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(theirs)


class Swa(Average):
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1): equal shares.

    start: iterations done before the first period. period: iterations from one set of weights to the next; the first
    is taken at the end of the first period.
    """

    needs_statistics = True

    def __init__(self, model: nn.Module, *, start: int, period: int) -> None:
        self.start, self.period = start, period
        super().__init__(AveragedModel(model))

    @classmethod
    def from_cfg(cls, cfg: CfgNode, model: nn.Module) -> Swa:
        """What ``SOLVER.SWA`` says; a period that does not fit behind the start is cut, and the log says so."""
        total, wanted = cfg.SOLVER.MAX_ITER, cfg.SOLVER.SWA.PERIOD
        start = min(round(cfg.SOLVER.SWA.START * total), total - 1)
        period = min(wanted, total - start)
        if period < wanted:
            logger.warning("SOLVER.SWA.PERIOD cut from %d to %d: the run has %d iterations", wanted, period, total)
        return cls(model, start=start, period=period)

    def update(self, model: nn.Module, iteration: int) -> None:
        done = iteration + 1 - self.start
        if done > 0 and done % self.period == 0:
            super().update(model, iteration)


def build_average(cfg: CfgNode, model: nn.Module) -> Average | None:
    """The average that ``SOLVER.EMA`` or ``SOLVER.SWA`` asks for; None: none is kept."""
    node = cfg.SOLVER
    if node.EMA.ENABLED:
        return Ema(model, node.EMA.DECAY, warmup=node.EMA.WARMUP)
    return Swa.from_cfg(cfg, model) if node.SWA.ENABLED else None


@register_check
def check_average(cfg: CfgNode) -> list[Problem]:
    """One average at most: only one can be what is evaluated and saved."""
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet" or not (cfg.SOLVER.EMA.ENABLED and cfg.SOLVER.SWA.ENABLED):
        return []
    allowed = "one of SOLVER.EMA.ENABLED and SOLVER.SWA.ENABLED; the average is what is evaluated and saved"
    return [Problem("two averages of the weights are asked for", True, allowed, "SOLVER.SWA.ENABLED")]
