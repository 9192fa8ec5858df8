"""Keeping the resolution of a network's last stages: strides become dilation (Chen et al. 2017, arXiv:1706.05587)."""

from __future__ import annotations

from torch import nn


def dilate(stage: nn.Module, before: int, stride: int) -> int:
    """Take the ``stride`` out of ``stage``, in place; returns the dilation for what follows.

    before: the dilation that the stages in front ended with. The convolution that had the stride looks at pixels
    ``before`` apart, those behind it at pixels ``before * stride`` apart: each weight sees what it was trained to see.
    """
    dilation = before
    for block in stage.children():
        strided = behind = False
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            has_stride = max(conv.stride) > 1
            _set_dilation(conv, before * stride if behind and not has_stride else dilation)
            conv.stride = (1, 1)
            strided |= has_stride
            # The 1x1 of a shortcut stands beside the others, not before them.
            behind |= has_stride and conv.kernel_size != (1, 1)
        if strided:
            dilation = before * stride
    if dilation != before * stride:
        raise ValueError(f"a {type(stage).__name__} takes its stride elsewhere than in a convolution of its children")
    return dilation


def _set_dilation(conv: nn.Conv2d, dilation: int) -> None:
    if conv.kernel_size != (1, 1):
        conv.padding = tuple(dilation * (size // 2) for size in conv.kernel_size)
        conv.dilation = (dilation, dilation)
