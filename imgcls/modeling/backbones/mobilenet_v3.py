"""MobileNetV3: Howard et al. 2019, arXiv:1905.02244, tables 1 (large) and 2 (small).

The last 1x1 convolution and the hidden layer are in the head. For images of 28 to 64 pixels the small stem leaves out
the first stride. timm's networks of this name are no source of weights: theirs were trained with another epsilon
(mobilenetv3_*) or another padding (tf_mobilenetv3_*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

from imgcls.layers import InvertedResidual, NormFactory, conv_norm_act, divisible
from imgcls.modeling.backbone_base import Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import WideningHead, last_channels
from imgcls.modeling.inverted_residual_trunk import LINEAR_BOTTLENECK, InvertedResidualTrunk, block_names
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

STEM_CHANNELS = 16


class Bneck(NamedTuple):
    """One row of the tables. nonlinearity: "HS" (h-swish) or "RE" (ReLU)."""

    stage: str
    kernel: int
    exp_size: int
    out: int
    squeeze_excite: bool
    nonlinearity: str
    stride: int


@dataclass(frozen=True)
class MobileNetV3Spec:
    """One table: its bneck rows, the width of the last convolution, that of the hidden layer; BatchNorm's constants."""

    bnecks: tuple[Bneck, ...]
    last: int
    hidden: int
    bn_eps: float = 1e-3
    bn_momentum: float = 0.01


LARGE = (
    Bneck("stem", 3, 16, 16, False, "RE", 1),
    Bneck("res2", 3, 64, 24, False, "RE", 2),
    Bneck("res2", 3, 72, 24, False, "RE", 1),
    Bneck("res3", 5, 72, 40, True, "RE", 2),
    Bneck("res3", 5, 120, 40, True, "RE", 1),
    Bneck("res3", 5, 120, 40, True, "RE", 1),
    Bneck("res4", 3, 240, 80, False, "HS", 2),
    Bneck("res4", 3, 200, 80, False, "HS", 1),
    Bneck("res4", 3, 184, 80, False, "HS", 1),
    Bneck("res4", 3, 184, 80, False, "HS", 1),
    Bneck("res4", 3, 480, 112, True, "HS", 1),
    Bneck("res4", 3, 672, 112, True, "HS", 1),
    Bneck("res5", 5, 672, 160, True, "HS", 2),
    Bneck("res5", 5, 960, 160, True, "HS", 1),
    Bneck("res5", 5, 960, 160, True, "HS", 1),
)
SMALL = (
    Bneck("res2", 3, 16, 16, True, "RE", 2),
    Bneck("res3", 3, 72, 24, False, "RE", 2),
    Bneck("res3", 3, 88, 24, False, "RE", 1),
    Bneck("res4", 5, 96, 40, True, "HS", 2),
    Bneck("res4", 5, 240, 40, True, "HS", 1),
    Bneck("res4", 5, 240, 40, True, "HS", 1),
    Bneck("res4", 5, 120, 48, True, "HS", 1),
    Bneck("res4", 5, 144, 48, True, "HS", 1),
    Bneck("res5", 5, 288, 96, True, "HS", 2),
    Bneck("res5", 5, 576, 96, True, "HS", 1),
    Bneck("res5", 5, 576, 96, True, "HS", 1),
)

VARIANTS = {
    "mobilenet_v3_small": MobileNetV3Spec(SMALL, last=576, hidden=1024),
    "mobilenet_v3_large": MobileNetV3Spec(LARGE, last=960, hidden=1280),
}


class MobileNetV3(InvertedResidualTrunk):
    """The tables up to the last bneck, as stages stem, res2 .. res5 of strides 2, 4 .. 32 (small stem: 1, 2 .. 16)."""

    def __init__(
        self,
        spec: MobileNetV3Spec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        stem_stride = 1 if stem == "small" else 2
        conv1 = conv_norm_act(in_channels, STEM_CHANNELS, 3, norm=make_norm, activation=F.hardswish, stride=stem_stride)
        channels, blocks = STEM_CHANNELS, []
        for row in spec.bnecks:
            block = InvertedResidual(
                channels,
                row.out,
                width=row.exp_size,
                norm=make_norm,
                activation=F.hardswish if row.nonlinearity == "HS" else F.relu_,
                kernel=row.kernel,
                stride=row.stride,
                squeezed=squeezed(row.exp_size) if row.squeeze_excite else 0,
                gate=nn.Hardsigmoid,
            )
            blocks.append((row.stage, block))
            channels = row.out
        super().__init__(conv1, blocks, out_features)


def squeezed(exp_size: int) -> int:
    """Hidden channels of the squeeze-and-excitation: a quarter of the expansion's (section 5.3)."""
    return divisible(exp_size / 4)


def make_head(
    row: MobileNetV3Spec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> nn.Module:
    """The tables' rows behind the last bneck; dropout as in torchvision."""
    return WideningHead(
        last_channels(shapes),
        num_classes,
        row.last,
        norm=NormFactory(norm, row.bn_eps, row.bn_momentum),
        activation=F.hardswish,
        hidden=row.hidden,
        dropout=0.2 if dropout is None else dropout,
    )


def torchvision_rules(row: MobileNetV3Spec) -> list[KeyRule]:
    """features.0 is the stem's convolution, the last the head's; in between one number for every bneck."""
    last = len(row.bnecks) + 1
    rules = [
        KeyRule(r"^features\.0\.0\.", "stem.conv1."),
        KeyRule(r"^features\.0\.1\.", "stem.conv1.norm."),
        KeyRule(rf"^features\.{last}\.0\.", "head.conv."),
        KeyRule(rf"^features\.{last}\.1\.", "head.conv.norm."),
        KeyRule(r"^classifier\.0\.", "head.hidden."),
        KeyRule(r"^classifier\.3\.", "head.fc."),
    ]
    names, channels = block_names(bneck.stage for bneck in row.bnecks), STEM_CHANNELS
    for number, (name, bneck) in enumerate(zip(names, row.bnecks, strict=True), start=1):
        parts = ["expand"] if bneck.exp_size != channels else []
        parts += ["depthwise", "se", "project"] if bneck.squeeze_excite else ["depthwise", "project"]
        for index, part in enumerate(parts):
            theirs = rf"^features\.{number}\.block\.{index}\."
            rules += [KeyRule(rf"{theirs}0\.", f"{name}.{part}."), KeyRule(rf"{theirs}1\.", f"{name}.{part}.norm.")]
            rules.append(KeyRule(theirs, f"{name}.{part}."))
        channels = bneck.out
    return rules


FAMILY = register_family(
    Family(
        name="mobilenet_v3",
        variants=VARIANTS,
        build=MobileNetV3,
        head=make_head,
        stems=("standard", "small"),
        dilatable=True,
        without_gradient=LINEAR_BOTTLENECK,
        sources={"torchvision": Source(names={name: name for name in VARIANTS}, rules=torchvision_rules)},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_mobilenet_v3_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """MobileNetV3 of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
