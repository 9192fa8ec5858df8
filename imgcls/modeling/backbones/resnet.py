"""ResNet: He et al. 2015, arXiv:1512.03385, table 1, and its kin, through detectron2's own class and with its keys.

ResNeXt: Xie et al. 2016, arXiv:1611.05431, table 1 (its other sizes are torchvision's). Wide: Zagoruyko and Komodakis
2016, arXiv:1605.07146, table 8. SE: Hu et al. 2017, arXiv:1709.01507, table 1. D: He et al. 2018, arXiv:1812.01187,
figure 2 and section 4.2 for the deep stem.

As in torchvision the stride of a bottleneck stands in its 3x3 convolution ("v1.5"; detectron2's default for its own
caffe weights is the 1x1). The small stem for images of 28 to 64 pixels is section 4.2's of the first paper: a 3x3 of
stride 1, no pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, CNNBlockBase, ResNet
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation, StochasticDepth

from imgcls.layers import NormFactory, conv_norm_relu
from imgcls.modeling.backbone_base import Trunk, require_maps
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

STEM_CHANNELS = 64
FEATURES = ("stem", "res2", "res3", "res4", "res5")
# Hu et al. 2017, section 6.1: the channels between the two layers of an SE block are a 16th.
SE_REDUCTION = 16


@dataclass(frozen=True)
class ResNetSpec:
    """One column of table 1, and what its successors changed.

    bottleneck: 1x1, 3x3, 1x1 with four times the channels at the end, rather than two 3x3.
    blocks: how many in res2, res3, res4, res5.
    groups, width: groups of a bottleneck's 3x3 convolution, and their channels in res2 (each later stage has twice).
    se: squeeze-and-excitation at the end of every residual branch.
    deep: "D": three 3x3 convolutions in the stem, and shortcuts that average before they lose resolution.
    """

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    groups: int = 1
    width: int = 64
    se: bool = False
    deep: bool = False
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "resnet18": ResNetSpec(False, (2, 2, 2, 2)),
    "resnet34": ResNetSpec(False, (3, 4, 6, 3)),
    "resnet50": ResNetSpec(True, (3, 4, 6, 3)),
    "resnet101": ResNetSpec(True, (3, 4, 23, 3)),
    "resnet152": ResNetSpec(True, (3, 8, 36, 3)),
    "resnet50_d": ResNetSpec(True, (3, 4, 6, 3), deep=True),
    "resnext50_32x4d": ResNetSpec(True, (3, 4, 6, 3), groups=32, width=4),
    "resnext101_32x8d": ResNetSpec(True, (3, 4, 23, 3), groups=32, width=8),
    "resnext101_64x4d": ResNetSpec(True, (3, 4, 23, 3), groups=64, width=4),
    "wide_resnet50_2": ResNetSpec(True, (3, 4, 6, 3), width=128),
    "wide_resnet101_2": ResNetSpec(True, (3, 4, 23, 3), width=128),
    "se_resnet50": ResNetSpec(True, (3, 4, 6, 3), se=True),
    "se_resnet101": ResNetSpec(True, (3, 4, 23, 3), se=True),
    "se_resnet152": ResNetSpec(True, (3, 8, 36, 3), se=True),
    "se_resnext50_32x4d": ResNetSpec(True, (3, 4, 6, 3), groups=32, width=4, se=True),
}

_BODY_RULES = (
    *(KeyRule(rf"^layer{stage - 1}\.", f"res{stage}.") for stage in (2, 3, 4, 5)),
    KeyRule(r"\.bn([123])\.", r".conv\1.norm."),
    KeyRule(r"\.downsample\.0\.", ".shortcut."),
    KeyRule(r"\.downsample\.1\.", ".shortcut.norm."),
    KeyRule(r"^fc\.", "head.fc."),
)
_STEM_RULES = (KeyRule(r"^conv1\.", "stem.conv1."), KeyRule(r"^bn1\.", "stem.conv1.norm."))
# The stem's convolutions, norms and ReLUs are numbered through, and so are a shortcut's pool, convolution and norm.
_DEEP_RULES = (
    KeyRule(r"^conv1\.0\.", "stem.conv1."),
    KeyRule(r"^conv1\.1\.", "stem.conv1.norm."),
    KeyRule(r"^conv1\.3\.", "stem.conv2."),
    KeyRule(r"^conv1\.4\.", "stem.conv2.norm."),
    KeyRule(r"^conv1\.6\.", "stem.conv3."),
    KeyRule(r"^bn1\.", "stem.conv3.norm."),
    KeyRule(r"\.downsample\.1\.", ".shortcut."),
    KeyRule(r"\.downsample\.2\.", ".shortcut.norm."),
)

IN_TORCHVISION = {name: name for name, row in VARIANTS.items() if not (row.se or row.deep)}
IN_TIMM = {
    **IN_TORCHVISION,
    "resnet50_d": "resnet50d",
    "se_resnet50": "seresnet50",
    "se_resnet101": "seresnet101",
    "se_resnet152": "seresnet152",
    "se_resnext50_32x4d": "seresnext50_32x4d",
}


class SmallStem(CNNBlockBase):
    """3x3, stride 1, no pooling; its key is that of detectron2's BasicStem, its kernel is not."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, bias=False, norm=norm(out_channels))
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv1(x))


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions in the 7x7's place; the keys are those of the stem in detectron2's DeepLab project."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__(in_channels, out_channels, 4)
        half = out_channels // 2
        self.conv1 = conv_norm_relu(in_channels, half, 3, norm=norm, stride=2)
        self.conv2 = conv_norm_relu(half, half, 3, norm=norm)
        self.conv3 = conv_norm_relu(half, out_channels, 3, norm=norm)
        for conv in (self.conv1, self.conv2, self.conv3):
            weight_init.c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Ending:
    """Put before detectron2's block among a class's bases: SE, stochastic depth, and the sum with the shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, *, se: bool, deep: bool, drop_path: float, stride: int, **others: Any
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, **others)
        self.se = _squeeze_excitation(out_channels) if se else None
        self.drop_path = StochasticDepth(drop_path, "row")
        self.averages = deep and stride > 1
        if self.averages:
            self.shortcut.stride = (1, 1)

    def end(self, x: Tensor, branch: Tensor, strided: nn.Conv2d) -> Tensor:
        """x: the block's input; branch: what its convolutions made of it; strided: the one of them with the stride."""
        if self.se is not None:
            branch = self.se(branch)
        branch = self.drop_path(branch)
        if self.averages:
            # In a dilated stage ``strided`` has lost its stride, and its dilation is that of the stage in front.
            x = _averaged(x, strided.stride[0], strided.dilation[0])
        branch += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(branch)


