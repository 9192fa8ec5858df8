"""The inverted residual with one full convolution: Tan and Le 2021, arXiv:2104.00298, figure 2 (Fused-MBConv)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from imgcls.layers.conv import conv_norm_act


class FusedInvertedResidual(nn.Module):
    """A full convolution to ``width`` channels, then a 1x1 without activation: no depthwise convolution.

    Keys: ``fused`` and ``project``; where ``width`` is ``in_channels``, ``fused`` alone leads to ``out_channels``. The
    other arguments are those of :class:`InvertedResidual`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        norm: Callable[[int], nn.Module],
        activation: Callable[[Tensor], Tensor],
        kernel: int = 3,
        stride: int = 1,
        drop_path: float = 0.0,
        conv: Callable[..., nn.Module] = conv_norm_act,
    ) -> None:
        super().__init__()
        expands = width != in_channels
        middle = width if expands else out_channels
        self.fused = conv(in_channels, middle, kernel, norm=norm, activation=activation, stride=stride)
        self.project = conv(width, out_channels, 1, norm=norm) if expands else None
        # Dilation takes strides away; it must not add a residual.
        self.residual = stride == 1 and in_channels == out_channels
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path and self.residual else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.fused(x)
        if self.project is not None:
            out = self.project(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + x if self.residual else out
