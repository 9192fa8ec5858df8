"""ShuffleNet V2: Ma et al. 2018, arXiv:1807.11164, table 5 and figure 3 (c, d), as torchvision has it.

Conv5 (the 1x1 to 1024 or 2048 channels) belongs to the head. BatchNorm's constants are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from imgcls.layers import NormFactory, conv_norm_act, conv_norm_relu
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import WideningHead, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

STEM_CHANNELS = 24
# Units of stages 2, 3, 4, here res3, res4, res5: one of stride 2, the rest of stride 1.
REPEATS = (4, 8, 4)


@dataclass(frozen=True)
class ShuffleNetV2Spec:
    """One column of table 5: the channels of stages 2, 3, 4 and of conv5, and BatchNorm's constants."""

    channels: tuple[int, int, int]
    head_width: int
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "shufflenet_v2_x0_5": ShuffleNetV2Spec((48, 96, 192), 1024),
    "shufflenet_v2_x1_0": ShuffleNetV2Spec((116, 232, 464), 1024),
    "shufflenet_v2_x1_5": ShuffleNetV2Spec((176, 352, 704), 1024),
    "shufflenet_v2_x2_0": ShuffleNetV2Spec((244, 488, 976), 2048),
}

TORCHVISION = Source(
    names={variant: variant for variant in VARIANTS},
    rules=(
        KeyRule(r"^fc\.", "head.fc."),
        KeyRule(r"^conv5\.0\.", "head.conv."),
        KeyRule(r"^conv5\.1\.", "head.conv.norm."),
        KeyRule(r"^conv1\.0\.", "stem.conv1."),
        KeyRule(r"^conv1\.1\.", "stem.conv1.norm."),
        KeyRule(r"^stage2\.", "res3."),
        KeyRule(r"^stage3\.", "res4."),
        KeyRule(r"^stage4\.", "res5."),
        KeyRule(r"^(res\d)\.(\d+)\.", r"\1.unit\2."),
        KeyRule(r"branch1\.0\.", "shortcut.depthwise."),
        KeyRule(r"branch1\.1\.", "shortcut.depthwise.norm."),
        KeyRule(r"branch1\.2\.", "shortcut.pointwise."),
        KeyRule(r"branch1\.3\.", "shortcut.pointwise.norm."),
        KeyRule(r"branch2\.0\.", "branch.pointwise1."),
        KeyRule(r"branch2\.1\.", "branch.pointwise1.norm."),
        KeyRule(r"branch2\.3\.", "branch.depthwise."),
        KeyRule(r"branch2\.4\.", "branch.depthwise.norm."),
        KeyRule(r"branch2\.5\.", "branch.pointwise2."),
        KeyRule(r"branch2\.6\.", "branch.pointwise2.norm."),
    ),
)


class SplitUnit(nn.Module):
    """Figure 3 (c): half of the channels pass, the other half is convolved, and both halves are interleaved."""

    def __init__(self, channels: int, *, norm: NormFactory) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, norm, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return interleave(kept, self.branch(changed))


class DownUnit(nn.Module):
    """Figure 3 (d): stride 2; both branches see all channels and make half of the output each."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: NormFactory) -> None:
        super().__init__()
        half = out_channels // 2
        self.shortcut = nn.Sequential(
            OrderedDict(
                depthwise=conv_norm_act(in_channels, in_channels, 3, norm=norm, stride=2, groups=in_channels),
                pointwise=conv_norm_relu(in_channels, half, 1, norm=norm),
            )
        )
        self.branch = _branch(in_channels, half, norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return interleave(self.shortcut(x), self.branch(x))


def _branch(in_channels: int, channels: int, norm: NormFactory, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            pointwise1=conv_norm_relu(in_channels, channels, 1, norm=norm),
            depthwise=conv_norm_act(channels, channels, 3, norm=norm, stride=stride, groups=channels),
            pointwise2=conv_norm_relu(channels, channels, 1, norm=norm),
        )
    )


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Channels of both in turn: concatenation and a channel shuffle with two groups."""
    return torch.stack([first, second], dim=2).flatten(1, 2)


class ShuffleNetV2(StagedTrunk):
    """Conv1 as stem (stride 2), the max pool as res2 (4), stages 2 to 4 as res3, res4, res5 (8, 16, 32)."""

    def __init__(
        self,
        spec: ShuffleNetV2Spec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        conv1 = conv_norm_relu(in_channels, STEM_CHANNELS, 3, norm=make_norm, stride=2)
        self.add_stage("stem", nn.Sequential(OrderedDict(conv1=conv1)), channels=STEM_CHANNELS, stride=2)
        pool = nn.MaxPool2d(3, 2, padding=1)
        self.add_stage("res2", nn.Sequential(OrderedDict(pool=pool)), channels=STEM_CHANNELS, stride=2)
        channels = STEM_CHANNELS
        for name, out, repeats in zip(("res3", "res4", "res5"), spec.channels, REPEATS, strict=True):
            units: OrderedDict[str, nn.Module] = OrderedDict(unit0=DownUnit(channels, out, norm=make_norm))
            units.update((f"unit{index}", SplitUnit(out, norm=make_norm)) for index in range(1, repeats))
            self.add_stage(name, nn.Sequential(units), channels=out, stride=2)
            channels = out
        self.keep(out_features)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, forward case; the paper names no initialisation.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


def _head(
    row: ShuffleNetV2Spec, shapes: Mapping[str, ShapeSpec], num_classes: int, *, dropout: float | None, norm: str
) -> nn.Module:
    make_norm = NormFactory(norm, row.bn_eps, row.bn_momentum)
    return WideningHead(last_channels(shapes), num_classes, row.head_width, norm=make_norm, dropout=dropout or 0.0)


FAMILY = register_family(
    Family(
        name="shufflenet_v2",
        variants=VARIANTS,
        build=ShuffleNetV2,
        head=_head,
        dilatable=True,
        without_gradient={
            "*.depthwise.norm.bias": "a constant in a channel is taken off by the BatchNorm behind the 1x1"
        },
        sources={"torchvision": TORCHVISION},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_shufflenet_v2_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """ShuffleNet V2 of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
