"""Several views of each picture of a batch, as self-supervised methods compare them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """The same N pictures, seen in several ways.

    images: one (N, C, S, S) uint8 tensor a view, in the order of ``INPUT.VIEWS``; sides differ between views.
    targets: (N,) int64 class indices, -1 for pictures without a label, or (N, K) float; None when there are none.
    ids: (N,) int64 indices of the samples in their data set; None when unknown.
    """

    images: list[Tensor]
    targets: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        """The number of pictures N."""
        return len(self.images[0])

    def to(self, device: torch.device | str) -> Views:
        """The same on ``device``; copies from pinned memory do not block."""
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return replace(self, images=[image.to(device, non_blocking=True) for image in self.images], targets=targets)

    def pin_memory(self) -> Views:
        """The same in page-locked memory (torch's DataLoader calls this)."""
        targets = None if self.targets is None else self.targets.pin_memory()
        return replace(self, images=[image.pin_memory() for image in self.images], targets=targets)
