"""RegNet: Radosavovic et al. 2020, arXiv:2003.13678, figures 15 (X) and 16 (Y), through detectron2's own class.

X has no squeeze-and-excitation, Y has it in every block. The numbers are those of the authors' configurations, of which
the paper prints some rounded. Keys are detectron2's (``s1`` to ``s4``); the maps are called res2 to res5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.regnet import AnyNet, ResBottleneckBlock, SimpleStem
from torch import nn

from imgcls.layers import NormFactory, divisible
from imgcls.modeling.backbone_base import Trunk, require_maps
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

STEM_CHANNELS = 32
FEATURES = ("stem", "res2", "res3", "res4", "res5")
# Section 5 (Y): the channels between the two layers of an SE block are a quarter of those that enter the block.
SE_RATIO = 0.25


@dataclass(frozen=True)
class RegNetSpec:
    """One network of the figures, in their letters: blocks d, w_0, w_a, w_m of section 3.3, width g of a group."""

    d: int
    w_0: int
    w_a: float
    w_m: float
    g: int
    se: bool = False
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "regnet_x_400mf": RegNetSpec(22, 24, 24.48, 2.54, 16),
    "regnet_x_800mf": RegNetSpec(16, 56, 35.73, 2.28, 16),
    "regnet_x_1_6gf": RegNetSpec(18, 80, 34.01, 2.25, 24),
    "regnet_x_3_2gf": RegNetSpec(25, 88, 26.31, 2.25, 48),
    "regnet_x_8gf": RegNetSpec(23, 80, 49.56, 2.88, 120),
    "regnet_x_16gf": RegNetSpec(22, 216, 55.59, 2.1, 128),
    "regnet_x_32gf": RegNetSpec(23, 320, 69.86, 2.0, 168),
    "regnet_y_400mf": RegNetSpec(16, 48, 27.89, 2.09, 8, se=True),
    "regnet_y_800mf": RegNetSpec(14, 56, 38.84, 2.4, 16, se=True),
    "regnet_y_1_6gf": RegNetSpec(27, 48, 20.71, 2.65, 24, se=True),
    "regnet_y_3_2gf": RegNetSpec(21, 80, 42.63, 2.66, 24, se=True),
    "regnet_y_8gf": RegNetSpec(17, 192, 76.82, 2.19, 56, se=True),
    "regnet_y_16gf": RegNetSpec(18, 200, 106.23, 2.48, 112, se=True),
    "regnet_y_32gf": RegNetSpec(20, 232, 115.89, 2.53, 232, se=True),
}

IN_TIMM = {
    "regnet_x_400mf": "regnetx_004_tv",
    "regnet_x_800mf": "regnetx_008",
    "regnet_x_1_6gf": "regnetx_016",
    "regnet_x_3_2gf": "regnetx_032",
    "regnet_x_8gf": "regnetx_080",
    "regnet_x_16gf": "regnetx_160",
    "regnet_x_32gf": "regnetx_320",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_800mf": "regnety_008_tv",
    "regnet_y_1_6gf": "regnety_016",
    "regnet_y_3_2gf": "regnety_032",
    "regnet_y_8gf": "regnety_080_tv",
    "regnet_y_16gf": "regnety_160",
    "regnet_y_32gf": "regnety_320",
}


@dataclass(frozen=True)
class Stage:
    """Blocks in a row at one resolution: channels, how many blocks, channels of a group."""

    width: int
    depth: int
    group_width: int


def stages_of(row: RegNetSpec, *, as_printed: bool = False) -> list[Stage]:
    """The quantised linear rule of section 3.3 (equations 2 to 4); widths are multiples of 8, then of the group width.

    as_printed: the multiple of the group width is the nearest, and of two as near the even one, as in the authors' code
        and the paper's figures. Otherwise it is torchvision's: of two the greater, and never below 90 % of the width.
        The difference is 400 rather than 384 in X-400MF, 144 and 784 rather than 128 and 768 in Y-800MF, 224 rather
        than 168 in Y-8GF.
    """
    blocks = []
    for j in range(row.d):
        power = round(log((row.w_0 + row.w_a * j) / row.w_0) / log(row.w_m))
        blocks.append(8 * round(row.w_0 * row.w_m**power / 8))
    stages = []
    # Widths never fall from block to block, so equal ones stand together.
    for width, depth in Counter(blocks).items():
        group = min(row.g, width)
        fitting = group * round(width / group) if as_printed else divisible(width, group)
        stages.append(Stage(fitting, depth, group))
    return stages


class SmallStem(SimpleStem):
    """detectron2's SimpleStem (3x3, norm, ReLU) without its stride."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: NormFactory, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__(in_channels, out_channels, norm, activation)
        self.conv.stride = (1, 1)
        self.stride = 1


