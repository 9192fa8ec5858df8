"""ShuffleNet: Zhang et al. 2017, arXiv:1707.01083, table 1 (scale 1x) and figure 2 (b, c).

The hidden channels of a unit are a quarter of its output (section 3.2). The first pointwise convolution of stage 2 is
not grouped (section 3.2: its 24 inputs are too few). BatchNorm's constants are torch's; the paper gives none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import NormFactory, conv_norm_act, conv_norm_relu
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, register_family

STEM_CHANNELS = 24
# Units of stages 2, 3, 4, here res3, res4, res5: one of stride 2, the rest of stride 1.
REPEATS = (4, 8, 4)


@dataclass(frozen=True)
class ShuffleNetV1Spec:
    """One column of table 1: the groups g, the channels of stages 2, 3, 4, and BatchNorm's constants."""

    groups: int
    channels: tuple[int, int, int]
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "shufflenet_v1_g1": ShuffleNetV1Spec(1, (144, 288, 576)),
    "shufflenet_v1_g2": ShuffleNetV1Spec(2, (200, 400, 800)),
    "shufflenet_v1_g3": ShuffleNetV1Spec(3, (240, 480, 960)),
    "shufflenet_v1_g4": ShuffleNetV1Spec(4, (272, 544, 1088)),
    "shufflenet_v1_g8": ShuffleNetV1Spec(8, (384, 768, 1536)),
}


class ShuffleUnit(nn.Module):
    """Figure 2: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to its input (b), or at stride 2 put behind
    the averaged input (c), so that the convolutions make only the channels that are still wanted."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        norm: NormFactory,
        stride: int = 1,
        first_groups: int | None = None,
    ) -> None:
        super().__init__()
        hidden = out_channels // 4
        self.groups = groups
        self.average = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else None
        own = out_channels - in_channels if stride > 1 else out_channels
        first = groups if first_groups is None else first_groups
        self.pointwise1 = conv_norm_relu(in_channels, hidden, 1, norm=norm, groups=first)
        self.depthwise = conv_norm_act(hidden, hidden, 3, norm=norm, stride=stride, groups=hidden)
        self.pointwise2 = conv_norm_act(hidden, own, 1, norm=norm, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle_channels(self.pointwise1(x), self.groups)
        y = self.pointwise2(self.depthwise(y))
        return F.relu_(x + y if self.average is None else torch.cat([self.average(x), y], dim=1))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Section 3.1: (N, g * n, H, W) seen as (g, n) channels, transposed to (n, g)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleNetV1(StagedTrunk):
    """Conv1 as stem (stride 2), the max pool as res2 (4), stages 2 to 4 as res3, res4, res5 (8, 16, 32)."""

    def __init__(
        self,
        spec: ShuffleNetV1Spec,
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
            first = 1 if name == "res3" else spec.groups
            units: OrderedDict[str, nn.Module] = OrderedDict()
            units["unit0"] = ShuffleUnit(
                channels, out, groups=spec.groups, norm=make_norm, stride=2, first_groups=first
            )
            for index in range(1, repeats):
                units[f"unit{index}"] = ShuffleUnit(out, out, groups=spec.groups, norm=make_norm)
            self.add_stage(name, nn.Sequential(units), channels=out, stride=2)
            channels = out
        self.keep(out_features)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, forward case; the paper names no initialisation.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


# Not dilatable: the shortcut of the units of stride 2 is a pool.
FAMILY = register_family(
    Family(
        name="shufflenet_v1",
        variants=VARIANTS,
        build=ShuffleNetV1,
        without_gradient={
            "*.depthwise.norm.bias": "a constant in a channel is taken off by the BatchNorm behind the 1x1"
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_shufflenet_v1_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """ShuffleNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
