"""Building blocks; they know no config and no registry."""

from imgcls.layers.conv import DepthwiseSeparable, conv_norm_act, conv_norm_relu
from imgcls.layers.dilation import dilate
from imgcls.layers.fused_inverted_residual import FusedInvertedResidual
from imgcls.layers.inverted_residual import InvertedResidual, fill_conv
from imgcls.layers.norm import NORMS, NormFactory, average_running_statistics
from imgcls.layers.recompute import recomputed
from imgcls.layers.same_padding import SamePaddedConv2d, same_conv_norm_act
from imgcls.layers.scaling import divisible

__all__ = [
    "NORMS",
    "DepthwiseSeparable",
    "FusedInvertedResidual",
    "InvertedResidual",
    "NormFactory",
    "SamePaddedConv2d",
    "average_running_statistics",
    "conv_norm_act",
    "conv_norm_relu",
    "dilate",
    "divisible",
    "fill_conv",
    "recomputed",
    "same_conv_norm_act",
]
