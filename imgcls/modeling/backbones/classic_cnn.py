"""The classic small CNN of tutorials: pairs of 3x3 convolutions, each with BatchNorm, pooling, dropout, hidden layers.

A VGG (Simonyan and Zisserman 2014) for images of some 32 pixels, with BatchNorm (Ioffe and Szegedy 2015) and dropout
(Srivastava et al. 2014). No one paper owns it; its widths are those below times nf, the number in a variant's name.
Pooling counts a window that lies partly outside, so that maps have ceil(input / stride) pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from imgcls.layers import NormFactory, conv_norm_relu
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import DENSE_HEAD, HiddenLayersHead, last_channels
from imgcls.modeling.spec import Family, register_family

# Feature name -> multiples of nf, the filters of its two convolutions.
FILTERS = {"stem": (1, 2), "res2": (4, 4), "res3": (8, 8), "res4": (16, 16)}
# Units of either hidden layer, as a multiple of nf.
HIDDEN = 32
# Pixels, side of the map that the first hidden layer reads: the whole last map of a 32-pixel image.
GRID = 2


@dataclass(frozen=True)
class ClassicCNNSpec:
    """One width: nf, the filters of the first convolution; dropout behind each pooling; BatchNorm's constants."""

    nf: int
    dropout: float = 0.25
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "classic_cnn_8": ClassicCNNSpec(8),
    "classic_cnn_16": ClassicCNNSpec(16),
    "classic_cnn_32": ClassicCNNSpec(32),
    "classic_cnn_64": ClassicCNNSpec(64),
}


class ClassicCNN(StagedTrunk):
    """The four blocks, as stages stem, res2, res3, res4 of strides 2, 4, 8 and 16."""

    def __init__(
        self,
        spec: ClassicCNNSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        channels = in_channels
        for name, (first, second) in FILTERS.items():
            block = OrderedDict(
                conv1=conv_norm_relu(channels, first * spec.nf, 3, norm=make_norm),
                conv2=conv_norm_relu(first * spec.nf, second * spec.nf, 3, norm=make_norm),
                pool=nn.MaxPool2d(2, 2, ceil_mode=True),
                dropout=nn.Dropout(spec.dropout),
            )
            channels = second * spec.nf
            self.add_stage(name, nn.Sequential(block), channels=channels, stride=2)
        self.keep(out_features)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, forward case, for layers that ReLU follows.
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _head(
    row: ClassicCNNSpec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None,
    norm: str,
    dense: bool = False,
) -> HiddenLayersHead:
    rate = 0.5 if dropout is None else dropout
    channels, width = last_channels(shapes), HIDDEN * row.nf
    head = HiddenLayersHead(channels, num_classes, grid=GRID, width=width, dropout=rate, dense=dense)
    for layer in (head.fc1, head.fc2):
        _init_weights(layer)
    return head


FAMILY = register_family(
    Family(
        name="classic_cnn",
        variants=VARIANTS,
        build=ClassicCNN,
        head=_head,
        other_heads={DENSE_HEAD: partial(_head, dense=True)},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_classic_cnn_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """The classic CNN of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
