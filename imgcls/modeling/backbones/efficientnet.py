"""EfficientNet: Tan and Le 2019, arXiv:1905.11946, table 1 scaled as in section 3.3; and EfficientNet-Lite.

The widths and depths of B1 to B7 are the release's (table 2 prints what comes out of them: parameters and
multiply-adds); powers of the paper's alpha and beta are near them only. B5 to B7 have the BatchNorm constants of the
release, B0 to B4 torch's, as in torchvision.

The Lite networks are a later release of the same authors (tensorflow/tpu, models/official/efficientnet/lite), with no
paper: no squeeze-and-excitation, ReLU6 for SiLU, stem, head and the repeats of the first and last stage not scaled.
They are padded as there, by TensorFlow's "same" rule, which the published weights need; timm calls these networks
``tf_efficientnet_lite0`` and its ``efficientnet_lite0``, which is padded symmetrically, is another.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

from imgcls.layers import (
    FusedInvertedResidual,
    InvertedResidual,
    NormFactory,
    conv_norm_act,
    divisible,
    fill_conv,
    same_conv_norm_act,
)
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.backbones.efficientnet_keys import LITE_PYTORCH, TIMM, TORCHVISION, Spelling
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import WideningHead, last_channels
from imgcls.modeling.inverted_residual_trunk import LINEAR_BOTTLENECK
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

ACTIVATIONS = {"silu": F.silu, "relu6": partial(F.relu6, inplace=True)}
CONVOLUTIONS = {"symmetric": conv_norm_act, "same": same_conv_norm_act}


@dataclass(frozen=True)
class Line:
    """One line of the paper's table: ``repeats`` blocks, of which the first has the stride; part of ``feature``.

    expansion: width of a block's inside over that of its input. fused: Fused-MBConv instead of MBConv.
    """

    feature: str
    expansion: int
    kernel: int
    stride: int
    channels: int
    repeats: int
    fused: bool = False


@dataclass(frozen=True)
class EfficientNetSpec:
    """One network: channels of the stem, the table, channels of the head's convolution, and what goes with them.

    resolution: side of the images that the network was scaled for.
    """

    stem: int
    lines: tuple[Line, ...]
    head: int
    resolution: int
    dropout: float
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    squeeze: bool = True
    activation: str = "silu"
    padding: str = "symmetric"


# Table 1, stages 2 to 8.
B0 = (
    Line("stem", 1, 3, 1, 16, 1),
    Line("res2", 6, 3, 2, 24, 2),
    Line("res3", 6, 5, 2, 40, 2),
    Line("res4", 6, 3, 2, 80, 3),
    Line("res4", 6, 5, 1, 112, 3),
    Line("res5", 6, 5, 2, 192, 4),
    Line("res5", 6, 3, 1, 320, 1),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280


def scaled(lines: Sequence[Line], width: float, depth: float, *, fixed_ends: bool = False) -> tuple[Line, ...]:
    """Section 3.3: channels times ``width`` to multiples of 8, repeats times ``depth``, rounded up.

    fixed_ends: the first and the last line keep their repeats (EfficientNet-Lite).
    """
    ends = (lines[0], lines[-1]) if fixed_ends else ()
    return tuple(
        replace(
            line,
            channels=divisible(line.channels * width),
            repeats=line.repeats if line in ends else math.ceil(line.repeats * depth),
        )
        for line in lines
    )


def _b(width: float, depth: float, resolution: int, dropout: float, **norm: float) -> EfficientNetSpec:
    stem, head = divisible(STEM_CHANNELS * width), divisible(HEAD_CHANNELS * width)
    return EfficientNetSpec(stem, scaled(B0, width, depth), head, resolution, dropout, **norm)


def _lite(width: float, depth: float, resolution: int, dropout: float) -> EfficientNetSpec:
    return EfficientNetSpec(
        STEM_CHANNELS,
        scaled(B0, width, depth, fixed_ends=True),
        HEAD_CHANNELS,
        resolution,
        dropout,
        bn_eps=1e-3,
        bn_momentum=0.01,
        squeeze=False,
        activation="relu6",
        padding="same",
    )


VARIANTS = {
    "efficientnet_b0": _b(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": _b(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": _b(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": _b(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": _b(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": _b(1.6, 2.2, 456, 0.4, bn_eps=1e-3, bn_momentum=0.01),
    "efficientnet_b6": _b(1.8, 2.6, 528, 0.5, bn_eps=1e-3, bn_momentum=0.01),
    "efficientnet_b7": _b(2.0, 3.1, 600, 0.5, bn_eps=1e-3, bn_momentum=0.01),
    "efficientnet_lite0": _lite(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": _lite(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": _lite(1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": _lite(1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": _lite(1.4, 1.8, 300, 0.3),
}


@dataclass(frozen=True)
class Block:
    """One block of a network, the child ``name`` of the stage ``line.feature``.

    place: how many lines stand before its own, how many blocks before it in the line, how many in the network.
    """

    line: Line
    name: str
    place: tuple[int, int, int]
    in_channels: int
    stride: int

    @property
    def kind(self) -> str:
        """The key of the spelling tables: mb, fused, or mb1 and fused1 where nothing is expanded."""
        return ("fused" if self.line.fused else "mb") + ("1" if self.line.expansion == 1 else "")


def blocks_of(spec: EfficientNetSpec) -> list[Block]:
    """Every block of the network in order."""
    blocks: list[Block] = []
    channels = spec.stem
    for number, line in enumerate(spec.lines):
        for index in range(line.repeats):
            before = sum(block.line.feature == line.feature for block in blocks)
            place = (number, index, len(blocks))
            blocks.append(Block(line, f"block{before}", place, channels, line.stride if index == 0 else 1))
            channels = line.channels
    return blocks


class EfficientNet(StagedTrunk):
    """The body up to the last block, as stages stem, res2 .. res5 of strides 2, 4 .. 32 (small stem: 1, 2 .. 16).

    A stage ends where the next stride follows: in B0 with 16, 24, 40, 112 and 320 channels.

    drop_path: probability of dropping a block grows over all blocks from 0 towards it (the last has one step less).
    """

    def __init__(
        self,
        spec: EfficientNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        first = CONVOLUTIONS[spec.padding](
            in_channels,
            spec.stem,
            3,
            norm=make_norm,
            activation=ACTIVATIONS[spec.activation],
            stride=1 if stem == "small" else 2,
        )
        blocks = blocks_of(spec)
        for name in dict.fromkeys(block.line.feature for block in blocks):
            layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=first) if name == "stem" else OrderedDict()
            stride = first.stride[0] if name == "stem" else 1
            for block in (block for block in blocks if block.line.feature == name):
                dropped = drop_path * block.place[2] / len(blocks)
                layers[block.name] = _make(block, spec, make_norm, dropped)
                channels, stride = block.line.channels, stride * block.stride
            self.add_stage(name, nn.Sequential(layers), channels=channels, stride=stride)
        self.keep(out_features)
        # The release's initialisation: normal, by the outgoing connections of one group.
        self.apply(fill_conv)


def _make(block: Block, spec: EfficientNetSpec, norm: NormFactory, drop_path: float) -> nn.Module:
    line = block.line
    kind: Callable[..., nn.Module] = FusedInvertedResidual
    if not line.fused:
        # Table 1's SE: a quarter of the block's input, not of its inside.
        squeezed = block.in_channels // 4 if spec.squeeze else 0
        kind = partial(InvertedResidual, squeezed=squeezed, squeeze_activation=nn.SiLU)
    return kind(
        block.in_channels,
        line.channels,
        width=line.expansion * block.in_channels,
        norm=norm,
        activation=ACTIVATIONS[spec.activation],
        kernel=line.kernel,
        stride=block.stride,
        drop_path=drop_path,
        conv=CONVOLUTIONS[spec.padding],
    )


def efficientnet_head(
    row: EfficientNetSpec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> nn.Module:
    """Table 1, stage 9: a 1x1 convolution, pooling, dropout, the classifier."""
    return WideningHead(
        last_channels(shapes),
        num_classes,
        row.head,
        norm=NormFactory(norm, row.bn_eps, row.bn_momentum),
        activation=ACTIVATIONS[row.activation],
        dropout=row.dropout if dropout is None else dropout,
    )


def rules_of(spelling: Spelling) -> Callable[[EfficientNetSpec], list[KeyRule]]:
    """The key rules of a library, as a function of the row."""
    return lambda row: spelling.rules(blocks_of(row))


FAMILY = register_family(
    Family(
        name="efficientnet",
        variants=VARIANTS,
        build=EfficientNet,
        head=efficientnet_head,
        options=("drop_path",),
        stems=("standard", "small"),
        dilatable=True,
        without_gradient=LINEAR_BOTTLENECK,
        sources={
            "torchvision": Source(
                names={name: name for name in VARIANTS if "lite" not in name}, rules=rules_of(TORCHVISION)
            ),
            # timm trains B5 to B7 with another epsilon: their weights would mean something else here.
            "timm": Source(
                names={
                    name: f"tf_{name}" if "lite" in name else name
                    for name, row in VARIANTS.items()
                    if "lite" in name or row.bn_eps == 1e-5
                },
                rules=rules_of(TIMM),
            ),
            "efficientnet_lite_pytorch": Source(
                names={name: name.replace("_", "-") for name in VARIANTS if "lite" in name},
                rules=rules_of(LITE_PYTORCH),
                # Otherwise it pads as for images of the network's resolution, whatever comes.
                options={"image_size": None},
                sizes=(64, 75),
            ),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_efficientnet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """EfficientNet or EfficientNet-Lite of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
