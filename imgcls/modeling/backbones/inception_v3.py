"""Inception v3: Szegedy et al. 2015, arXiv:1512.00567, table 1 and figures 5 to 8 and 10.

Layers are those of the authors' release, which torchvision took over, with its names. Where the printed table has 3x3
convolutions to 80, 192 (stride 2) and 288 channels, it has a 1x1 to 80, a 3x3 to 192 and a max pooling, and in the
35x35 modules a 5x5 where figure 5 has one of the 3x3. BatchNorm's epsilon is the release's, its momentum torch's.

Convolutions and poolings that halve a map are not padded, nor are two convolutions at the beginning: maps are a few
pixels smaller than input / stride, and images need at least 75 pixels. The auxiliary head of section 4 reads the last
17x17 map, ``res4``, in training. torchvision's ImageNet weights are for images of 299 pixels normalised with mean 127.5
and standard deviation 127.5 in every channel: what torchvision calls ``transform_input=True`` turns the usual ImageNet
normalisation into that one. timm's copies say the same (bicubic, crop 0.875), but for ``gluon_in1k`` with ImageNet's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import NormFactory
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import AuxiliaryHeads, fill_classifier, last_channels, pooled
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

Kernel = tuple[int, int]
POINT, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


@dataclass(frozen=True)
class InceptionV3Spec:
    """The only row.

    pool_widths: channels behind the pooling in each 35x35 module (figure 5). seven_widths: channels between the 1x7 and
    7x1 convolutions of each 17x17 module (figure 6). resolution: side of the paper's images.
    """

    pool_widths: tuple[int, ...] = (32, 64, 64)
    seven_widths: tuple[int, ...] = (128, 160, 160, 192)
    dropout: float = 0.5
    resolution: int = 299
    bn_eps: float = 1e-3
    bn_momentum: float = 0.1


VARIANTS = {"inception_v3": InceptionV3Spec()}


class Parallel(nn.ModuleDict):
    """Branches over one map, stacked in order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], dim=1)


