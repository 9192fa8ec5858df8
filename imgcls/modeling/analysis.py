"""What a network costs: parameters, multiply-adds, activations, and the maps it offers. Nothing is computed for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imgcls.modeling.cls_net import ClsNet

_COUNTED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Cost:
    """Of one network for one image.

    parameters, of which body: of the classifier, and of what goes to a detector.
    multiply_adds: of convolutions, linear layers and attention, as papers count them ("FLOPs" there).
    activations: elements of the outputs of all convolutions and linear layers (Radosavovic et al. 2020, section 3.1).
    size: pixels, side of the image that the last two are for.
    maps: name -> (stride, channels) of every map that the body can return.
    """

    parameters: int
    body: int
    multiply_adds: int
    activations: int
    size: int
    maps: Mapping[str, tuple[int, int]]


def analyze(net: ClsNet, size: int) -> Cost:
    """The cost of ``net`` for an image of ``size`` pixels. ``net`` is moved to the meta device and of no use after."""
    trunk: Any = net.backbone
    channels = trunk._out_feature_channels
    # A class token is no map: it has no stride.
    maps = {name: (stride, channels[name]) for name, stride in trunk._out_feature_strides.items() if stride}
    parameters, body = (sum(p.numel() for p in module.parameters()) for module in (net, net.backbone))
    net = net.to("meta").eval()
    activations = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    handles = [module.register_forward_hook(count) for module in net.modules() if isinstance(module, _COUNTED)]
    image = torch.zeros(1, len(net.contract.pixel_mean), size, size, device="meta")
    with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")
        net(image, normalized=True)
    for handle in handles:
        handle.remove()
    return Cost(parameters, body, counter.get_total_flops() // 2, activations, size, maps)
