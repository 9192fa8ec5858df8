"""Optimizers from the config, and gradient clipping with detectron2's keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from imgcls.structures import Problem


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over ``model``'s trainable parameters, with detectron2's keys for decay and bias.

    ``WEIGHT_DECAY_NORM`` holds for norm layers, ``WEIGHT_DECAY_BIAS`` (None: WEIGHT_DECAY) and ``BIAS_LR_FACTOR`` for
    biases, as in detectron2.
    """
    node = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=node.BASE_LR,
        weight_decay=node.WEIGHT_DECAY,
        weight_decay_norm=node.WEIGHT_DECAY_NORM,
        weight_decay_bias=node.WEIGHT_DECAY_BIAS,
        bias_lr_factor=node.BIAS_LR_FACTOR,
    )
    common: dict[str, Any] = {"lr": node.BASE_LR, "weight_decay": node.WEIGHT_DECAY}
    if node.OPTIMIZER == "SGD":
        return torch.optim.SGD(params, momentum=node.MOMENTUM, nesterov=node.NESTEROV, **common)
    if node.OPTIMIZER == "AdamW":
        beta1, beta2 = node.BETAS
        return torch.optim.AdamW(params, betas=(beta1, beta2), **common)
    raise Problem("there is no such optimizer", node.OPTIMIZER, "SGD, AdamW", "SOLVER.OPTIMIZER").error()


def clip_gradients(cfg: CfgNode, parameters: Iterable[nn.Parameter]) -> None:
    """Clip in place as ``SOLVER.CLIP_GRADIENTS`` says.

    CLIP_TYPE value: every element to +-CLIP_VALUE. norm: each parameter's norm (NORM_TYPE), as in detectron2.
    full_model: the norm over all parameters together, what other trainers call clipping by norm.
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
    else:
        allowed = "value, norm, full_model"
        raise Problem("unknown way to clip", node.CLIP_TYPE, allowed, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE").error()