@dataclass(frozen=True)
class Layers:
    """Makes convolutions and the modules of the figures; all is padded but what halves the map."""

    norm: NormFactory

    def conv(self, in_channels: int, width: int, kernel: Kernel, *, stride: int = 1, padded: bool = True) -> Conv2d:
        """Convolution, norm and ReLU."""
        return Conv2d(
            in_channels,
            width,
            kernel,
            stride=stride,
            padding=(kernel[0] // 2, kernel[1] // 2) if padded else 0,
            bias=False,
            norm=self.norm(width),
            activation=F.relu_,
        )

    def chain(self, in_channels: int, *steps: tuple[int, Kernel], halve: bool = False) -> nn.Sequential:
        """Convolutions (width, kernel) in a row, ``conv1``, ``conv2`` ...; halve: the last has stride 2."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (width, kernel) in enumerate(steps, start=1):
            last = halve and number == len(steps)
            layers[f"conv{number}"] = self.conv(in_channels, width, kernel, stride=1 + last, padded=not last)
            in_channels = width
        return nn.Sequential(layers)

    def average_branch(self, in_channels: int, width: int) -> nn.Sequential:
        """3x3 means, then a 1x1 convolution."""
        pool = nn.AvgPool2d(3, stride=1, padding=1)
        return nn.Sequential(OrderedDict(pool=pool, conv=self.conv(in_channels, width, POINT)))

    def figure5(self, in_channels: int, pool_width: int) -> tuple[Parallel, int]:
        """The 35x35 module and its output channels."""
        branches = {
            "branch1x1": self.conv(in_channels, 64, POINT),
            "branch5x5": self.chain(in_channels, (48, POINT), (64, FIVE)),
            "branch3x3dbl": self.chain(in_channels, (64, POINT), (96, THREE), (96, THREE)),
            "branch_pool": self.average_branch(in_channels, pool_width),
        }
        return Parallel(branches), 64 + 64 + 96 + pool_width

    def reduction35(self, in_channels: int) -> tuple[Parallel, int]:
        """From 35x35 to 17x17 (figure 10)."""
        branches = {
            "branch3x3": self.chain(in_channels, (384, THREE), halve=True),
            "branch3x3dbl": self.chain(in_channels, (64, POINT), (96, THREE), (96, THREE), halve=True),
            "branch_pool": nn.MaxPool2d(3, stride=2),
        }
        return Parallel(branches), 384 + 96 + in_channels

    def figure6(self, in_channels: int, width: int) -> tuple[Parallel, int]:
        """The 17x17 module: 7x7 convolutions as 1x7 and 7x1."""
        twice = ((width, POINT), (width, TALL), (width, WIDE), (width, TALL), (192, WIDE))
        branches = {
            "branch1x1": self.conv(in_channels, 192, POINT),
            "branch7x7": self.chain(in_channels, (width, POINT), (width, WIDE), (192, TALL)),
            "branch7x7dbl": self.chain(in_channels, *twice),
            "branch_pool": self.average_branch(in_channels, 192),
        }
        return Parallel(branches), 4 * 192

    def reduction17(self, in_channels: int) -> tuple[Parallel, int]:
        """From 17x17 to 8x8 (figure 10, with a 7x7 in front of one convolution)."""
        seven = ((192, POINT), (192, WIDE), (192, TALL), (192, THREE))
        branches = {
            "branch3x3": self.chain(in_channels, (192, POINT), (320, THREE), halve=True),
            "branch7x7x3": self.chain(in_channels, *seven, halve=True),
            "branch_pool": nn.MaxPool2d(3, stride=2),
        }
        return Parallel(branches), 320 + 192 + in_channels

    def figure7(self, in_channels: int) -> tuple[Parallel, int]:
        """The 8x8 module: branches that end in a 1x3 beside a 3x1."""
        single = self.chain(in_channels, (384, POINT))
        single.add_module("ends", self._ends(384))
        double = self.chain(in_channels, (448, POINT), (384, THREE))
        double.add_module("ends", self._ends(384))
        branches = {
            "branch1x1": self.conv(in_channels, 320, POINT),
            "branch3x3": single,
            "branch3x3dbl": double,
            "branch_pool": self.average_branch(in_channels, 192),
        }
        return Parallel(branches), 320 + 2 * 384 + 2 * 384 + 192

    def _ends(self, width: int) -> Parallel:
        return Parallel({"wide": self.conv(width, width, (1, 3)), "tall": self.conv(width, width, (3, 1))})


class InceptionV3(StagedTrunk):
    """The network up to the last 8x8 module: 147, 71, 35, 17 and 8 pixels of 299."""

    def __init__(
        self,
        spec: InceptionV3Spec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make = Layers(NormFactory(norm, spec.bn_eps, spec.bn_momentum))
        stem_layers = OrderedDict(
            conv1=make.conv(in_channels, 32, THREE, stride=2, padded=False),
            conv2=make.conv(32, 32, THREE, padded=False),
            conv3=make.conv(32, 64, THREE),
        )
        self.add_stage("stem", nn.Sequential(stem_layers), channels=64, stride=2)
        res2: OrderedDict[str, nn.Module] = OrderedDict(
            pool=nn.MaxPool2d(3, stride=2),
            reduce=make.conv(64, 80, POINT),
            conv=make.conv(80, 192, THREE, padded=False),
        )
        self.add_stage("res2", nn.Sequential(res2), channels=192, stride=2)
        channels = 192
        res3: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.MaxPool2d(3, stride=2))
        for letter, width in zip("bcd", spec.pool_widths, strict=True):
            res3[f"mixed5{letter}"], channels = make.figure5(channels, width)
        self.add_stage("res3", nn.Sequential(res3), channels=channels, stride=2)
        res4: OrderedDict[str, nn.Module] = OrderedDict()
        res4["mixed6a"], channels = make.reduction35(channels)
        for letter, width in zip("bcde", spec.seven_widths, strict=True):
            res4[f"mixed6{letter}"], channels = make.figure6(channels, width)
        self.add_stage("res4", nn.Sequential(res4), channels=channels, stride=2)
        res5: OrderedDict[str, nn.Module] = OrderedDict()
        res5["mixed7a"], channels = make.reduction17(channels)
        for letter in "bc":
            res5[f"mixed7{letter}"], channels = make.figure7(channels)
        self.add_stage("res5", nn.Sequential(res5), channels=channels, stride=2)
        self.keep(out_features)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, arXiv:1502.01852, forward case; the paper names no initialisation.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


class AuxiliaryHead(nn.Module):
    """5x5 means every 3 pixels, a 1x1 and a 5x5 convolution, pooling and the classifier (figure 8).

    The 5x5 needs the 17x17 map of a 299 pixel image. Of smaller maps 5x5 windows that cover them evenly are taken, so
    that training at every size that the trunk takes is possible.
    """

    def __init__(self, in_channels: int, num_classes: int, make: Layers) -> None:
        super().__init__()
        self.reduce = make.conv(in_channels, 128, POINT)
        self.conv = make.conv(128, 768, FIVE, padded=False)
        self.fc = nn.Linear(768, num_classes)
        self.apply(_init_weights)
        fill_classifier(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        if min(features.shape[2:]) >= 17:
            x = F.avg_pool2d(features, 5, stride=3)
        else:
            x = F.adaptive_avg_pool2d(features, 5)
        return self.fc(pooled(self.conv(self.reduce(x))))


def _head(
    row: InceptionV3Spec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> AuxiliaryHeads:
    """The classifier, with the auxiliary head where ``res4`` is among ``shapes``."""
    make = Layers(NormFactory(norm, row.bn_eps, row.bn_momentum))
    auxiliary = {
        name: AuxiliaryHead(int(shapes[name].channels), num_classes, make) for name in ("res4",) if name in shapes
    }
    return AuxiliaryHeads(last_channels(shapes), num_classes, row.dropout if dropout is None else dropout, auxiliary)


TORCHVISION_RULES = (
    KeyRule(r"\.conv\.weight$", ".weight"),
    KeyRule(r"\.bn\.", ".norm."),
    KeyRule(r"\.branch_pool\.", ".branch_pool.conv."),
    KeyRule(r"(Mixed_7[bc]\.branch3x3\w*)_\da\.", r"\1.ends.wide."),
    KeyRule(r"(Mixed_7[bc]\.branch3x3\w*)_\db\.", r"\1.ends.tall."),
    KeyRule(r"(\.branch\w+)_(\d)\.", r"\1.conv\2."),
    KeyRule(r"Mixed_6a\.branch3x3\.", "Mixed_6a.branch3x3.conv1."),
    KeyRule(r"^Mixed_5(\w)", r"res3.mixed5\1"),
    KeyRule(r"^Mixed_6(\w)", r"res4.mixed6\1"),
    KeyRule(r"^Mixed_7(\w)", r"res5.mixed7\1"),
    KeyRule(r"^Conv2d_1a_3x3\.", "stem.conv1."),
    KeyRule(r"^Conv2d_2a_3x3\.", "stem.conv2."),
    KeyRule(r"^Conv2d_2b_3x3\.", "stem.conv3."),
    KeyRule(r"^Conv2d_3b_1x1\.", "res2.reduce."),
    KeyRule(r"^Conv2d_4a_3x3\.", "res2.conv."),
    KeyRule(r"^AuxLogits\.conv0\.", "head.auxiliary.res4.reduce."),
    KeyRule(r"^AuxLogits\.conv1\.", "head.auxiliary.res4.conv."),
    KeyRule(r"^AuxLogits\.fc\.", "head.auxiliary.res4.fc."),
    KeyRule(r"^fc\.", "head.fc."),
)
NAMES = {"inception_v3": "inception_v3"}

FAMILY = register_family(
    Family(
        name="inception_v3",
        variants=VARIANTS,
        build=InceptionV3,
        head=_head,
        auxiliary=("res4",),
        sources={
            "torchvision": Source(
                names=NAMES,
                rules=TORCHVISION_RULES,
                options={"aux_logits": True, "transform_input": False, "init_weights": False},
                sizes=(75, 128),
            ),
            "timm": Source(names=NAMES, rules=TORCHVISION_RULES, sizes=(75, 128)),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_inception_v3_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """Inception v3."""
    return build_trunk(cfg, input_shape, FAMILY)
