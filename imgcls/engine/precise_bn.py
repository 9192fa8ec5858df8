"""Precise BN: running statistics computed anew, of fixed weights, over many batches (Wu & Johnson 2021, section 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import Tensor, nn

from imgcls.data import Source, build_train_loader
from imgcls.solver import Average

logger = logging.getLogger(__name__)


def statistics_due(cfg: CfgNode, average: Average | None) -> bool:
    """Whether they are computed anew before evaluations and saves: that was asked for, or the average needs it."""
    return cfg.TEST.PRECISE_BN.ENABLED or (average is not None and average.begun and average.needs_statistics)


def recompute_statistics(
    cfg: CfgNode,
    network: nn.Module,
    source: Source | None,
    *,
    iterations: int = 0,
    leave: Callable[[], object] | None = None,
) -> bool:
    """Give every BatchNorm of ``network`` the mean and variance of what it sees in ``source``, in place. Collective.

    The batches are those of the first ``iterations`` iterations (0: TEST.PRECISE_BN.NUM_ITER), augmented and not mixed,
    all of them at the side of the run's end: the same ones whenever this is called, after any restart, on any number of
    ranks. The network works as in evaluation (no dropout, full precision); only the BatchNorms look at their batch.
    Frozen ones, and those of auxiliary heads, which evaluation does not use, keep what they have. The variance is that
    of all values of all batches and ranks. The network's mode comes back, and no buffer becomes another tensor.

    leave: asked before each batch; where it says yes, on any rank, nothing changes and the result is False.
    """
    iterations = iterations or cfg.TEST.PRECISE_BN.NUM_ITER
    with _only_norms_training(network) as norms:
        if not norms or source is None:
            return True
        batches = _UntilLeft(build_train_loader(_for_statistics(cfg, iterations), source), leave)
        with _in_place(norms) as met:
            update_bn_stats(_Passing(network), batches, iterations)
            if leave is not None and any(comm.all_gather(batches.left)):
                met.clear()
                return False
        used = [norm for norm in norms if norm in met]
        _merge_ranks(used)
    logger.info("statistics of %d norms computed anew over %d batches", len(used), iterations)
    return True


class _UntilLeft:
    """``batches``; from where ``leave`` says yes None in their place, for fvcore insists on their number."""

    def __init__(self, batches: Iterable[Any], leave: Callable[[], object] | None) -> None:
        self._batches, self._leave, self.left = batches, leave, False

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if self._leave is not None and self._leave():
                self.left = True
                break
            yield batch
        while self.left:
            yield None


class _Passing(nn.Module):
    """``network``, which sees nothing of what is None."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Any) -> None:
        if batch is not None:
            self.network(batch)


def _for_statistics(cfg: CfgNode, iterations: int) -> CfgNode:
    """The config of a loader of just these batches."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = iterations
    if cfg.INPUT.TRAIN_SIZE_STEPS:
        cfg.INPUT.TRAIN_SIZE = int(cfg.INPUT.TRAIN_SIZE_STEPS[-1][1])
        cfg.INPUT.TRAIN_SIZE_STEPS = []
    return cfg


@contextmanager
def _only_norms_training(network: nn.Module) -> Iterator[list[Any]]:
    """The BatchNorms that training changes, in train mode; all other modules in eval mode."""
    was_training = network.training
    network.train()
    norms = [norm for norm in get_bn_modules(network) if norm.running_mean is not None]
    network.eval()
    for norm in norms:
        norm.train()
    try:
        yield norms
    finally:
        network.train(was_training)


@contextmanager
def _in_place(norms: list[Any]) -> Iterator[set[nn.Module]]:
    """Within, fvcore may do what it does; behind it only the norms in the set differ, those that met a batch.

    For fvcore puts other tensors in the place of the buffers, counts its batches as training's, and empties the norms
    that no batch came to.
    """
    met: set[nn.Module] = set()
    buffers = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    before = [[buffer.clone() for buffer in three] for three in buffers]
    hooks = [norm.register_forward_hook(lambda norm, *_: met.add(norm)) for norm in norms]
    yield met
    for norm, (mean, var, count), (old_mean, old_var, old_count), hook in zip(
        norms, buffers, before, hooks, strict=True
    ):
        hook.remove()
        mean.copy_(norm.running_mean if norm in met else old_mean)
        # A difference of squares, which rounding may make negative.
        var.copy_(norm.running_var.clamp(min=0) if norm in met else old_var)
        count.copy_(old_count)
        norm.running_mean, norm.running_var = mean, var


@torch.no_grad()
def _merge_ranks(norms: list[Any]) -> None:
    """Mean and variance of the values of all ranks, from those of each rank's. All have seen equally many."""
    if comm.get_world_size() == 1 or not norms:
        return
    means, variances = ([getattr(norm, name) for norm in norms] for name in ("running_mean", "running_var"))
    own = _flat(means)
    mean = _average(own.clone())
    # The variance inside the ranks and that between them.
    variance = _average(_flat(variances) + (own - mean).square())
    for buffers, values in ((means, mean), (variances, variance)):
        for buffer, value in zip(buffers, values.split([len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(value)


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat(buffers)


def _average(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values / comm.get_world_size()
