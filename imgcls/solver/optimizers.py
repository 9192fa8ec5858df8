"""Optimizers by name, and the rule that fits a learning rate to the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from imgcls.solver.groups import Groups, parameter_groups
from imgcls.structures import Problem

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over ``model``'s trainable parameters, in the groups of :func:`parameter_groups`."""
    node = cfg.SOLVER
    if node.OPTIMIZER not in OPTIMIZERS:
        what = "there is no such optimizer"
        raise Problem(what, node.OPTIMIZER, ", ".join(OPTIMIZERS), "SOLVER.OPTIMIZER").error()
    return OPTIMIZERS[node.OPTIMIZER](node, parameter_groups(cfg, model))


def scale_learning_rate(cfg: CfgNode) -> None:
    """``SOLVER.LR_FOR_BATCH``: BASE_LR is meant for so many images a step; scale it to IMS_PER_BATCH, in place.

    The linear rule is Goyal et al.'s (2017), the square root You et al.'s (2020). The key becomes 0: done.
    """
    node = cfg.SOLVER
    if not node.LR_FOR_BATCH:
        return
    ratio = node.IMS_PER_BATCH / node.LR_FOR_BATCH
    factor = ratio if node.LR_SCALING == "linear" else sqrt(ratio)
    before = node.BASE_LR
    node.BASE_LR, node.BASE_LR_END = before * factor, node.BASE_LR_END * factor
    logger.info(
        "SOLVER.BASE_LR %g for %d images a step becomes %g for %d (%s scaling)",
        *(before, node.LR_FOR_BATCH, node.BASE_LR, node.IMS_PER_BATCH, node.LR_SCALING),
    )
    node.LR_FOR_BATCH = 0


def _of_torch(name: str, *keys: str) -> Callable[[CfgNode, Groups], torch.optim.Optimizer]:
    return lambda node, groups: getattr(torch.optim, name)(groups, **_arguments(node, keys), **_fused(name, groups))


def _of_timm(name: str, *keys: str) -> Callable[[CfgNode, Groups], torch.optim.Optimizer]:
    def build(node: CfgNode, groups: Groups) -> torch.optim.Optimizer:
        try:
            import timm.optim
        except ImportError as error:
            raise ImportError(
                f"SOLVER.OPTIMIZER {node.OPTIMIZER} is timm's, which is not installed: "
                f"pip install 'imgcls[timm]' ({error})"
            ) from error
        return getattr(timm.optim, name)(groups, **_arguments(node, keys))

    return build


def _arguments(node: CfgNode, keys: Iterable[str]) -> dict[str, Any]:
    every = {
        "momentum": node.MOMENTUM,
        "nesterov": node.NESTEROV,
        "betas": tuple(node.BETAS),
        "alpha": node.SQUARE_DECAY,
    }
    own = {"eps": node.EPS} if node.EPS else {}
    return {"lr": node.BASE_LR, "weight_decay": node.WEIGHT_DECAY, **{key: every[key] for key in keys}, **own}


def _fused(name: str, groups: Groups) -> dict[str, bool]:
    """On GPUs one kernel for all parameters, which can be told on the device to change nothing (engine/step.py)."""
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return {"fused": True} if on_gpu and name in ("SGD", "Adam", "AdamW") else {}


def _sgd(node: CfgNode, groups: Groups) -> torch.optim.Optimizer:
    fused = _fused("SGD", groups)
    optimizer = torch.optim.SGD(
        groups, lr=node.BASE_LR, momentum=node.MOMENTUM, weight_decay=node.WEIGHT_DECAY, nesterov=node.NESTEROV, **fused
    )
    if fused and node.MOMENTUM:
        # torch would begin the buffers with the first gradient, whether or not that step is left out.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# name -> function(cfg.SOLVER, groups): torch's, and timm's (an extra) where torch has none for networks like these.
OPTIMIZERS: dict[str, Callable[[CfgNode, Groups], torch.optim.Optimizer]] = {
    "SGD": _sgd,
    "AdamW": _of_torch("AdamW", "betas"),
    "Adam": _of_torch("Adam", "betas"),
    "NAdam": _of_torch("NAdam", "betas"),
    "RAdam": _of_torch("RAdam", "betas"),
    "Adagrad": _of_torch("Adagrad"),
    "RMSprop": _of_torch("RMSprop", "momentum", "alpha"),
    "RMSpropTF": _of_timm("RMSpropTF", "momentum", "alpha"),  # the epsilon inside the root, as TensorFlow has it
    "LAMB": _of_timm("Lamb", "betas"),  # You et al. 2020
    "LARS": _of_timm("Lars", "momentum", "nesterov"),  # You et al. 2017
    "Lion": _of_timm("Lion", "betas"),  # Chen et al. 2023
    "Muon": _of_timm("Muon", "momentum", "nesterov", "betas"),  # Jordan et al. 2024; AdamW for what is no matrix
}
