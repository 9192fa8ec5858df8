"""Heads: from the trunk's last map to logits. Classifier parameters never live in a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers import conv_norm_act
from imgcls.modeling.spec import Family
from imgcls.structures import Problem

HEAD_REGISTRY = Registry("HEAD")
HEAD_REGISTRY.__doc__ = "Heads of ClsNet: ``head(in_channels, num_classes, dropout)``, called with the last map."

# MODEL.HEAD.NAME for the head of the variant's own paper.
FAMILY_HEAD = "auto"
# ... and for that head slid over a map of any size, in families whose head has hidden layers.
DENSE_HEAD = "dense"


def make_head(
    name: str,
    family: Family | None,
    row: Any,
    shapes: Mapping[str, ShapeSpec],
    num_classes: int,
    *,
    dropout: float | None = None,
    norm: str = "BN",
) -> nn.Module:
    """The head called ``name`` over a trunk's maps ``shapes``; ``dropout`` None is the head's own.

    A head that has auxiliary heads for maps besides the last keeps them in a ModuleDict ``auxiliary`` by map.
    """
    own = {FAMILY_HEAD: family.head, **family.other_heads} if family is not None else {}
    build = own.get(name)
    if build is not None:
        made: nn.Module = build(row, shapes, num_classes, dropout=dropout, norm=norm)
        return made
    if name != FAMILY_HEAD and name not in HEAD_REGISTRY:
        allowed = ", ".join(dict.fromkeys((FAMILY_HEAD, *own, *(known for known, _ in HEAD_REGISTRY))))
        what = f"{family.name if family else 'this backbone'} has no such head"
        raise Problem(what, name, allowed, "MODEL.HEAD.NAME").error()
    head = LinearHead if name == FAMILY_HEAD else HEAD_REGISTRY.get(name)
    return head(last_channels(shapes), num_classes, dropout or 0.0)


def last_channels(shapes: Mapping[str, ShapeSpec]) -> int:
    """Channels of the map that a head reads: the last."""
    return int(list(shapes.values())[-1].channels)


def fill_classifier(layer: nn.Linear | nn.Conv2d) -> None:
    """Goyal et al. 2017, section 5.1: the last layer starts from a zero-mean Gaussian of deviation 0.01."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def pooled(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C), the mean over all pixels."""
    return x.mean(dim=(2, 3))


@HEAD_REGISTRY.register()
class LinearHead(nn.Module):
    """Global average pooling, dropout, one linear layer."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)
        fill_classifier(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.fc(self.dropout(pooled(features)))


class AuxiliaryHeads(LinearHead):
    """The linear head, and ``auxiliary``: heads for earlier maps, by map, that training reads (GoogLeNet, Inception).

    Without such maps there is no ``auxiliary``.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float, auxiliary: Mapping[str, nn.Module]) -> None:
        super().__init__(in_channels, num_classes, dropout)
        if auxiliary:
            self.auxiliary = nn.ModuleDict(auxiliary)


class WideningHead(nn.Module):
    """A 1x1 convolution to ``width`` channels, pooling, perhaps a hidden layer, dropout, the classifier.

    The end of MobileNetV2 and V3, MNASNet, EfficientNet and ShuffleNetV2; the convolution does not go to detectors.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int,
        *,
        norm: Callable[[int], nn.Module],
        activation: Callable[[Tensor], Tensor] = F.relu_,
        hidden: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = conv_norm_act(in_channels, width, 1, norm=norm, activation=activation)
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden or width, num_classes)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        fill_classifier(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x = pooled(self.conv(features))
        if self.hidden is not None:
            x = self.activation(self.hidden(x))
        return self.fc(self.dropout(x))


class HiddenLayersHead(nn.Module):
    """Two hidden layers over a grid of pixels and the classifier: the end of AlexNet and VGG.

    dense: slid over a map of any size as convolutions, and the mean of the logits at all places (Simonyan and Zisserman
        2014, section 3.2). The tensors are those of the plain form, so either takes the other's weights.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        grid: int,
        width: int = 4096,
        dropout: float = 0.5,
        dropout_first: bool = False,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.dense, self.dropout_first = grid, dense, dropout_first
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(in_channels * grid * grid, width)
        self.fc2 = nn.Linear(width, width)
        self.fc = nn.Linear(width, num_classes)
        fill_classifier(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x = features if self.dense else F.adaptive_avg_pool2d(features, self.grid)
        # Dropout stands before each hidden layer (as in torchvision's AlexNet) or behind it (as in the papers).
        x = self.dropout(x) if self.dropout_first else x
        x = F.relu(self._fc1_at_every_place(x) if self.dense else self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(self.dropout(x)))
        x = self.fc(x if self.dropout_first else self.dropout(x))
        return x.mean(dim=(1, 2)) if self.dense else x

    def _fc1_at_every_place(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H - grid + 1, W - grid + 1, width)."""
        if min(features.shape[2:]) < self.grid:
            raise ValueError(
                f"the dense head needs a map of at least {self.grid}x{self.grid}; got {tuple(features.shape[2:])}; "
                "give larger images, or MODEL.HEAD.NAME auto"
            )
        kernels = self.fc1.weight.unflatten(1, (-1, self.grid, self.grid))
        return F.conv2d(features, kernels, self.fc1.bias).permute(0, 2, 3, 1)


class PointwiseHead(nn.Module):
    """Dropout, a 1x1 convolution to the classes, perhaps ReLU, the mean of all pixels: SqueezeNet and Darknet-19."""

    def __init__(self, in_channels: int, num_classes: int, *, relu: bool, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Conv2d(in_channels, num_classes, 1)
        self.relu = relu
        fill_classifier(self.fc)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x = self.fc(self.dropout(features))
        return pooled(F.relu_(x) if self.relu else x)


class LayerNormHead(nn.Module):
    """LayerNorm and pooling, in either order, dropout, the classifier: ConvNeXt, ViT and Swin.

    norm_first: each pixel is normalised before the mean is taken (Swin, ViT), not the mean itself (ConvNeXt, MAE).
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, norm_first: bool, eps: float = 1e-6, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, eps=eps)
        self.norm_first = norm_first
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        if self.norm_first:
            x = self.norm(features.permute(0, 2, 3, 1)).mean(dim=(1, 2))
        else:
            x = self.norm(pooled(features))
        return self.fc(self.dropout(x))
