"""The inverted residual with linear bottleneck: Sandler et al. 2018, arXiv:1801.04381, section 3.3 and figure 3."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from imgcls.layers.conv import conv_norm_act


class InvertedResidual(nn.Module):
    """A 1x1 to ``width`` channels, a depthwise convolution, perhaps squeeze-and-excitation, a 1x1 without activation.

    Keys: ``expand`` (absent where ``width`` is ``in_channels``), ``depthwise``, ``se.fc1`` and ``se.fc2``, ``project``.
    The input is added where stride and channels leave the map's shape alone, unless ``residual`` forbids it.
    MobileNetV2 and V3, MnasNet and EfficientNet's MBConv differ in the arguments only.

    width: channels of the depthwise convolution: the expansion factor times ``in_channels``.
    activation: after ``expand`` and ``depthwise``; may work in place.
    squeezed: hidden channels of the squeeze-and-excitation (Hu et al. 2017), 0 for none; ``squeeze_activation`` and
        ``gate`` make its two activations.
    drop_path: probability of dropping the block for a sample (stochastic depth); only where the input is added.
    conv: makes the three convolutions, for a padding that :func:`conv_norm_act` has not.
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
        squeezed: int = 0,
        squeeze_activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        residual: bool = True,
        drop_path: float = 0.0,
        conv: Callable[..., nn.Module] = conv_norm_act,
    ) -> None:
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.expand = None if width == in_channels else conv(in_channels, width, 1, norm=norm, activation=activation)
        self.depthwise = conv(width, width, kernel, norm=norm, activation=activation, stride=stride, groups=width)
        self.se = SqueezeExcitation(width, squeezed, squeeze_activation, gate) if squeezed else None
        self.project = conv(width, out_channels, 1, norm=norm)
        # Settled here: dilation takes the convolution's stride away later but must not add a residual.
        self.residual = residual and stride == 1 and in_channels == out_channels
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path and self.residual else None

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.expand(x)
        out = self.depthwise(out)
        if self.se is not None:
            out = self.se(out)
        out = self.project(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + x if self.residual else out


def fill_conv(module: nn.Module) -> None:
    """He et al. 2015, equation 14 (normal, by the outgoing connections), for ``trunk.apply``; biases become 0.

    torch's own fan_out counts all channels of a depthwise convolution as outputs of each and starts it near nothing.
    """
    if isinstance(module, nn.Conv2d):
        outgoing = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / outgoing) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
