"""Normalisation layers whose epsilon and momentum survive every choice of kind."""

from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

NORMS = ("BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN")

_BATCH_NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "naiveSyncBN": NaiveSyncBatchNorm}


@dataclass(frozen=True)
class NormFactory:
    """Makes the norm layer for a number of channels; goes wherever detectron2 takes a ``norm``.

    ``detectron2.layers.get_norm("FrozenBN", c)`` fixes eps at 1e-5: a network trained with 1e-3 would be wrong by tens
    of percent on channels of small variance. Here eps and momentum belong to the network's row, whatever the kind.
    """

    kind: str
    eps: float = 1e-5
    momentum: float = 0.1

    def __call__(self, channels: int) -> nn.Module:
        if self.kind in _BATCH_NORMS:
            return _BATCH_NORMS[self.kind](channels, eps=self.eps, momentum=self.momentum)
        if self.kind == "FrozenBN":
            return FrozenBatchNorm2d(channels, eps=self.eps)
        if self.kind == "GN":
            # 32 groups as in detectron2 where they divide the channels; narrow networks take the largest that does.
            return nn.GroupNorm(gcd(32, channels), channels, eps=self.eps)
        raise ValueError(f"unknown norm {self.kind!r}; allowed: {', '.join(NORMS)}; change MODEL.BACKBONE.NORM")


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Replace every BatchNorm's running mean and variance by their mean over the ranks. Collective; no-op alone.

    Without it each rank evaluates its shard with its own statistics while rank 0's are saved, and the reported figure
    is not that of the saved file.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if not buffers:
        return
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
