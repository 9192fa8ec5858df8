"""GoogLeNet: Szegedy et al. 2014, arXiv:1409.4842, table 1, figures 2b and 3.

``googlenet`` is torchvision's: BatchNorm behind every convolution instead of the two local response norms, a last
pooling of 2x2, and 3x3 kernels where the table says 5x5. The last is a slip of the port that its weights came from,
known and kept because they were trained with it.

``googlenet_paper`` is the table as printed: real 5x5 kernels, no BatchNorm, response norms where figure 3 has them. The
paper gives no constants for these; they are those of BVLC's model (caffe), which counts in the mean of 5 squares. Its
pooling rounds up, which alone gives the table's map sizes at 224 pixels.

Two auxiliary heads read the maps behind inception 4a and 4d in training (section 5); their losses weigh 0.3.
torchvision's ImageNet weights are for images normalised with mean 127.5 and standard deviation 127.5 in every channel:
what torchvision calls ``transform_input=True`` turns the usual ImageNet normalisation into that one. Their auxiliary
heads were never trained.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import NormFactory, conv_norm_act
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import AuxiliaryHeads, fill_classifier, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule


class Widths(NamedTuple):
    """Output channels of an inception module's convolutions: the columns of table 1."""

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    pool_proj: int


CONV1, CONV2_REDUCE, CONV2 = 64, 64, 192
# Each of these stages begins with a max pooling of stride 2.
INCEPTIONS = {
    "res3": {
        "inception3a": Widths(64, 96, 128, 16, 32, 32),
        "inception3b": Widths(128, 128, 192, 32, 96, 64),
    },
    "res4": {
        "inception4a": Widths(192, 96, 208, 16, 48, 64),
        "inception4b": Widths(160, 112, 224, 24, 64, 64),
        "inception4c": Widths(128, 128, 256, 24, 64, 64),
        "inception4d": Widths(112, 144, 288, 32, 64, 64),
        "inception4e": Widths(256, 160, 320, 32, 128, 128),
    },
    "res5": {
        "inception5a": Widths(256, 160, 320, 32, 128, 128),
        "inception5b": Widths(384, 192, 384, 48, 128, 128),
    },
}
# Maps inside res4 for the auxiliary heads -> the module that they come out of.
TAPS = {"aux1": "inception4a", "aux2": "inception4d"}
AUXILIARY_GRID, AUXILIARY_DROPOUT = 4, 0.7


@dataclass(frozen=True)
class GoogLeNetSpec:
    """What the two variants differ in.

    five: kernel of the column "5x5". last_pool: kernel of the pooling before res5. windows: see AuxiliaryHead.
    own_norm: "none" is without BatchNorm and with response norms.
    """

    five: int
    last_pool: int
    windows: bool
    dropout: float
    own_norm: str = ""
    bn_eps: float = 1e-3
    bn_momentum: float = 0.1

    def norm(self, kind: str) -> NormFactory | None:
        """What stands behind every convolution."""
        return None if self.own_norm == "none" else NormFactory(kind, self.bn_eps, self.bn_momentum)


VARIANTS = {
    "googlenet": GoogLeNetSpec(five=3, last_pool=2, windows=False, dropout=0.2),
    "googlenet_paper": GoogLeNetSpec(five=5, last_pool=3, windows=True, dropout=0.4, own_norm="none"),
}

Norm = Callable[[int], nn.Module] | None


class Inception(nn.Module):
    """Four branches over one map, stacked (figure 2b); ``channels`` come out."""

    def __init__(self, in_channels: int, widths: Widths, *, norm: Norm, five: int) -> None:
        super().__init__()
        conv = partial(conv_norm_act, norm=norm, activation=F.relu_)
        self.conv1x1 = conv(in_channels, widths.conv1x1, 1)
        self.reduce3x3 = conv(in_channels, widths.reduce3x3, 1)
        self.conv3x3 = conv(widths.reduce3x3, widths.conv3x3, 3)
        self.reduce5x5 = conv(in_channels, widths.reduce5x5, 1)
        self.conv5x5 = conv(widths.reduce5x5, widths.conv5x5, five)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pool_proj = conv(in_channels, widths.pool_proj, 1)
        self.channels = widths.conv1x1 + widths.conv3x3 + widths.conv5x5 + widths.pool_proj

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.conv1x1(x),
            self.conv3x3(self.reduce3x3(x)),
            self.conv5x5(self.reduce5x5(x)),
            self.pool_proj(self.pool(x)),
        )
        return torch.cat(branches, dim=1)


