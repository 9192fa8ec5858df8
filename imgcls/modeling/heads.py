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
    if name == FAMILY_HEAD and family is not None and family.head is not None:
        made: nn.Module = family.head(row, shapes, num_classes, dropout=dropout, norm=norm)
        return made
    if name != FAMILY_HEAD and name not in HEAD_REGISTRY:
        allowed = ", ".join((FAMILY_HEAD, *(known for known, _ in HEAD_REGISTRY)))
        raise Problem("there is no such head", name, allowed, "MODEL.HEAD.NAME").error()
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

    dense: the same weights as convolutions over a map of any size, and the mean of the logits at all places (Simonyan
        and Zisserman 2014, section 3.2). Weights of either form load into the other.
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
        if dense:
            self.fc1: nn.Module = nn.Conv2d(in_channels, width, grid)
            self.fc2: nn.Module = nn.Conv2d(width, width, 1)
            self.fc: nn.Conv2d | nn.Linear = nn.Conv2d(width, num_classes, 1)
        else:
            self.fc1 = nn.Linear(in_channels * grid * grid, width)
            self.fc2 = nn.Linear(width, width)
            self.fc = nn.Linear(width, num_classes)
        fill_classifier(self.fc)
        self.register_load_state_dict_pre_hook(_reshape_to_fit)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x = features if self.dense else F.adaptive_avg_pool2d(features, self.grid).flatten(1)
        if self.dense and min(x.shape[2:]) < self.grid:
            raise ValueError(
                f"the dense head needs a map of at least {self.grid}x{self.grid}; got {tuple(x.shape[2:])}; "
                "give larger images, or MODEL.HEAD.NAME auto"
            )
        # Dropout stands before each hidden layer (AlexNet) or behind it (VGG).
        for layer in (self.fc1, self.fc2):
            x = F.relu(layer(self.dropout(x) if self.dropout_first else x))
            x = x if self.dropout_first else self.dropout(x)
        x = self.fc(x)
        return pooled(x) if self.dense else x


def _reshape_to_fit(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, own in module.state_dict().items():
        given = state_dict.get(prefix + name)
        if given is not None and given.shape != own.shape and given.numel() == own.numel():
            state_dict[prefix + name] = given.reshape(own.shape)


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
