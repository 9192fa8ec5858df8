"""ConvNeXt: Liu et al. 2022, arXiv:2201.03545, section 3 (the list of ConvNeXt-T/S/B/L) and table 9.

The 1x1 convolutions of a block are linear layers over the last axis: from the first LayerNorm on every map lies pixel
by pixel in memory, so turning the axes round costs nothing and torch picks its channels-last kernels.
Convolutions with a stride do not pad: a map has floor(height / stride) rows, as in the authors' release.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import LayerNormHead, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

LAYER_NORM_EPS = 1e-6
LAYER_SCALE = 1e-6  # appendix A.1, table 5: its initial value


@dataclass(frozen=True)
class ConvNeXtSpec:
    """One row of section 3's list: channels C and blocks B of res2, res3, res4, res5."""

    channels: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    own_norm: str = "LN"


VARIANTS = {
    "convnext_tiny": ConvNeXtSpec((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ConvNeXtSpec((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ConvNeXtSpec((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": ConvNeXtSpec((192, 384, 768, 1536), (3, 3, 27, 3)),
}

_TORCHVISION_BLOCK = (
    KeyRule(r"\.block\.0\.", ".depthwise."),
    KeyRule(r"\.block\.2\.", ".norm."),
    KeyRule(r"\.block\.3\.", ".widen."),
    KeyRule(r"\.block\.5\.", ".narrow."),
    KeyRule(r"\.layer_scale$", ".gamma", change="to_linear"),
)
TORCHVISION_RULES = (
    *_TORCHVISION_BLOCK,
    KeyRule(r"^features\.0\.0\.", "stem.conv."),
    KeyRule(r"^features\.0\.1\.", "stem.norm."),
    *(KeyRule(rf"^features\.{2 * i + 1}\.(\d+)\.", rf"res{i + 2}.block\1.") for i in range(4)),
    *(KeyRule(rf"^features\.{2 * i}\.0\.", f"res{i + 2}.downsample.norm.") for i in range(1, 4)),
    *(KeyRule(rf"^features\.{2 * i}\.1\.", f"res{i + 2}.downsample.conv.") for i in range(1, 4)),
    KeyRule(r"^classifier\.0\.", "head.norm."),
    KeyRule(r"^classifier\.2\.", "head.fc."),
)
TIMM_RULES = (
    KeyRule(r"^stem\.0\.", "stem.conv."),
    KeyRule(r"^stem\.1\.", "stem.norm."),
    *(KeyRule(rf"^stages\.{i}\.", f"res{i + 2}.") for i in range(4)),
    KeyRule(r"\.downsample\.0\.", ".downsample.norm."),
    KeyRule(r"\.downsample\.1\.", ".downsample.conv."),
    KeyRule(r"\.blocks\.(\d+)\.", r".block\1."),
    KeyRule(r"\.conv_dw\.", ".depthwise."),
    KeyRule(r"\.mlp\.fc1\.", ".widen."),
    KeyRule(r"\.mlp\.fc2\.", ".narrow."),
)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), pixel by pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A 7x7 on each channel, LayerNorm, two linear layers with GELU between, layer scale (figure 4)."""

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.widen(y)))
        # The sum takes the memory layout of its first term.
        return self.drop_path(y.permute(0, 3, 1, 2)) + x


class ConvNeXt(StagedTrunk):
    """Stages stem (4x4 patches), res2 .. res5 of strides 4, 4, 8, 16, 32; the last norm is the head's."""

    def __init__(
        self,
        spec: ConvNeXtSpec,
        *,
        in_channels: int = 3,
        norm: str = "LN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        channels = spec.channels[0]
        patches = OrderedDict(conv=nn.Conv2d(in_channels, channels, 4, stride=4), norm=ChannelNorm(channels))
        self.add_stage("stem", nn.Sequential(patches), channels=channels, stride=4)
        depth = sum(spec.blocks)
        rates = iter([drop_path * block / (depth - 1) for block in range(depth)])
        for index, (width, blocks) in enumerate(zip(spec.channels, spec.blocks, strict=True)):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if index > 0:
                conv = nn.Conv2d(channels, width, 2, stride=2)
                layers["downsample"] = nn.Sequential(OrderedDict(norm=ChannelNorm(channels), conv=conv))
            for block in range(blocks):
                layers[f"block{block}"] = ConvNeXtBlock(width, next(rates))
            self.add_stage(f"res{index + 2}", nn.Sequential(layers), channels=width, stride=2 if index else 1)
            channels = width
        self.keep(out_features)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # The authors' release: truncated Gaussians of deviation 0.02, no biases.
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _head(
    row: ConvNeXtSpec, shapes: Mapping[str, Any], num_classes: int, *, dropout: float | None, norm: str
) -> nn.Module:
    return LayerNormHead(last_channels(shapes), num_classes, norm_first=False, dropout=dropout or 0.0)


FAMILY = register_family(
    Family(
        name="convnext",
        variants=VARIANTS,
        build=ConvNeXt,
        head=_head,
        options=("drop_path",),
        sources={
            "torchvision": Source({name: name for name in VARIANTS}, TORCHVISION_RULES),
            "timm": Source({name: name for name in VARIANTS}, TIMM_RULES),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_convnext_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """ConvNeXt of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
