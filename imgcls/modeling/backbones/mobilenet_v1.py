"""MobileNetV1: Howard et al. 2017, arXiv:1704.04861, table 1 (body) and section 3.3 (width multiplier).

The last block of table 1 is printed with stride 2 and an unchanged 7x7 output; as in the authors' own release its
stride is 1. Activations are ReLU, as the paper says. BatchNorm's epsilon and momentum are torch's (the paper gives
none). timm's mobilenetv1_100 equals width 1.0 when it is built with ReLU, but its weights were trained with ReLU6:
it is no source of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from imgcls.layers import DepthwiseSeparable, NormFactory, conv_norm_relu
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, register_family

STEM_CHANNELS = 32
# feature name -> (output channels, stride) of its depthwise separable blocks: table 1, top to bottom.
BLOCKS = {
    "stem": ((64, 1),),
    "res2": ((128, 2), (128, 1)),
    "res3": ((256, 2), (256, 1)),
    "res4": ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    "res5": ((1024, 2), (1024, 1)),
}


@dataclass(frozen=True)
class MobileNetV1Spec:
    """One row: the width multiplier alpha of section 3.3 and BatchNorm's constants."""

    width: float
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "mobilenet_v1_0.25": MobileNetV1Spec(0.25),
    "mobilenet_v1_0.5": MobileNetV1Spec(0.5),
    "mobilenet_v1_0.75": MobileNetV1Spec(0.75),
    "mobilenet_v1_1.0": MobileNetV1Spec(1.0),
}


class MobileNetV1(StagedTrunk):
    """The body up to the last block, as stages stem, res2 .. res5 of strides 2, 4 .. 32 (small stem: 1, 2 .. 16)."""

    def __init__(
        self,
        spec: MobileNetV1Spec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        stem_stride = 1 if stem == "small" else 2
        channels = scaled(STEM_CHANNELS, spec.width)
        conv1 = conv_norm_relu(in_channels, channels, 3, norm=make_norm, stride=stem_stride)
        for name, rows in BLOCKS.items():
            layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=conv1) if name == "stem" else OrderedDict()
            total = stem_stride if name == "stem" else 1
            for index, (width, stride) in enumerate(rows):
                out = scaled(width, spec.width)
                layers[f"block{index}"] = DepthwiseSeparable(channels, out, norm=make_norm, stride=stride)
                channels, total = out, total * stride
            self.add_stage(name, nn.Sequential(layers), channels=channels, stride=total)
        self.keep(out_features)
        self.apply(_init_weights)


def scaled(channels: int, width: float) -> int:
    """Channels after the width multiplier (section 3.3): the product, which the paper's four widths leave whole."""
    return int(channels * width)


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, forward case; the paper names no initialisation. torch's fan_out would count every channel of a
    # depthwise kernel as an output of each and start those layers at almost nothing.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


FAMILY = register_family(
    Family(
        name="mobilenet_v1",
        variants=VARIANTS,
        build=MobileNetV1,
        stems=("standard", "small"),
        dilatable=True,
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_mobilenet_v1_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """MobileNetV1 of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
