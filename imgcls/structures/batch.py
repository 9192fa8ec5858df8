"""What a loader hands to a network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images with their targets.

    images: (N, C, H, W) uint8 or float in 0..255; a list of (C, H, W) where sizes differ.
    targets: (N,) int64 class indices, or (N, K) float weights over the classes; None when there are none.
    ids: (N,) int64 indices of the samples in their data set; None when unknown.
    """

    images: Tensor | list[Tensor]
    targets: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; copies from pinned memory do not block."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's DataLoader calls this)."""
        return self._apply(lambda tensor: tensor.pin_memory())

    def parts(self, count: int) -> list[Batch]:
        """The same samples in order, in ``count`` batches as equal as can be; fewer where there are fewer samples."""
        size = -(-len(self) // count)
        return [self._cut(slice(first, first + size)) for first in range(0, len(self), size)]

    def _cut(self, part: slice) -> Batch:
        return Batch(
            self.images[part],
            None if self.targets is None else self.targets[part],
            None if self.ids is None else self.ids[part],
        )

    def _apply(self, fn) -> Batch:  # type: ignore[no-untyped-def]
        images = [fn(image) for image in self.images] if isinstance(self.images, list) else fn(self.images)
        targets = None if self.targets is None else fn(self.targets)
        return replace(self, images=images, targets=targets)
