"""A few-shot task: some classes, a few labelled pictures of each, and others to be told apart by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imgcls.structures.batch import Batch


@dataclass(frozen=True)
class Episode:
    """An N-way K-shot task (Vinyals et al. 2016).

    support: N x K pictures, class after class; query: N x Q others, likewise. Their targets are 0 .. N - 1, the
        class's place in this episode.
    classes: (N,) int64, the classes by their index in the data set.
    """

    support: Batch
    query: Batch
    classes: Tensor

    def to(self, device: torch.device | str) -> Episode:
        """The same on ``device``; copies from pinned memory do not block."""
        return Episode(self.support.to(device), self.query.to(device), self.classes)

    def pin_memory(self) -> Episode:
        """The same in page-locked memory (torch's DataLoader calls this)."""
        return Episode(self.support.pin_memory(), self.query.pin_memory(), self.classes)
