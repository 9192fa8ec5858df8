"""SqueezeNet: Iandola et al. 2016, arXiv:1602.07360, table 1; version 1.1 is that of the authors' release.

Version 1.1 has a smaller first convolution and pools earlier (after it, fire3 and fire5 instead of conv1, fire4 and
fire8). As in torchvision the first convolution is not padded and pooling counts a window that lies partly outside, so
maps can be a few pixels smaller than the stride says. No stage has stride 32. The last layer, conv10, is the head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import conv_norm_act
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import PointwiseHead, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule


@dataclass(frozen=True)
class SqueezeNetSpec:
    """One version: kernels of conv1, their size, and how many fire modules follow each of the three poolings."""

    conv1: int
    kernel: int
    fires: tuple[int, int, int]
    own_norm: str = "none"


VARIANTS = {
    "squeezenet1_0": SqueezeNetSpec(96, 7, (3, 4, 1)),
    "squeezenet1_1": SqueezeNetSpec(64, 3, (2, 2, 4)),
}


class Fire(nn.Module):
    """Figure 1: 1x1 kernels squeeze the channels, 1x1 and 3x3 kernels side by side expand them."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = conv_norm_act(in_channels, squeeze, 1, norm=None, activation=F.relu_)
        self.expand1x1 = conv_norm_act(squeeze, expand // 2, 1, norm=None, activation=F.relu_)
        self.expand3x3 = conv_norm_act(squeeze, expand // 2, 3, norm=None, activation=F.relu_)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat((self.expand1x1(x), self.expand3x3(x)), dim=1)


class SqueezeNet(StagedTrunk):
    """conv1 (stem), then a pooling and fire modules each (res2, res3, res4): strides 2, 4, 8 and 16."""

    def __init__(
        self,
        spec: SqueezeNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "none",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        conv1 = conv_norm_act(in_channels, spec.conv1, spec.kernel, norm=None, activation=F.relu_, stride=2, padding=0)
        self.add_stage("stem", nn.Sequential(OrderedDict(conv1=conv1)), channels=spec.conv1, stride=2)
        channels = spec.conv1
        for stage, numbers in _fires(spec).items():
            layers: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.MaxPool2d(3, 2, ceil_mode=True))
            for number in numbers:
                squeeze, expand = fire_channels(number)
                layers[f"fire{number}"] = Fire(channels, squeeze, expand)
                channels = expand
            self.add_stage(stage, nn.Sequential(layers), channels=channels, stride=2)
        self.keep(out_features)
        self.apply(_init_weights)


def fire_channels(number: int) -> tuple[int, int]:
    """Squeezed and expanded channels of the fire module of that number in table 1 (2 to 9).

    Section 5.1: base_e = 128 expanded channels, incr_e = 128 more every freq = 2 modules, and SR = 0.125 of them in
    the layer that squeezes. Half of the expanding kernels are 3x3 (pct_3x3 = 0.5).
    """
    expand = 128 + 128 * ((number - 2) // 2)
    return expand // 8, expand


def _fires(spec: SqueezeNetSpec) -> dict[str, range]:
    """Stage -> the numbers of its fire modules; the paper counts conv1 as number 1."""
    stages, first = {}, 2
    for stage, count in zip(("res2", "res3", "res4"), spec.fires, strict=True):
        stages[stage] = range(first, first + count)
        first += count
    return stages


def _init_weights(module: nn.Module) -> None:
    # As in torchvision: He et al. 2015, forward case, uniform; biases 0.
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _head(
    row: SqueezeNetSpec, shapes: Mapping[str, ShapeSpec], num_classes: int, *, dropout: float | None, norm: str
) -> PointwiseHead:
    return PointwiseHead(last_channels(shapes), num_classes, relu=True, dropout=0.5 if dropout is None else dropout)


def _torchvision_rules(row: SqueezeNetSpec) -> list[KeyRule]:
    """torchvision counts conv1, its ReLU, poolings and fire modules in one list."""
    rules, index = [KeyRule(r"^features\.0\.", "stem.conv1."), KeyRule(r"^classifier\.1\.", "head.fc.")], 2
    for stage, numbers in _fires(row).items():
        index += 1  # pooling
        for number in numbers:
            rules.append(KeyRule(rf"^features\.{index}\.", f"{stage}.fire{number}."))
            index += 1
    return rules


FAMILY = register_family(
    Family(
        name="squeezenet",
        variants=VARIANTS,
        build=SqueezeNet,
        head=_head,
        sources={"torchvision": Source({variant: variant for variant in VARIANTS}, _torchvision_rules)},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_squeezenet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """SqueezeNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
