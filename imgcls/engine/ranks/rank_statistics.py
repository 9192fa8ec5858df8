"""Running statistics as the single ranks have them, for a run that is stopped where they would not be averaged.

Averaging them once more than the uninterrupted run does would change their last bits. A checkpoint that is written only
because of a signal has the average as every other, and beside it what the ranks go on with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def statistics_of_ranks(networks: Sequence[nn.Module]) -> list[list[Tensor]]:
    """A list for each rank: mean and variance of every BatchNorm; no list on a rank alone. Collective."""
    if comm.get_world_size() == 1:
        return []
    return comm.all_gather([buffer.detach().cpu().clone() for buffer in _statistics(networks)])


def take_own_statistics(networks: Sequence[nn.Module], of_ranks: Sequence[Sequence[Tensor]]) -> None:
    """Put this rank's share of :func:`statistics_of_ranks` back; of another number of ranks there is none."""
    if len(of_ranks) != comm.get_world_size():
        return
    with torch.no_grad():
        for buffer, own in zip(_statistics(networks), of_ranks[comm.get_rank()], strict=True):
            buffer.copy_(own)


def _statistics(networks: Sequence[nn.Module]) -> list[Tensor]:
    norms = [module for network in networks for module in network.modules() if isinstance(module, _BatchNorm)]
    return [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
