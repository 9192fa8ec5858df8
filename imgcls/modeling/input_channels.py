"""Images of another number of channels: the first convolution, and what becomes of its loaded weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from imgcls.modeling.backbone_base import Trunk

logger = logging.getLogger(__name__)


def input_convolution(trunk: Trunk) -> tuple[str, nn.Conv2d]:
    """The convolution that takes the image, and its name; a trunk without one is a ``ValueError``."""
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(f"{trunk.architecture.variant} has no convolution that takes the image")


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """(O, I, h, w) of an image's first convolution for images of ``channels`` channels.

    For grey images the sum over the channels: three equal channels then give what they gave. For more, the channels are
    repeated in turn and scaled by I / channels, so that the sum over the input keeps its size.
    """
    given = weight.shape[1]
    if channels == given:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight[:, [index % given for index in range(channels)]]
    return repeated * (given / channels)


def fit_to_input(weights: Mapping[str, Any], trunk: Trunk, prefix: str) -> dict[str, Any]:
    """``weights`` with the first convolution's made to fit the trunk's input channels; says so in the log."""
    name, convolution = input_convolution(trunk)
    key = f"{prefix}{name}.weight"
    given = weights.get(key)
    fitted = dict(weights)
    if isinstance(given, Tensor) and given.dim() == 4 and given.shape[1] != convolution.in_channels:
        fitted[key] = fit_channels(given, convolution.in_channels)
        logger.info("%s: adapted from %d to %d input channels", key, given.shape[1], convolution.in_channels)
    return fitted
