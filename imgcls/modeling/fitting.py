"""Maps made to fit a pyramid: its levels must be exactly ceil(input / stride), and reach down to the stride asked for.

Some networks' maps are a few pixels off, for their papers pad less (AlexNet, SqueezeNet, Inception v3) or round down
(VGG, GoogLeNet); some end at stride 16. Here the pyramid's input is mended. The trunk itself, and what a classifier
makes of it, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from imgcls.modeling.backbone_base import NoSuchMap, Trunk


def fitted(build: Callable[[Sequence[str] | None], Trunk], wanted: Sequence[str] | None) -> Trunk:
    """``build(wanted)`` with maps that fit a pyramid; if ``wanted`` names the level below the last, it is pooled."""
    try:
        trunk, extra = build(wanted), ""
    except NoSuchMap as error:
        extra = _level_below(error.known[-1])
        if error.missing != (extra,):
            raise
        trunk = build([name for name in wanted or () if name != extra])
    fit_to_strides(trunk, extra)
    return trunk


def _level_below(name: str) -> str:
    """The name of the level behind ``name``: "res4" -> "res5"."""
    return f"res{int(name[3:]) + 1}" if name.startswith("res") and name[3:].isdecimal() else ""


def fit_to_strides(trunk: Trunk, extra: str = "") -> None:
    """Have calls of ``trunk`` return maps of ceil(input / stride) pixels, and one more level called ``extra``.

    ``trunk.forward(x)`` still returns the maps as they are.
    """
    if extra:
        last = list(trunk.output_shape())[-1]
        trunk._out_feature_channels[extra] = trunk._out_feature_channels[last]
        trunk._out_feature_strides[extra] = 2 * trunk._out_feature_strides[last]
        trunk._out_features = [*trunk._out_features, extra]
    trunk.register_forward_hook(partial(_fit, extra=extra))


def _fit(trunk: Trunk, args: tuple[Any, ...], maps: dict[str, Tensor], *, extra: str) -> dict[str, Tensor]:
    height, width = args[0].shape[-2:]
    shapes = trunk.output_shape()
    fitted = {
        name: resized_at_edges(value, -(-height // shapes[name].stride), -(-width // shapes[name].stride))
        for name, value in maps.items()
    }
    if extra:
        fitted[extra] = F.max_pool2d(fitted[list(maps)[-1]], 2, ceil_mode=True)
    return fitted


def resized_at_edges(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, h, w) -> (N, C, height, width): edge pixels repeated or cut off, as evenly on both sides as it goes."""
    top, bottom = _halves(height - x.shape[2])
    left, right = _halves(width - x.shape[3])
    if top == bottom == left == right == 0:
        return x
    x = x[:, :, max(0, -top) : x.shape[2] - max(0, -bottom), max(0, -left) : x.shape[3] - max(0, -right)]
    return F.pad(x, (max(0, left), max(0, right), max(0, top), max(0, bottom)), mode="replicate")


def _halves(difference: int) -> tuple[int, int]:
    half = abs(difference) // 2
    before, after = half, abs(difference) - half
    return (before, after) if difference > 0 else (-before, -after)
