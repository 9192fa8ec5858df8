"""VGG: Simonyan and Zisserman 2014, arXiv:1409.1556, table 1, columns A, B, D and E; with BatchNorm as in torchvision.

BatchNorm follows a convolution that keeps its bias, as in torchvision's networks of that name. Pooling drops the last
row and column of maps of odd size, so maps can be a pixel smaller than the stride says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

from imgcls.layers import NormFactory
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import DENSE_HEAD, HiddenLayersHead, fill_classifier, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

# Feature name -> channels of its convolutions: table 1, top to bottom; each block ends with its max pooling.
WIDTHS = {"stem": 64, "res2": 128, "res3": 256, "res4": 512, "res5": 512}
# Pixels, side of the map that the first hidden layer reads.
GRID = 7


@dataclass(frozen=True)
class VGGSpec:
    """One column of table 1: how many convolutions before each pooling. own_norm "" is the form with BatchNorm."""

    convs: tuple[int, int, int, int, int]
    own_norm: str = "none"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


VARIANTS = {
    "vgg11": VGGSpec((1, 1, 2, 2, 2)),
    "vgg11_bn": VGGSpec((1, 1, 2, 2, 2), own_norm=""),
    "vgg13": VGGSpec((2, 2, 2, 2, 2)),
    "vgg13_bn": VGGSpec((2, 2, 2, 2, 2), own_norm=""),
    "vgg16": VGGSpec((2, 2, 3, 3, 3)),
    "vgg16_bn": VGGSpec((2, 2, 3, 3, 3), own_norm=""),
    "vgg19": VGGSpec((2, 2, 4, 4, 4)),
    "vgg19_bn": VGGSpec((2, 2, 4, 4, 4), own_norm=""),
}


class VGG(StagedTrunk):
    """The body up to the last pooling, as stages stem, res2 .. res5 of strides 2, 4 .. 32."""

    def __init__(
        self,
        spec: VGGSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make_norm = None if spec.own_norm else NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        channels = in_channels
        for (name, width), convs in zip(WIDTHS.items(), spec.convs, strict=True):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(1, convs + 1):
                layers[f"conv{index}"] = _conv(channels, width, make_norm)
                channels = width
            layers["pool"] = nn.MaxPool2d(2, 2)
            self.add_stage(name, nn.Sequential(layers), channels=width, stride=2)
        self.keep(out_features)
        self.apply(_init_weights)


def _conv(in_channels: int, out_channels: int, norm: NormFactory | None) -> Conv2d:
    made = None if norm is None else norm(out_channels)
    return Conv2d(in_channels, out_channels, 3, padding=1, norm=made, activation=F.relu_)


def _init_weights(module: nn.Module) -> None:
    # As in torchvision: He et al. 2015, backward case. The paper starts its deeper columns from a trained column A.
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)


def _head(
    row: VGGSpec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None,
    norm: str,
    dense: bool = False,
) -> HiddenLayersHead:
    rate = 0.5 if dropout is None else dropout
    head = HiddenLayersHead(last_channels(shapes), num_classes, grid=GRID, dropout=rate, dense=dense)
    for layer in (head.fc1, head.fc2):
        # As in torchvision, a deviation of 0.01; section 3.1 says a variance of 0.01, too much for 25088 inputs.
        fill_classifier(layer)
    return head


def _torchvision_rules(row: VGGSpec) -> list[KeyRule]:
    """torchvision counts convolutions, norms, ReLUs and poolings in one list."""
    rules, index = [], 0
    for stage, convs in zip(WIDTHS, row.convs, strict=True):
        for conv in range(1, convs + 1):
            rules.append(KeyRule(rf"^features\.{index}\.", f"{stage}.conv{conv}."))
            index += 1
            if not row.own_norm:
                rules.append(KeyRule(rf"^features\.{index}\.", f"{stage}.conv{conv}.norm."))
                index += 1
            index += 1  # ReLU
        index += 1  # pooling
    layers = {"0": "fc1", "3": "fc2", "6": "fc"}
    return rules + [KeyRule(rf"^classifier\.{theirs}\.", f"head.{ours}.") for theirs, ours in layers.items()]


FAMILY = register_family(
    Family(
        name="vgg",
        variants=VARIANTS,
        build=VGG,
        head=_head,
        other_heads={DENSE_HEAD: partial(_head, dense=True)},
        sources={"torchvision": Source({variant: variant for variant in VARIANTS}, _torchvision_rules)},
        without_gradient={"backbone.*.conv?.bias": "with BatchNorm, which subtracts the bias with the batch's mean"},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_vgg_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """VGG of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
