"""MobileNetV2: Sandler et al. 2018, arXiv:1801.04381, table 2 (the network) and section 4 (width multiplier).

The 1x1 convolution to 1280 channels is in the head. Activations are ReLU6. For images of 28 to 64 pixels the small stem
leaves out the first stride. BatchNorm's epsilon and momentum are torchvision's (the paper gives none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

from imgcls.layers import InvertedResidual, NormFactory, conv_norm_act, divisible
from imgcls.modeling.backbone_base import Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import WideningHead, last_channels
from imgcls.modeling.inverted_residual_trunk import LINEAR_BOTTLENECK, InvertedResidualTrunk, block_names, timm_rules
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

STEM_CHANNELS = 32
LAST_CHANNELS = 1280
# Stage, then the columns of table 2: expansion factor t, output channels c, repetitions n, stride s of the first.
BOTTLENECKS = (
    ("stem", 1, 16, 1, 1),
    ("res2", 6, 24, 2, 2),
    ("res3", 6, 32, 3, 2),
    ("res4", 6, 64, 4, 2),
    ("res4", 6, 96, 3, 1),
    ("res5", 6, 160, 3, 2),
    ("res5", 6, 320, 1, 1),
)

relu6 = partial(F.relu6, inplace=True)


@dataclass(frozen=True)
class MobileNetV2Spec:
    """One row: the width multiplier of section 4 and BatchNorm's constants."""

    width: float
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "mobilenet_v2_0.25": MobileNetV2Spec(0.25),
    "mobilenet_v2_0.35": MobileNetV2Spec(0.35),
    "mobilenet_v2_0.5": MobileNetV2Spec(0.5),
    "mobilenet_v2_0.75": MobileNetV2Spec(0.75),
    "mobilenet_v2_1.0": MobileNetV2Spec(1.0),
    "mobilenet_v2_1.3": MobileNetV2Spec(1.3),
    "mobilenet_v2_1.4": MobileNetV2Spec(1.4),
    # torchvision's name of mobilenet_v2_1.0.
    "mobilenet_v2": MobileNetV2Spec(1.0),
}


class MobileNetV2(InvertedResidualTrunk):
    """Table 2 to its last bottleneck, as stages stem, res2 .. res5 of strides 2, 4 .. 32 (small stem: 1, 2 .. 16)."""

    def __init__(
        self,
        spec: MobileNetV2Spec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        channels = divisible(STEM_CHANNELS * spec.width)
        stem_stride = 1 if stem == "small" else 2
        conv1 = conv_norm_act(in_channels, channels, 3, norm=make_norm, activation=relu6, stride=stem_stride)
        blocks = []
        for stage, factor, width, repetitions, stride in BOTTLENECKS:
            out = divisible(width * spec.width)
            for index in range(repetitions):
                block = InvertedResidual(
                    channels,
                    out,
                    width=factor * channels,
                    norm=make_norm,
                    activation=relu6,
                    stride=1 if index else stride,
                )
                blocks.append((stage, block))
                channels = out
        super().__init__(conv1, blocks, out_features)


def last_width(width: float) -> int:
    """Channels of the head's convolution: multipliers below 1 leave it alone (section 4)."""
    return divisible(LAST_CHANNELS * max(1.0, width))


def make_head(
    row: MobileNetV2Spec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> nn.Module:
    """Table 2's last three rows; dropout as in torchvision."""
    return WideningHead(
        last_channels(shapes),
        num_classes,
        last_width(row.width),
        norm=NormFactory(norm, row.bn_eps, row.bn_momentum),
        activation=relu6,
        dropout=0.2 if dropout is None else dropout,
    )


GROUPS = [[stage] * repetitions for stage, _, _, repetitions, _ in BOTTLENECKS]
STAGES = [stage for group in GROUPS for stage in group]
# features.0 is the stem's convolution, features.18 the head's; in between one number for every block.
TORCHVISION_RULES = [
    KeyRule(r"^features\.0\.0\.", "stem.conv1."),
    KeyRule(r"^features\.0\.1\.", "stem.conv1.norm."),
    KeyRule(rf"^features\.{len(STAGES) + 1}\.0\.", "head.conv."),
    KeyRule(rf"^features\.{len(STAGES) + 1}\.1\.", "head.conv.norm."),
    KeyRule(r"^classifier\.1\.", "head.fc."),
    # The first block expands nothing: its depthwise convolution stands where the others' expansion does.
    KeyRule(r"^features\.1\.conv\.0\.0\.", "stem.block0.depthwise."),
    KeyRule(r"^features\.1\.conv\.0\.1\.", "stem.block0.depthwise.norm."),
    KeyRule(r"^features\.1\.conv\.1\.", "stem.block0.project."),
    KeyRule(r"^features\.1\.conv\.2\.", "stem.block0.project.norm."),
    KeyRule(r"\.conv\.0\.0\.", ".expand."),
    KeyRule(r"\.conv\.0\.1\.", ".expand.norm."),
    KeyRule(r"\.conv\.1\.0\.", ".depthwise."),
    KeyRule(r"\.conv\.1\.1\.", ".depthwise.norm."),
    KeyRule(r"\.conv\.2\.", ".project."),
    KeyRule(r"\.conv\.3\.", ".project.norm."),
    *(KeyRule(rf"^features\.{number}\.", f"{name}.") for number, name in enumerate(block_names(STAGES), start=1)),
]

FAMILY = register_family(
    Family(
        name="mobilenet_v2",
        variants=VARIANTS,
        build=MobileNetV2,
        head=make_head,
        stems=("standard", "small"),
        dilatable=True,
        without_gradient=LINEAR_BOTTLENECK,
        sources={
            "torchvision": Source(
                names=dict.fromkeys(VARIANTS, "mobilenet_v2"),
                rules=TORCHVISION_RULES,
                options=lambda row: {"width_mult": row.width},
            ),
            "timm": Source(
                names={
                    "mobilenet_v2_0.35": "mobilenetv2_035",
                    "mobilenet_v2_0.5": "mobilenetv2_050",
                    "mobilenet_v2_0.75": "mobilenetv2_075",
                    "mobilenet_v2_1.0": "mobilenetv2_100",
                    "mobilenet_v2_1.4": "mobilenetv2_140",
                    "mobilenet_v2": "mobilenetv2_100",
                },
                rules=timm_rules(GROUPS),
            ),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_mobilenet_v2_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """MobileNetV2 of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
