"""MnasNet: Tan et al. 2018, arXiv:1807.11626, figure 7 (A1) and the network found without squeeze-and-excitation (B1).

A1 is the paper's; B1, in its authors' release, is what torchvision calls MNASNet. The 1x1 convolution to 1280 channels
is in the head. torchvision's first version left the stem unscaled; its present one, and this, scale it.
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
from imgcls.modeling.inverted_residual_trunk import LINEAR_BOTTLENECK, InvertedResidualTrunk, timm_rules
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

STEM_CHANNELS = 32
LAST_CHANNELS = 1280


class Layers(NamedTuple):
    """One block of figure 7: MBConv<factor> (k<kernel>x<kernel>), x<repetitions>; SepConv is a factor of 1.

    stride: of the first layer. squeeze: hidden channels of the squeeze-and-excitation per input channel.
    """

    stage: str
    factor: int
    kernel: int
    out: int
    repetitions: int
    stride: int
    squeeze: float = 0.0


@dataclass(frozen=True)
class MnasNetSpec:
    """One network: its blocks, the paper's depth multiplier (it multiplies widths), BatchNorm's constants."""

    blocks: tuple[Layers, ...]
    width: float = 1.0
    bn_eps: float = 1e-5
    # A decay of 0.9997 (section 5 of the paper's first version, and torchvision) in torch's counting.
    bn_momentum: float = 1 - 0.9997


A1 = (
    Layers("stem", 1, 3, 16, 1, 1),
    Layers("res2", 6, 3, 24, 2, 2),
    Layers("res3", 3, 5, 40, 3, 2, 0.25),
    Layers("res4", 6, 3, 80, 4, 2),
    Layers("res4", 6, 3, 112, 2, 1, 0.25),
    Layers("res5", 6, 5, 160, 3, 2, 0.25),
    Layers("res5", 6, 3, 320, 1, 1),
)
B1 = (
    Layers("stem", 1, 3, 16, 1, 1),
    Layers("res2", 3, 3, 24, 3, 2),
    Layers("res3", 3, 5, 40, 3, 2),
    Layers("res4", 6, 5, 80, 3, 2),
    Layers("res4", 6, 3, 96, 2, 1),
    Layers("res5", 6, 5, 192, 4, 2),
    Layers("res5", 6, 3, 320, 1, 1),
)

VARIANTS = {
    "mnasnet0_5": MnasNetSpec(B1, 0.5),
    "mnasnet0_75": MnasNetSpec(B1, 0.75),
    "mnasnet1_0": MnasNetSpec(B1, 1.0),
    "mnasnet1_3": MnasNetSpec(B1, 1.3),
    "mnasnet_a1": MnasNetSpec(A1, bn_momentum=0.1),
}


class MnasNet(InvertedResidualTrunk):
    """Figure 7 up to the last MBConv, as stages stem, res2 .. res5 of strides 2, 4 .. 32."""

    def __init__(
        self,
        spec: MnasNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        channels = divisible(STEM_CHANNELS * spec.width)
        conv1 = conv_norm_act(in_channels, channels, 3, norm=make_norm, activation=F.relu_, stride=2)
        blocks = []
        for row in spec.blocks:
            out = divisible(row.out * spec.width)
            for index in range(row.repetitions):
                block = InvertedResidual(
                    channels,
                    out,
                    width=row.factor * channels,
                    norm=make_norm,
                    activation=F.relu_,
                    kernel=row.kernel,
                    stride=1 if index else row.stride,
                    squeezed=round(row.squeeze * channels),
                    residual=row.factor > 1,
                )
                blocks.append((row.stage, block))
                channels = out
        super().__init__(conv1, blocks, out_features)


def make_head(
    row: MnasNetSpec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> nn.Module:
    """1280 channels whatever the multiplier; dropout as in torchvision and in the authors' release."""
    return WideningHead(
        last_channels(shapes),
        num_classes,
        LAST_CHANNELS,
        norm=NormFactory(norm, row.bn_eps, row.bn_momentum),
        dropout=0.2 if dropout is None else dropout,
    )


def torchvision_rules() -> list[KeyRule]:
    """One Sequential: 0 to 7 are the stem, 8 to 13 stacks of blocks, 14 and 15 the head's convolution."""
    rules = [KeyRule(r"^layers\.14\.", "head.conv."), KeyRule(r"^layers\.15\.", "head.conv.norm.")]
    rules.append(KeyRule(r"^classifier\.1\.", "head.fc."))
    for index, ours in ((0, "stem.conv1"), (3, "stem.block0.depthwise"), (6, "stem.block0.project")):
        rules += [KeyRule(rf"^layers\.{index}\.", f"{ours}."), KeyRule(rf"^layers\.{index + 1}\.", f"{ours}.norm.")]
    for index, ours in ((0, "expand"), (3, "depthwise"), (6, "project")):
        rules += [KeyRule(rf"\.layers\.{index}\.", f".{ours}."), KeyRule(rf"\.layers\.{index + 1}\.", f".{ours}.norm.")]
    before: dict[str, int] = {}
    for stack, row in enumerate(B1[1:], start=8):
        first = before.get(row.stage, 0)
        for index in range(row.repetitions):
            rules.append(KeyRule(rf"^layers\.{stack}\.{index}\.", f"{row.stage}.block{first + index}."))
        before[row.stage] = first + row.repetitions
    return rules


FAMILY = register_family(
    Family(
        name="mnasnet",
        variants=VARIANTS,
        build=MnasNet,
        head=make_head,
        dilatable=True,
        without_gradient=LINEAR_BOTTLENECK,
        sources={
            "torchvision": Source(
                names={name: name for name, row in VARIANTS.items() if row.blocks is B1}, rules=torchvision_rules()
            ),
            "timm": Source(
                names={
                    "mnasnet0_5": "mnasnet_050",
                    "mnasnet0_75": "mnasnet_075",
                    "mnasnet1_0": "mnasnet_100",
                    "mnasnet_a1": "semnasnet_100",
                },
                rules=lambda spec: timm_rules([[row.stage] * row.repetitions for row in spec.blocks]),
            ),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_mnasnet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """MnasNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
