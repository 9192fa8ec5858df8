"""Gradient checkpointing that leaves running statistics as a plain forward leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(stage: nn.Module, x: Tensor) -> Tensor:
    """``stage(x)`` that keeps no map inside ``stage`` for the backward pass but computes them again there."""
    output: Tensor = checkpoint(
        stage, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_untouched(stage))
    )
    return output


@contextmanager
def _statistics_untouched(stage: nn.Module) -> Iterator[None]:
    # The second forward would blend every batch into the running statistics twice.
    norms = [m for m in stage.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, NaiveSyncBatchNorm))]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
