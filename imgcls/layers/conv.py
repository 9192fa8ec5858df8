"""Convolutions with their norm and activation."""

from collections.abc import Callable

from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    norm: Callable[[int], nn.Module] | None,
    activation: Callable[[Tensor], Tensor] | None = None,
    stride: int = 1,
    groups: int = 1,
    padding: int | None = None,
) -> Conv2d:
    """Convolution, then norm, then activation; tensors ``weight``, ``norm.*``. Without a norm it has a bias.

    padding: None pads so that the output is ceil(input / stride).
    """
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2 if padding is None else padding,
        groups=groups,
        bias=norm is None,
        norm=None if norm is None else norm(out_channels),
        activation=activation,
    )


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    norm: Callable[[int], nn.Module],
    stride: int = 1,
    groups: int = 1,
) -> Conv2d:
    """:func:`conv_norm_act` with ReLU."""
    return conv_norm_act(in_channels, out_channels, kernel, norm=norm, activation=F.relu_, stride=stride, groups=groups)


class DepthwiseSeparable(nn.Module):
    """A 3x3 on each channel, then a 1x1 across channels, each with norm and ReLU (MobileNetV1, figure 3)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: Callable[[int], nn.Module], stride: int = 1
    ) -> None:
        super().__init__()
        self.depthwise = conv_norm_relu(in_channels, in_channels, 3, norm=norm, stride=stride, groups=in_channels)
        self.pointwise = conv_norm_relu(in_channels, out_channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))
