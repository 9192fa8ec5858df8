"""Building blocks; they know no config and no registry."""

from imgcls.layers.conv import DepthwiseSeparable, conv_norm_act, conv_norm_relu
from imgcls.layers.dilation import dilate
from imgcls.layers.norm import NORMS, NormFactory, average_running_statistics
from imgcls.layers.recompute import recomputed

__all__ = [
    "NORMS",
    "DepthwiseSeparable",
    "NormFactory",
    "average_running_statistics",
    "conv_norm_act",
    "conv_norm_relu",
    "dilate",
    "recomputed",
]
