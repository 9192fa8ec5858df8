"""The exponential moving average of a network's weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Ema:
    """torch's ``AveragedModel`` with a warm-up, over parameters and running statistics.

    decay: share of the average that one update keeps, in [0, 1). warmup: keep less at first, ``(1 + t) / (10 + t)`` at
    update t, so that the random weights of the beginning are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._average = AveragedModel(model, multi_avg_fn=self._mix, use_buffers=True)

    @classmethod
    def from_cfg(cls, cfg: CfgNode, model: nn.Module) -> Ema | None:
        """What ``SOLVER.EMA`` says; None: no average is kept."""
        node = cfg.SOLVER.EMA
        return cls(model, node.DECAY, warmup=node.WARMUP) if node.ENABLED else None

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights; of the same class, never trained."""
        return self._average.module

    def keeps(self) -> float:
        """The share that the next update keeps."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of ``model`` in; the first time they become the average."""
        self._average.update_parameters(model)
        self.updates += 1

    def _mix(self, averaged: Any, current: Any, _: Any) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1.0 - self.keeps())
        else:  # counters
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by the network's own names."""
        state: dict[str, Tensor] = self.network.state_dict()
        return state

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Go on from ``weights`` after ``updates`` updates."""
        self.network.load_state_dict(weights)
        self.updates = updates
        self._average.n_averaged.fill_(updates)
