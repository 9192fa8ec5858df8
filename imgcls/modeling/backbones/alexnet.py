"""AlexNet, in two forms.

alexnet: the network without towers of Krizhevsky 2014 (arXiv:1404.5997, "one weird trick"), with torchvision's widths.
Footnote 1 there prints 384 filters for conv4; torchvision follows the author's released configuration, which has 256.

alexnet_paper: Krizhevsky, Sutskever and Hinton 2012 ("ImageNet classification with deep convolutional neural
networks"), section 3.5 and figure 2. Its two GPUs are two groups in conv2, conv4 and conv5; response normalisation
(section 3.3, over all kernels of a layer) and pooling follow conv1 and conv2.

The first convolution pads by 2, which gives figure 2's 55x55 outputs for its 224x224 images; nothing else is padded
but what keeps a size, so maps are smaller than the stride says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

from imgcls.layers import conv_norm_act
from imgcls.modeling.backbone_base import StagedTrunk, Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.heads import DENSE_HEAD, HiddenLayersHead, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

# Pixels, side of the map that the first hidden layer reads (figure 2).
GRID = 6


@dataclass(frozen=True)
class AlexNetSpec:
    """One network: kernels of conv1 .. conv5, and what only the paper of 2012 has.

    groups: of conv2, conv4 and conv5.
    responses: normalise the responses of conv1 and conv2.
    paper_start: the Gaussian of deviation 0.01 and the biases of 1 (section 5) instead of torch's initialisation.
    dropout_first: dropout before each hidden layer, not behind it (section 4.2).
    """

    widths: tuple[int, int, int, int, int]
    groups: int = 1
    responses: bool = False
    paper_start: bool = False
    dropout_first: bool = True
    own_norm: str = "none"


VARIANTS = {
    "alexnet": AlexNetSpec((64, 192, 384, 256, 256)),
    "alexnet_paper": AlexNetSpec(
        (96, 256, 384, 384, 256), groups=2, responses=True, paper_start=True, dropout_first=False
    ),
}


class AlexNet(StagedTrunk):
    """conv1 (res2), pool1 and conv2 (res3), pool2 and conv3 .. conv5 (res4), pool5 (res5): strides 4, 8, 16, 32."""

    def __init__(
        self,
        spec: AlexNetSpec,
        *,
        in_channels: int = 3,
        norm: str = "none",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__()
        w1, w2, w3, w4, w5 = spec.widths
        conv = partial(conv_norm_act, norm=None, activation=F.relu_)
        self._add("res2", 4, w1, conv1=conv(in_channels, w1, 11, stride=4, padding=2))
        self._add("res3", 2, w2, **_responses(spec), pool=_pool(), conv2=conv(w1, w2, 5, groups=spec.groups))
        self._add(
            "res4",
            2,
            w5,
            **_responses(spec),
            pool=_pool(),
            conv3=conv(w2, w3, 3),
            conv4=conv(w3, w4, 3, groups=spec.groups),
            conv5=conv(w4, w5, 3, groups=spec.groups),
        )
        self._add("res5", 2, w5, pool=_pool())
        self.keep(out_features)
        if spec.paper_start:
            self.apply(partial(_start_as_in_the_paper, bias=0.0))
            for name, module in self.named_modules():
                if name.endswith(("conv2", "conv4", "conv5")):
                    nn.init.ones_(module.bias)

    def _add(self, name: str, stride: int, channels: int, **layers: nn.Module) -> None:
        self.add_stage(name, nn.Sequential(OrderedDict(layers)), channels=channels, stride=stride)


def _pool() -> nn.Module:
    """Section 3.4: windows of 3 pixels, 2 apart, overlap."""
    return nn.MaxPool2d(3, 2)


def _responses(spec: AlexNetSpec) -> dict[str, nn.Module]:
    """Section 3.3: k = 2, n = 5, alpha = 1e-4 and beta = 0.75; torch divides alpha by n, the paper does not."""
    return {"responses": nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)} if spec.responses else {}


@torch.no_grad()
def _start_as_in_the_paper(module: nn.Module, bias: float) -> None:
    # Section 5. The biases of 1 give ReLUs positive inputs from the first step.
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        module.weight.normal_(0, 0.01)
        module.bias.fill_(bias)


def _head(
    row: AlexNetSpec,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None,
    norm: str,
    dense: bool = False,
) -> HiddenLayersHead:
    head = HiddenLayersHead(
        last_channels(shapes),
        num_classes,
        grid=GRID,
        dropout=0.5 if dropout is None else dropout,
        dropout_first=row.dropout_first,
        dense=dense,
    )
    if row.paper_start:
        for layer in (head.fc1, head.fc2):
            _start_as_in_the_paper(layer, bias=1.0)
    return head


TORCHVISION = Source(
    names={"alexnet": "alexnet"},
    rules=(
        KeyRule(r"^features\.0\.", "res2.conv1."),
        KeyRule(r"^features\.3\.", "res3.conv2."),
        KeyRule(r"^features\.6\.", "res4.conv3."),
        KeyRule(r"^features\.8\.", "res4.conv4."),
        KeyRule(r"^features\.10\.", "res4.conv5."),
        KeyRule(r"^classifier\.1\.", "head.fc1."),
        KeyRule(r"^classifier\.4\.", "head.fc2."),
        KeyRule(r"^classifier\.6\.", "head.fc."),
    ),
)

FAMILY = register_family(
    Family(
        name="alexnet",
        variants=VARIANTS,
        build=AlexNet,
        head=_head,
        other_heads={DENSE_HEAD: partial(_head, dense=True)},
        sources={"torchvision": TORCHVISION},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_alexnet_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """AlexNet of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