class GoogLeNet(StagedTrunk):
    """The network up to inception 5b, and on request the maps ``aux1`` and ``aux2`` on the way.

    Pooling without padding makes the maps of some sizes one pixel smaller than ceil(input / stride).
    """

    def __init__(
        self,
        spec: GoogLeNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        make_norm = spec.norm(norm)
        conv = partial(conv_norm_act, norm=make_norm, activation=F.relu_)
        conv1 = conv(in_channels, CONV1, 7, stride=2)
        self.add_stage("stem", nn.Sequential(OrderedDict(conv1=conv1)), channels=CONV1, stride=2)
        res2: OrderedDict[str, nn.Module] = OrderedDict(pool=_pool(3))
        if spec.own_norm == "none":
            res2["response_norm1"] = _response_norm()
        res2["reduce"] = conv(CONV1, CONV2_REDUCE, 1)
        res2["conv"] = conv(CONV2_REDUCE, CONV2, 3)
        if spec.own_norm == "none":
            res2["response_norm2"] = _response_norm()
        self.add_stage("res2", nn.Sequential(res2), channels=CONV2, stride=2)
        channels = CONV2
        for name, rows in INCEPTIONS.items():
            layers: OrderedDict[str, nn.Module] = OrderedDict(pool=_pool(spec.last_pool if name == "res5" else 3))
            for row, widths in rows.items():
                layers[row] = module = Inception(channels, widths, norm=make_norm, five=spec.five)
                channels = module.channels
            self.add_stage(name, nn.Sequential(layers), channels=channels, stride=2)
        self.keep(out_features)
        self.apply(_init_weights)

    def keep(self, out_features: Iterable[str] | None) -> None:
        """As in StagedTrunk; ``aux1`` and ``aux2`` may be asked for beside a stage that does not end before them."""
        wanted = list(out_features or ())
        taps = [name for name in wanted if name in TAPS]
        if taps and not {"res4", "res5"} & set(wanted):
            raise ValueError(
                f"the maps {', '.join(taps)} lie inside res4 and come beside res4 or res5 only; got {wanted}; "
                "change MODEL.BACKBONE.OUT_FEATURES"
            )
        super().keep([name for name in wanted if name not in TAPS])
        for tap in taps:
            self._out_feature_channels[tap] = getattr(self.res4, TAPS[tap]).channels
            self._out_feature_strides[tap] = self._out_feature_strides["res4"]
        self._out_features = wanted or self._out_features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.require_arrival()
        outputs = {}
        for stage in self._stage_names:
            for name, part in self._parts(stage):
                x = self.run_stage(part, x)
                if name in self._out_features:
                    outputs[name] = x
        return outputs

    def _parts(self, stage: str) -> list[tuple[str, nn.Module]]:
        """The stage cut behind the modules whose maps are wanted, each part under the name of its last map."""
        whole = getattr(self, stage)
        names = [name for name, _ in whole.named_children()]
        taps = [tap for tap, module in TAPS.items() if module in names and tap in self._out_features]
        if not taps:
            return [(stage, whole)]
        cuts = [0, *(names.index(TAPS[tap]) + 1 for tap in taps), len(names)]
        return [(name, whole[cuts[i] : cuts[i + 1]]) for i, name in enumerate([*taps, stage])]


def _pool(kernel: int) -> nn.MaxPool2d:
    return nn.MaxPool2d(kernel, stride=2, ceil_mode=True)


def _response_norm() -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, arXiv:1502.01852, forward case; the paper names no initialisation. torchvision's deviation of 0.01
    # would let the variant without BatchNorm start at almost nothing.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class AuxiliaryHead(nn.Module):
    """A 4x4 grid of means, a 1x1 convolution, a hidden layer, dropout of 0.7 and the classifier (section 5).

    windows: means of 5x5 windows every 3 pixels, as the paper has it for its 14x14 map; otherwise, and on maps smaller
    than that, 4x4 windows that cover the map evenly.
    """

    def __init__(self, in_channels: int, num_classes: int, *, norm: Norm, windows: bool) -> None:
        super().__init__()
        self.windows = windows
        self.conv = conv_norm_act(in_channels, 128, 1, norm=norm, activation=F.relu_)
        self.hidden = nn.Linear(128 * AUXILIARY_GRID**2, 1024)
        self.dropout = nn.Dropout(AUXILIARY_DROPOUT)
        self.fc = nn.Linear(1024, num_classes)
        self.apply(_init_weights)
        fill_classifier(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        if self.windows and min(features.shape[2:]) >= 14:
            features = F.avg_pool2d(features, 5, stride=3)
        x = self.conv(F.adaptive_avg_pool2d(features, AUXILIARY_GRID))
        return self.fc(self.dropout(F.relu_(self.hidden(x.flatten(1)))))


def _head(
    row: GoogLeNetSpec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> AuxiliaryHeads:
    """The classifier, with an auxiliary head for each of ``aux1`` and ``aux2`` among ``shapes``."""
    auxiliary = {
        tap: AuxiliaryHead(int(shapes[tap].channels), num_classes, norm=row.norm(norm), windows=row.windows)
        for tap in TAPS
        if tap in shapes
    }
    return AuxiliaryHeads(last_channels(shapes), num_classes, row.dropout if dropout is None else dropout, auxiliary)


TORCHVISION_RULES = (
    KeyRule(r"\.conv\.weight$", ".weight"),
    KeyRule(r"\.bn\.", ".norm."),
    KeyRule(r"\.branch1\.", ".conv1x1."),
    KeyRule(r"\.branch2\.0\.", ".reduce3x3."),
    KeyRule(r"\.branch2\.1\.", ".conv3x3."),
    KeyRule(r"\.branch3\.0\.", ".reduce5x5."),
    KeyRule(r"\.branch3\.1\.", ".conv5x5."),
    KeyRule(r"\.branch4\.1\.", ".pool_proj."),
    KeyRule(r"^inception(\d)", r"res\1.inception\1"),
    KeyRule(r"^conv1\.", "stem.conv1."),
    KeyRule(r"^conv2\.", "res2.reduce."),
    KeyRule(r"^conv3\.", "res2.conv."),
    KeyRule(r"^(aux\d)\.fc1\.", r"\1.hidden."),
    KeyRule(r"^(aux\d)\.fc2\.", r"\1.fc."),
    KeyRule(r"^(aux\d)\.", r"head.auxiliary.\1."),
    KeyRule(r"^fc\.", "head.fc."),
)

FAMILY = register_family(
    Family(
        name="googlenet",
        variants=VARIANTS,
        build=GoogLeNet,
        head=_head,
        auxiliary=tuple(TAPS),
        sources={
            "torchvision": Source(
                names={"googlenet": "googlenet"},
                rules=TORCHVISION_RULES,
                options={"aux_logits": True, "transform_input": False, "init_weights": False},
            )
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_googlenet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """GoogLeNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
