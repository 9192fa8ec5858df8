"""Losses of ClsNet: called with logits (N, K) and targets, they return a dict of scalars to be added up."""

from __future__ import annotations

from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = "Losses of ClsNet: ``loss(label_smoothing)``, called with logits and targets."


@LOSS_REGISTRY.register()
class CrossEntropy(nn.Module):
    """Softmax cross-entropy with class indices (N,) or with weights over the classes (N, K), mean over the batch."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss_cls": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)}
