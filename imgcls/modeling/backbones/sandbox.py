"""The sandbox: a network written as rows in YAML, ``MODEL.BACKBONE.ROWS``; docs/sandbox.md says how.

A row is a convolution, a repeated residual chain as in Darknet-53 (Redmon and Farhadi 2018, arXiv:1804.02767, table 1),
or a transformer's encoder layer on the map's pixels (Vaswani et al. 2017, arXiv:1706.03762), whose queries, keys and
values are convolutions (convformer) or linear (transformer). Convolutions have BatchNorm and a leaky ReLU of slope 0.1.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.config import register_check
from imgcls.layers import NormFactory, conv_norm_act
from imgcls.layers.pixel_attention import PixelTransformer
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import WideningHead, last_channels
from imgcls.modeling.sandbox_rows import Row, read_stages, row_problems
from imgcls.modeling.spec import Family, register_family
from imgcls.structures import Problem

logger = logging.getLogger(__name__)

SLOPE = 0.1


@dataclass(frozen=True)
class SandboxSpec:
    """Rows to build where the config has none, for images of any number of channels, and BatchNorm's constants."""

    rows: tuple[tuple[Any, ...], ...]
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


# A small network with a row of every kind.
VARIANTS = {
    "sandbox": SandboxSpec(
        (
            ("conv", 3, 16, 3, 2),
            ("res", (16, 8), (8, 16), (1, 3), 1, True),
            ("conv", 16, 32, 3, 2),
            ("res", (32, 16), (16, 32), (1, 3), 1, True),
            ("conv", 32, 64, 3, 2),
            ("res", (64, 32), (32, 64), (1, 3), 1, True),
            ("conv", 64, 64, 3, 2),
            ("convformer", 64, 16, 3, 4, True),
            ("conv", 64, 64, 3, 2),
            ("transformer", 64, 16, 4, True),
        )
    )
}


class Sandbox(StagedTrunk):
    """A stage ends with each row that is stored and with the last; it is named by the stride there.

    "stem" up to stride 2, res2 .. res5 for strides 4 .. 32. Names that no stored row has are lacking.
    """

    def __init__(
        self,
        spec: SandboxSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
        rows: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        if not rows:
            logger.info("MODEL.BACKBONE.ROWS is empty: the sandbox builds its example of %d rows", len(spec.rows))
            (kind, _, *rest), *others = spec.rows
            rows = ((kind, in_channels, *rest), *others)
        make_norm = NormFactory(norm, spec.bn_eps, spec.bn_momentum)
        for stage in read_stages(rows, in_channels):
            layers = OrderedDict((f"row{row.number}", _layer(row, make_norm)) for row in stage.rows)
            self.add_stage(stage.name, nn.Sequential(layers), channels=stage.rows[-1].gives, stride=stage.stride)
        self.keep(out_features)


class Chain(nn.Module):
    """Convolutions one behind the other, and the chain's input added to what comes out."""

    def __init__(self, ins: Sequence[int], outs: Sequence[int], kernels: Sequence[int], norm: NormFactory) -> None:
        super().__init__()
        parts = enumerate(zip(ins, outs, kernels, strict=True), start=1)
        self.convs = nn.Sequential(OrderedDict((f"conv{n}", _conv(*part, 1, norm)) for n, part in parts))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def _layer(row: Row, norm: NormFactory) -> nn.Module:
    values = row.values
    if row.kind == "conv":
        return _conv(values["in"], values["out"], values["kernel"], values["stride"], norm)
    if row.kind == "res":
        chains = (Chain(values["ins"], values["outs"], values["kernels"], norm) for _ in range(values["repeats"]))
        return nn.Sequential(OrderedDict((f"chain{index}", chain) for index, chain in enumerate(chains)))
    return PixelTransformer(values["in"], values["kqv"], values["heads"], values.get("kernel", 1))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int, norm: NormFactory) -> Conv2d:
    leaky = partial(F.leaky_relu, negative_slope=SLOPE, inplace=True)
    conv = conv_norm_act(in_channels, out_channels, kernel, norm=norm, activation=leaky, stride=stride)
    # He et al. 2015, equation 15: the forward case with the slope of the negative side.
    nn.init.kaiming_normal_(conv.weight, a=SLOPE, mode="fan_in", nonlinearity="leaky_relu")
    return conv


def _head(
    row: SandboxSpec, shapes: Mapping[str, ShapeSpec], num_classes: int, *, dropout: float | None, norm: str
) -> nn.Module:
    """A 1x1 convolution to the classes with norm and leaky ReLU, the mean of all pixels, one linear layer."""
    return WideningHead(
        last_channels(shapes),
        num_classes,
        num_classes,
        norm=NormFactory(norm, row.bn_eps, row.bn_momentum),
        activation=partial(F.leaky_relu, negative_slope=SLOPE),
        dropout=dropout or 0.0,
    )


# Not dilatable: a stage may have several strides.
FAMILY = register_family(
    Family(
        name="sandbox",
        variants=VARIANTS,
        build=Sandbox,
        head=_head,
        options=("rows",),
        # Only where the row is the last: another row's skip hands the constant on.
        without_gradient={"*.row*.norm2.bias": "a constant in a channel is taken off by the BatchNorm of the head"},
    ),
)


@register_check
def check_rows(cfg: CfgNode) -> list[Problem]:
    """Every row of a sandbox, before anything is built."""
    node = cfg.MODEL.BACKBONE
    if node.get("VARIANT") not in VARIANTS or not node.get("ROWS"):
        return []
    return row_problems(node.ROWS, len(cfg.MODEL.PIXEL_MEAN))


@BACKBONE_REGISTRY.register()
def build_imgcls_sandbox_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """The network of ``MODEL.BACKBONE.ROWS``."""
    return build_trunk(cfg, input_shape, FAMILY)
