"""Gradient clipping with detectron2's keys, and adaptively."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from torch import nn

from imgcls.structures import Problem


def clip_gradients(cfg: CfgNode, parameters: Iterable[nn.Parameter]) -> None:
    """Clip in place as ``SOLVER.CLIP_GRADIENTS`` says.

    CLIP_TYPE value: every element to +-CLIP_VALUE. norm: each parameter's norm (NORM_TYPE), as in detectron2.
    full_model: the norm over all parameters together, what other trainers call clipping by norm. adaptive: each unit's
    norm to CLIP_VALUE times that of its weights (Brock et al. 2021, section 4.1).
    """
    node = cfg.SOLVER.CLIP_GRADIENTS
    if not node.ENABLED:
        return
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    if node.CLIP_TYPE == "value":
        nn.utils.clip_grad_value_(with_grad, node.CLIP_VALUE)
    elif node.CLIP_TYPE == "norm":
        for parameter in with_grad:
            nn.utils.clip_grad_norm_(parameter, node.CLIP_VALUE, node.NORM_TYPE)
    elif node.CLIP_TYPE == "full_model":
        nn.utils.clip_grad_norm_(with_grad, node.CLIP_VALUE, node.NORM_TYPE)
    elif node.CLIP_TYPE == "adaptive":
        _clip_adaptively(with_grad, node.CLIP_VALUE)
    else:
        allowed = "value, norm, full_model, adaptive"
        raise Problem("unknown way to clip", node.CLIP_TYPE, allowed, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE").error()


@torch.no_grad()
def _clip_adaptively(parameters: Iterable[nn.Parameter], share: float, floor: float = 1e-3) -> None:
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        # A unit is what makes one output: a row of a matrix, a filter; of a vector each element.
        axes = tuple(range(1, parameter.dim())) or None
        most = share * _unit_norms(parameter, axes).clamp_(min=floor)
        norms = _unit_norms(gradient, axes)
        gradient.mul_(torch.where(norms > most, most / norms.clamp(min=1e-6), torch.ones_like(norms)))


def _unit_norms(tensor: torch.Tensor, axes: tuple[int, ...] | None) -> torch.Tensor:
    return tensor.abs() if axes is None else torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
