"""ResNet: He et al. 2015, arXiv:1512.03385, table 1, through detectron2's own class and with its keys.

As in torchvision the stride of a bottleneck stands in its 3x3 convolution ("v1.5"; detectron2's default for its own
caffe weights is the 1x1). The small stem for images of 28 to 64 pixels is section 4.2's: a 3x3 of stride 1, no pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, CNNBlockBase, ResNet
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import NormFactory
from imgcls.modeling.backbone_base import Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, register_family

STEM_CHANNELS = 64


@dataclass(frozen=True)
class ResNetSpec:
    """One column of table 1: the kind of block and how many of them in res2, res3, res4, res5."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "resnet18": ResNetSpec(False, (2, 2, 2, 2)),
    "resnet34": ResNetSpec(False, (3, 4, 6, 3)),
    "resnet50": ResNetSpec(True, (3, 4, 6, 3)),
    "resnet101": ResNetSpec(True, (3, 4, 23, 3)),
}


class SmallStem(CNNBlockBase):
    """3x3, stride 1, no pooling; its key is that of detectron2's BasicStem, its kernel is not."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, bias=False, norm=norm(out_channels))
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv1(x))


class ResNetTrunk(Trunk, ResNet):
    """detectron2's ResNet (its blocks, keys and initialisation) with imgcls' freezing and arrival check."""

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        stem_class = SmallStem if stem == "small" else BasicStem
        ResNet.__init__(
            self,
            stem_class(in_channels, STEM_CHANNELS, make_norm),
            _stages(spec, make_norm),
            out_features=_known(out_features),
        )

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        return [("stem", self.stem), *zip(self.stage_names, self.stages, strict=True)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.require_arrival()
        return ResNet.forward(self, x)


def _known(out_features: Sequence[str] | None) -> list[str]:
    names = ("stem", "res2", "res3", "res4", "res5")
    wanted = list(out_features or names[-1:])
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"a ResNet has no feature map {name!r}; allowed: {', '.join(names)}; "
                "change MODEL.BACKBONE.OUT_FEATURES or the IN_FEATURES that ask for it"
            )
    return wanted


def _stages(spec: ResNetSpec, norm: NormFactory) -> list[list[CNNBlockBase]]:
    stages, channels = [], STEM_CHANNELS
    for index, blocks in enumerate(spec.blocks):
        width = 64 * 2**index
        if spec.bottleneck:
            kind = {"block_class": BottleneckBlock, "bottleneck_channels": width, "stride_in_1x1": False}
            out = 4 * width
        else:
            kind, out = {"block_class": BasicBlock}, width
        strides = [1 if index == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                num_blocks=blocks,
                stride_per_block=strides,
                in_channels=channels,
                out_channels=out,
                norm=norm,
                **kind,
            )
        )
        channels = out
    return stages


FAMILY = register_family(Family(name="resnet", variants=VARIANTS, build=ResNetTrunk, stems=("standard", "small")))


@BACKBONE_REGISTRY.register()
def build_imgcls_resnet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """ResNet of ``MODEL.BACKBONE.VARIANT``; ``MODEL.RESNETS`` is not read."""
    return build_trunk(cfg, input_shape, FAMILY)