class RegNetTrunk(Trunk, AnyNet):
    """detectron2's AnyNet (its blocks, keys and initialisation) with imgcls' freezing and names of the maps."""

    def __init__(
        self,
        spec: RegNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        wanted = _known(out_features)
        # Stages nobody reads cost memory, and DDP waits for their gradients.
        stages = stages_of(spec)[: max(map(FEATURES.index, wanted))]
        stem_class = SmallStem if stem == "small" else SimpleStem
        AnyNet.__init__(
            self,
            # AnyNet says 3 channels, whatever the images have.
            stem_class=lambda _, *others: stem_class(in_channels, *others),
            stem_width=STEM_CHANNELS,
            block_class=ResBottleneckBlock,
            depths=[stage.depth for stage in stages],
            widths=[stage.width for stage in stages],
            group_widths=[stage.group_width for stage in stages],
            strides=[2] * len(stages),
            bottleneck_ratios=[1.0] * len(stages),
            se_ratio=SE_RATIO if spec.se else 0.0,
            activation_class=partial(nn.ReLU, inplace=True),
            norm=NormFactory(norm, spec.bn_eps, spec.bn_momentum),
            out_features=["stem"],
        )
        self._out_features = wanted
        self._out_feature_strides = _renamed(self._out_feature_strides)
        self._out_feature_channels = _renamed(self._out_feature_channels)

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        modules = [self.stem, *(getattr(self, key) for _, key in self.stages_and_names)]
        return list(zip(FEATURES, modules, strict=False))


def _known(out_features: Sequence[str] | None) -> list[str]:
    wanted = list(out_features or FEATURES[-1:])
    require_maps("a RegNet", wanted, FEATURES)
    return wanted


def _renamed(booked: dict[str, int]) -> dict[str, int]:
    return dict(zip(FEATURES, booked.values(), strict=False))


def _torchvision_rules(row: RegNetSpec) -> list[KeyRule]:
    # torchvision counts the blocks of a stage from 0, detectron2 from 1.
    deepest = max(stage.depth for stage in stages_of(row))
    return [
        KeyRule(r"^stem\.0\.", "stem.conv."),
        KeyRule(r"^stem\.1\.", "stem.bn."),
        *(KeyRule(rf"^trunk_output\.block(\d)\.block\d-{i}\.", rf"s\1.b{i + 1}.") for i in range(deepest)),
        KeyRule(r"\.proj\.0\.", ".proj."),
        KeyRule(r"\.proj\.1\.", ".bn."),
        KeyRule(r"\.f\.([abc])\.0\.", r".f.\1."),
        KeyRule(r"\.f\.([abc])\.1\.", r".f.\1_bn."),
        KeyRule(r"\.se\.fc1\.", ".se.f_ex.0."),
        KeyRule(r"\.se\.fc2\.", ".se.f_ex.2."),
        KeyRule(r"^fc\.", "head.fc."),
    ]


_TIMM_RULES = (
    KeyRule(r"\.downsample\.conv\.", ".proj."),
    KeyRule(r"\.downsample\.bn\.", ".bn."),
    *(KeyRule(rf"\.conv{i}\.conv\.", f".f.{letter}.") for i, letter in enumerate("abc", start=1)),
    *(KeyRule(rf"\.conv{i}\.bn\.", f".f.{letter}_bn.") for i, letter in enumerate("abc", start=1)),
    KeyRule(r"\.se\.fc1\.", ".f.se.f_ex.0."),
    KeyRule(r"\.se\.fc2\.", ".f.se.f_ex.2."),
)

FAMILY = register_family(
    Family(
        name="regnet",
        variants=VARIANTS,
        build=RegNetTrunk,
        stems=("standard", "small"),
        dilatable=True,
        sources={
            "torchvision": Source({name: name for name in VARIANTS}, _torchvision_rules),
            "timm": Source(IN_TIMM, _TIMM_RULES),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_regnet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """RegNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
