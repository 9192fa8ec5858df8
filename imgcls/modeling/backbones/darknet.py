"""Darknets: the trunks of YOLOv2, v3 and v4, and their ImageNet classifiers.

- Darknet-19: Redmon and Farhadi 2016, arXiv:1612.08242, table 6.
- Darknet-53: Redmon and Farhadi 2018, arXiv:1804.02767, table 1.
- CSPDarknet53: Wang et al. 2019, arXiv:1911.11929 (figure 2), and Bochkovskiy et al. 2020, arXiv:2004.10934, with the
  widths that timm has.

The authors' leaky ReLU has a slope of 0.1. timm's Darknet-53 and CSPDarknet53, and the weights that it publishes, have
torch's 0.01: the same tensors are another network there, so ``darknet53_timm`` is a variant of its own. BatchNorm's
constants are timm's. Darknet-19 pools where the others have convolutions of stride 2 and ends otherwise: a family of
its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import NormFactory, conv_norm_act
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import PointwiseHead, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

NAMES = ("stem", "res2", "res3", "res4", "res5")


@dataclass(frozen=True)
class Darknet19Spec:
    """Table 6: (channels, kernel) of the convolutions before the first pool and behind each of the five pools."""

    first: tuple[int, int]
    stages: tuple[tuple[tuple[int, int], ...], ...]
    slope: float = 0.1
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


@dataclass(frozen=True)
class DarknetSpec:
    """Table 1: channels and residual blocks of the five stages; ``cross_stage``: half of each passes the blocks by."""

    blocks: tuple[int, ...] = (1, 2, 8, 8, 4)
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    stem_channels: int = 32
    cross_stage: bool = False
    slope: float = 0.1
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS_19 = {
    "darknet19": Darknet19Spec(
        (32, 3),
        (
            ((64, 3),),
            ((128, 3), (64, 1), (128, 3)),
            ((256, 3), (128, 1), (256, 3)),
            ((512, 3), (256, 1), (512, 3), (256, 1), (512, 3)),
            ((1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3)),
        ),
    ),
}
VARIANTS = {
    "darknet53": DarknetSpec(),
    "darknet53_timm": DarknetSpec(slope=0.01),
    "cspdarknet53": DarknetSpec(cross_stage=True, slope=0.01),
}


@dataclass(frozen=True)
class LeakyConvs:
    """Makes convolutions with norm and leaky ReLU, which is all that a Darknet consists of."""

    norm: NormFactory
    slope: float

    def __call__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> Conv2d:
        leaky = partial(F.leaky_relu, negative_slope=self.slope, inplace=True)
        conv = conv_norm_act(in_channels, out_channels, kernel, norm=self.norm, activation=leaky, stride=stride)
        # He et al. 2015, equation 15: the forward case with the slope of the negative side.
        nn.init.kaiming_normal_(conv.weight, a=self.slope, mode="fan_in", nonlinearity="leaky_relu")
        return conv


class Darknet19(StagedTrunk):
    """Stages of strides 2, 4 .. 32 that begin with a pool; the stem has the convolution before the first pool too.

    The pools round up, as in the authors' code: a map is ceil(input / stride) for any size.
    """

    def __init__(
        self,
        spec: Darknet19Spec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        conv = LeakyConvs(NormFactory(norm, spec.bn_eps, spec.bn_momentum), spec.slope)
        channels, kernel = spec.first
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv0=conv(in_channels, channels, kernel))
        for name, rows in zip(NAMES, spec.stages, strict=True):
            layers["pool"] = nn.MaxPool2d(2, 2, ceil_mode=True)
            for index, (out, kernel) in enumerate(rows, start=1):
                layers[f"conv{index}"] = conv(channels, out, kernel)
                channels = out
            self.add_stage(name, nn.Sequential(layers), channels=channels, stride=2)
            layers = OrderedDict()
        self.keep(out_features)


class DarkBlock(nn.Module):
    """1x1 to the hidden channels, 3x3 back, and the block's input added."""

    def __init__(self, channels: int, hidden: int, conv: LeakyConvs) -> None:
        super().__init__()
        self.conv1 = conv(channels, hidden, 1)
        self.conv2 = conv(hidden, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class CrossStage(nn.Module):
    """3x3 of stride 2; a 1x1 whose output is split: one half passes, the other goes through the blocks; 1x1 on both.

    The first stage keeps all channels in either half and narrows inside its block, the others halve them.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int, conv: LeakyConvs, *, first: bool) -> None:
        super().__init__()
        half = out_channels if first else out_channels // 2
        self.down = conv(in_channels, out_channels, 3, 2)
        self.expand = conv(out_channels, 2 * half, 1)
        hidden = half // 2 if first else half
        self.blocks = nn.Sequential(OrderedDict((f"block{i}", DarkBlock(half, hidden, conv)) for i in range(blocks)))
        self.transition_blocks = conv(half, half, 1)
        self.transition = conv(2 * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        passing, x = self.expand(self.down(x)).chunk(2, dim=1)
        x = self.transition_blocks(self.blocks(x))
        return self.transition(torch.cat([passing, x], dim=1))


class Darknet(StagedTrunk):
    """Stages of strides 2, 4 .. 32 that begin with a 3x3 of stride 2; the stem has the first convolution too."""

    def __init__(
        self,
        spec: DarknetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        conv = LeakyConvs(NormFactory(norm, spec.bn_eps, spec.bn_momentum), spec.slope)
        make = _cross_stage if spec.cross_stage else _plain_stage
        channels = spec.stem_channels
        for name, out, blocks in zip(NAMES, spec.channels, spec.blocks, strict=True):
            stage = make(channels, out, blocks, conv, first=name == "stem")
            if name == "stem":
                conv1 = conv(in_channels, spec.stem_channels, 3)
                stage = nn.Sequential(OrderedDict(conv1=conv1, **dict(stage.named_children())))
            self.add_stage(name, stage, channels=out, stride=2)
            channels = out
        self.keep(out_features)


def _plain_stage(in_channels: int, out_channels: int, blocks: int, conv: LeakyConvs, *, first: bool) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(down=conv(in_channels, out_channels, 3, 2))
    layers.update((f"block{i}", DarkBlock(out_channels, out_channels // 2, conv)) for i in range(blocks))
    return nn.Sequential(layers)


def _cross_stage(in_channels: int, out_channels: int, blocks: int, conv: LeakyConvs, *, first: bool) -> nn.Module:
    stage = CrossStage(in_channels, out_channels, blocks, conv, first=first)
    return nn.Sequential(OrderedDict(cross=stage)) if first else stage


def _timm_rules(row: DarknetSpec) -> Sequence[KeyRule]:
    stem = "stem.cross." if row.cross_stage else "stem."
    block = r".blocks.block\1." if row.cross_stage else r".block\1."
    return (
        KeyRule(r"\.conv\.weight$", ".weight"),
        KeyRule(r"\.bn\.", ".norm."),
        KeyRule(r"^stages\.0\.", stem),
        *(KeyRule(rf"^stages\.{index}\.", f"res{index + 1}.") for index in range(1, 5)),
        KeyRule(r"\.blocks\.(\d+)\.", block),
        KeyRule(r"\.conv_down\.", ".down."),
        KeyRule(r"\.conv_exp\.", ".expand."),
        KeyRule(r"\.conv_transition_b\.", ".transition_blocks."),
        KeyRule(r"\.conv_transition\.", ".transition."),
    )


TIMM = Source(names={"darknet53_timm": "darknet53", "cspdarknet53": "cspdarknet53"}, rules=_timm_rules)


def _head_19(
    row: Darknet19Spec, shapes: Mapping[str, ShapeSpec], num_classes: int, *, dropout: float | None, norm: str
) -> nn.Module:
    return PointwiseHead(last_channels(shapes), num_classes, relu=False, dropout=dropout or 0.0)


FAMILY_19 = register_family(Family(name="darknet19", variants=VARIANTS_19, build=Darknet19, head=_head_19))
FAMILY = register_family(
    Family(name="darknet", variants=VARIANTS, build=Darknet, dilatable=True, sources={"timm": TIMM})
)


@BACKBONE_REGISTRY.register()
def build_imgcls_darknet19_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """Darknet-19."""
    return build_trunk(cfg, input_shape, FAMILY_19)


@BACKBONE_REGISTRY.register()
def build_imgcls_darknet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """Darknet-53 or CSPDarknet53, as ``MODEL.BACKBONE.VARIANT`` says."""
    return build_trunk(cfg, input_shape, FAMILY)
