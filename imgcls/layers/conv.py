"""Convolutions with their norm and activation."""

from collections.abc import Callable

from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    norm: Callable[[int], nn.Module],
    stride: int = 1,
    groups: int = 1,
) -> Conv2d:
    """Convolution without bias, padded so that the output is ceil(input / stride), then norm, then ReLU."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
        norm=norm(out_channels),
        activation=F.relu_,
    )


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