class Basic(Ending, BasicBlock):
    """detectron2's BasicBlock with an :class:`Ending`; its keys, and ``se.*`` where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x, self.conv2(F.relu_(self.conv1(x))), strided=self.conv1)


class Bottleneck(Ending, BottleneckBlock):
    """detectron2's BottleneckBlock with an :class:`Ending`; its keys, and ``se.*`` where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu_(self.conv1(x))
        branch = F.relu_(self.conv2(branch))
        return self.end(x, self.conv3(branch), strided=self.conv2)


class ResNetTrunk(Trunk, ResNet):
    """detectron2's ResNet (its keys and initialisation) with imgcls' freezing, checkpointing and arrival check.

    drop_path: probability that the last block's branch is left out of an image; grows linearly from 0 at the first
        (Huang et al. 2016, arXiv:1603.09382, section 3).
    """

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
        drop_path: float = 0.0,
    ) -> None:
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        stem_class = SmallStem if stem == "small" else DeepStem if spec.deep else BasicStem
        ResNet.__init__(
            self,
            stem_class(in_channels, STEM_CHANNELS, make_norm),
            _stages(spec, make_norm, drop_path),
            out_features=_known(out_features),
        )

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        return [(name, getattr(self, name)) for name in ("stem", *self.stage_names)]


def _known(out_features: Sequence[str] | None) -> list[str]:
    wanted = list(out_features or FEATURES[-1:])
    require_maps("a ResNet", wanted, FEATURES)
    return wanted


def _stages(spec: ResNetSpec, norm: NormFactory, drop_path: float) -> list[list[CNNBlockBase]]:
    stages, channels, before = [], STEM_CHANNELS, 0
    for index, blocks in enumerate(spec.blocks):
        out = 64 * 2**index
        kind: dict[str, Any] = {"block_class": Basic}
        if spec.bottleneck:
            out *= 4
            kind = {
                "block_class": Bottleneck,
                "bottleneck_channels": spec.groups * spec.width * 2**index,
                "num_groups": spec.groups,
                "stride_in_1x1": False,
            }
        stages.append(
            ResNet.make_stage(
                num_blocks=blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                drop_path_per_block=[drop_path * (before + i) / (sum(spec.blocks) - 1) for i in range(blocks)],
                in_channels=channels,
                out_channels=out,
                norm=norm,
                se=spec.se,
                deep=spec.deep,
                **kind,
            )
        )
        channels, before = out, before + blocks
    return stages


def _squeeze_excitation(channels: int) -> SqueezeExcitation:
    layer = SqueezeExcitation(channels, channels // SE_REDUCTION)
    for conv in (layer.fc1, layer.fc2):
        weight_init.c2_msra_fill(conv)
    return layer


def _averaged(x: Tensor, stride: int, apart: int) -> Tensor:
    """The mean of 2x2 pixels ``apart`` pixels apart; of a window that reaches over the edge, what is inside it.

    stride 2: plain pooling. stride 1: at every pixel, for stages that are dilated instead of losing resolution; at the
    pixels that pooling keeps it gives the same.
    """
    if stride == 2:
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    for axis in (2, 3):
        size = x.shape[axis]
        step = min(apart, size)
        partner = torch.cat([x.narrow(axis, step, size - step), x.narrow(axis, size - step, step)], axis)
        x = (x + partner) / 2
    return x


def _rules(row: ResNetSpec) -> tuple[KeyRule, ...]:
    return (*(_DEEP_RULES if row.deep else _STEM_RULES), *_BODY_RULES)


FAMILY = register_family(
    Family(
        name="resnet",
        variants=VARIANTS,
        build=ResNetTrunk,
        options=("drop_path",),
        stems=("standard", "small"),
        dilatable=True,
        sources={
            "torchvision": Source(IN_TORCHVISION, _rules),
            "timm": Source(IN_TIMM, _rules),
            # What its tools/convert-torchvision-to-d2.py writes: its own keys, but with the classifier in the stem.
            "detectron2": Source(IN_TORCHVISION, (KeyRule(r"^stem\.fc\.", "head.fc."),)),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_resnet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """ResNet of ``MODEL.BACKBONE.VARIANT``; ``MODEL.RESNETS`` is not read."""
    return build_trunk(cfg, input_shape, FAMILY)
