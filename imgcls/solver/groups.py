"""What each parameter gets: learning rate and weight decay, by its kind, its depth and its name."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from imgcls.config import register_check
from imgcls.structures import Problem

Groups = list[dict[str, Any]]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
# What a row of SOLVER.PARAM_OVERRIDES may set.
OVERRIDES = ("lr_factor", "weight_decay")


def parameter_groups(cfg: CfgNode, model: nn.Module) -> Groups:
    """The trainable parameters by what they get, in the order in which each kind comes first.

    ``WEIGHT_DECAY_NORM`` holds for norm layers, ``WEIGHT_DECAY_BIAS`` (None: WEIGHT_DECAY) and ``BIAS_LR_FACTOR`` for
    biases, as in detectron2. With ``LAYER_DECAY`` the rate falls by this factor from one block to the one before
    (Clark et al. 2020; Bao et al. 2022). ``PARAM_OVERRIDES`` are rows [pattern of names, {lr_factor, weight_decay}];
    of several that match the last counts.
    """
    node = cfg.SOLVER
    factors = depth_factors(model, node.LAYER_DECAY)
    used: set[str] = set()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, decay in _with_decay(model, node):
        rate = node.BASE_LR * factors.get(name, 1.0)
        if name.rpartition(".")[2] == "bias":
            rate *= node.BIAS_LR_FACTOR
        for pattern, values in node.PARAM_OVERRIDES:
            if fnmatchcase(name, pattern):
                used.add(pattern)
                rate, decay = rate * values.get("lr_factor", 1.0), values.get("weight_decay", decay)
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    for pattern, _ in node.PARAM_OVERRIDES:
        if pattern not in used:
            what, allowed = "no trainable parameter has a name like this", "a pattern such as backbone.*.pos_embed"
            raise Problem(what, pattern, allowed, "SOLVER.PARAM_OVERRIDES").error()
    return list(groups.values())


def _with_decay(model: nn.Module, node: CfgNode) -> Iterator[tuple[str, nn.Parameter, float]]:
    """Every trainable parameter once: its name, itself, its weight decay."""
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = node.WEIGHT_DECAY
            if isinstance(module, NORMS) and node.WEIGHT_DECAY_NORM is not None:
                decay = node.WEIGHT_DECAY_NORM
            if own == "bias" and node.WEIGHT_DECAY_BIAS is not None:
                decay = node.WEIGHT_DECAY_BIAS
            yield f"{module_name}.{own}" if module_name else own, parameter, float(decay)


def depth_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Name of each parameter of ``model.backbone`` -> ``decay`` to the power of its distance from the head.

    Each block of a stage counts one (:func:`blocks_of`); what stands outside the backbone has the factor 1.
    """
    if decay == 1.0 or not hasattr(model.backbone, "stage_modules"):
        return {}
    layers: list[nn.Module] = []
    for _, stage in model.backbone.stage_modules():  # type: ignore[operator] # a trunk's, which this level does not know
        layers += blocks_of(stage)
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors = {
        names[parameter]: decay ** (len(layers) - depth)
        for depth, layer in enumerate(layers)
        for parameter in layer.parameters()
    }
    # Position embeddings and class tokens, which belong to no stage, are as deep as the first.
    loose = [name for name in names.values() if name.startswith("backbone.") and name not in factors]
    return {**factors, **{name: decay ** len(layers) for name in loose}}


def blocks_of(stage: nn.Module) -> list[nn.Module]:
    """The children of a chain or list of modules, those without parameters left out; anything else is one block."""
    if isinstance(stage, (nn.Sequential, nn.ModuleList)):
        return [child for child in stage if any(True for _ in child.parameters())]
    return [stage]


@register_check
def check_overrides(cfg: CfgNode) -> list[Problem]:
    """The rows of ``SOLVER.PARAM_OVERRIDES``; whether a pattern matches is seen when the network is there."""
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet":
        return []
    allowed = f"[pattern, {{{' and/or '.join(OVERRIDES)}: a number >= 0}}]"
    return [
        Problem("an override is not a row", row, allowed, "SOLVER.PARAM_OVERRIDES")
        for row in cfg.SOLVER.PARAM_OVERRIDES
        if not _is_override(row)
    ]


def _is_override(row: Any) -> bool:
    if (
        not isinstance(row, list | tuple)
        or len(row) != 2
        or not isinstance(row[0], str)
        or not isinstance(row[1], dict)
    ):
        return False
    numbers = all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf") for v in row[1].values()
    )
    return bool(row[1]) and numbers and set(row[1]) <= set(OVERRIDES)
