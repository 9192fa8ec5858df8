"""Building blocks; they know no config and no registry."""

from imgcls.layers.conv import DepthwiseSeparable, conv_norm_relu
from imgcls.layers.norm import NORMS, NormFactory, average_running_statistics

__all__ = ["NORMS", "DepthwiseSeparable", "NormFactory", "average_running_statistics", "conv_norm_relu"]
