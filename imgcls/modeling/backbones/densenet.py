"""DenseNet: Huang et al. 2016, arXiv:1608.06993, table 1 (the networks for ImageNet: DenseNet-BC) and section 3.

BatchNorm's epsilon and momentum are torch's, as in torchvision. The maps ``res2`` to ``res4`` are what a dense block
stacks up, before any norm; the norm and ReLU behind the last block belong to ``res5``. The 2x2 poolings of the
transitions round down, so a map can be one pixel smaller than ceil(input / stride).

The small stem is that of section 3's networks for CIFAR: a 3x3 convolution of stride 1, no pooling. torchvision's
ImageNet weights are for RGB with the usual ImageNet mean and standard deviation, resized to 256 pixels (bilinear) and
cropped to 224; timm's too, which says bicubic even of torchvision's own (``tv_in1k``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import NormFactory, conv_norm_relu
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

BOTTLENECK = 4  # section 3: each 1x1 convolution makes 4k maps
COMPRESSION = 0.5  # section 3: theta of DenseNet-BC


@dataclass(frozen=True)
class DenseNetSpec:
    """One column of table 1: the growth rate k and the number of layers in each dense block."""

    growth: int
    layers: tuple[int, int, int, int]
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "densenet121": DenseNetSpec(32, (6, 12, 24, 16)),
    "densenet161": DenseNetSpec(48, (6, 12, 36, 24)),
    "densenet169": DenseNetSpec(32, (6, 12, 32, 32)),
    "densenet201": DenseNetSpec(32, (6, 12, 48, 32)),
}


def block_channels(spec: DenseNetSpec) -> list[tuple[int, int]]:
    """Channels into and out of each dense block.

    Section 3: 2k into the first block, k more with every layer, and half of them left by every transition.
    """
    channels, ends = 2 * spec.growth, []
    for layers in spec.layers:
        ends.append((channels, channels + layers * spec.growth))
        channels = int(ends[-1][1] * COMPRESSION)
    return ends


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3 over all maps so far; returns them with the k new ones behind them."""

    def __init__(self, in_channels: int, growth: int, norm: NormFactory) -> None:
        super().__init__()
        self.norm = norm(in_channels)
        self.conv1 = conv_norm_relu(in_channels, BOTTLENECK * growth, 1, norm=norm)
        self.conv2 = Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.conv1(F.relu_(self.norm(x))))], dim=1)


class DenseNet(StagedTrunk):
    """Stem (stride 4), then dense blocks with transitions between them as stages res2 .. res5 (small stem: 1 .. 8)."""

    def __init__(
        self,
        spec: DenseNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        blocks = block_channels(spec)
        self._add_stem(in_channels, blocks[0][0], make_norm, small=stem == "small")
        before = 0
        for index, ((channels, out), count) in enumerate(zip(blocks, spec.layers, strict=True)):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if index > 0:
                layers["transition"] = _transition(before, channels, make_norm)
            for number in range(count):
                layers[f"layer{number + 1}"] = DenseLayer(channels + number * spec.growth, spec.growth, make_norm)
            if index == len(blocks) - 1:
                layers["norm"], layers["relu"] = make_norm(out), nn.ReLU(inplace=True)
            self.add_stage(f"res{index + 2}", nn.Sequential(layers), channels=out, stride=2 if index > 0 else 1)
            before = out
        self.keep(out_features)
        self.apply(_init_weights)

    def _add_stem(self, in_channels: int, channels: int, norm: NormFactory, *, small: bool) -> None:
        if small:
            layers = OrderedDict(conv1=conv_norm_relu(in_channels, channels, 3, norm=norm))
        else:
            conv1 = conv_norm_relu(in_channels, channels, 7, norm=norm, stride=2)
            layers = OrderedDict(conv1=conv1, pool=nn.MaxPool2d(3, stride=2, padding=1))
        self.add_stage("stem", nn.Sequential(layers), channels=channels, stride=1 if small else 4)


def _transition(in_channels: int, channels: int, norm: NormFactory) -> nn.Sequential:
    """Norm, ReLU, 1x1 convolution, 2x2 means."""
    return nn.Sequential(
        OrderedDict(
            norm=norm(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=Conv2d(in_channels, channels, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, arXiv:1502.01852, as section 4.2 says.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


# torchvision's files write norm.1 and conv.2, its and timm's networks norm1 and conv2.
RULES = (
    KeyRule(r"(norm|conv)\.([12])\.", r"\1\2."),
    KeyRule(r"\.norm1\.", ".norm."),
    KeyRule(r"\.norm2\.", ".conv1.norm."),
    KeyRule(r"^features\.conv0\.", "stem.conv1."),
    KeyRule(r"^features\.norm0\.", "stem.conv1.norm."),
    KeyRule(r"^features\.norm5\.", "res5.norm."),
    KeyRule(r"^features\.denseblock1\.", "res2."),
    *(KeyRule(rf"^features\.(transition{n - 2}|denseblock{n - 1})\.", rf"res{n}.\1.") for n in (3, 4, 5)),
    KeyRule(r"\.transition\d\.", ".transition."),
    KeyRule(r"\.denseblock\d\.", "."),
    KeyRule(r"\.denselayer(\d+)\.", r".layer\1."),
    KeyRule(r"^classifier\.", "head.fc."),
)
NAMES = {variant: variant for variant in VARIANTS}

FAMILY = register_family(
    Family(
        name="densenet",
        variants=VARIANTS,
        build=DenseNet,
        stems=("standard", "small"),
        sources={"torchvision": Source(NAMES, RULES), "timm": Source(NAMES, RULES)},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_densenet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """DenseNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
