"""Keeping the resolution of a network's last stages: strides become dilation (Chen et al. 2017, arXiv:1706.05587)."""

from __future__ import annotations

from torch import nn


def dilate(stage: nn.Module, before: int, stride: int) -> int:
    """Take the ``stride`` out of ``stage``, in place; returns the dilation for what follows.

    before: the dilation that the stages in front ended with. The block that had the stride looks at pixels ``before``
    apart, the blocks behind it at pixels ``before * stride`` apart, so every weight sees what it was trained to see.
    """
    dilation = before
    for block in stage.children():
        strided = False
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            strided |= max(conv.stride) > 1
            _set_dilation(conv, dilation)
            conv.stride = (1, 1)
        if strided:
            dilation = before * stride
    if dilation != before * stride:
        raise ValueError(f"a {type(stage).__name__} takes its stride elsewhere than in a convolution of its children")
    return dilation


def _set_dilation(conv: nn.Conv2d, dilation: int) -> None:
    if conv.kernel_size != (1, 1):
        conv.padding = tuple(dilation * (size // 2) for size in conv.kernel_size)
        conv.dilation = (dilation, dilation)
