"""TensorFlow's "same" padding: what a strided convolution needs stands behind the last pixel rather than around all."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.layers.conv import conv_norm_act


class SamePaddedConv2d(Conv2d):
    """detectron2's Conv2d, padded as the size of its input asks for: of an odd number of zeros the last goes behind.

    On an even side a 3x3 of stride 2 is padded by (0, 1), on an odd side by (1, 1): the output is ceil(input / stride)
    either way, but the pixels that it looks at are others than with a padding of 1. Kernels are no smaller than the
    stride.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Without a stride (dilation takes it away and sets the padding) "same" is symmetric.
        if max(self.stride) > 1:
            height, width = (self._amounts(x.shape[axis + 2], axis) for axis in (0, 1))
            x = F.pad(x, (*width, *height))
        return super().forward(x)

    def _amounts(self, side: int, axis: int) -> tuple[int, int]:
        stride = self.stride[axis]
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        total = (-(-side // stride) - 1) * stride + reach - side
        return total // 2, total - total // 2


def same_conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    norm: Callable[[int], nn.Module],
    activation: Callable[[Tensor], Tensor] | None = None,
    stride: int = 1,
    groups: int = 1,
) -> Conv2d:
    """:func:`conv_norm_act` with "same" padding; tensors and names are the same."""
    if stride == 1:
        return conv_norm_act(in_channels, out_channels, kernel, norm=norm, activation=activation, groups=groups)
    return SamePaddedConv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        groups=groups,
        bias=False,
        norm=norm(out_channels),
        activation=activation,
    )
