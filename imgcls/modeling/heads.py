"""Heads: from the trunk's last map to logits. Classifier parameters never live in a backbone."""

from __future__ import annotations

from fvcore.common.registry import Registry
from torch import Tensor, nn

HEAD_REGISTRY = Registry("HEAD")
HEAD_REGISTRY.__doc__ = "Heads of ClsNet: ``head(in_channels, num_classes, dropout)``, called with the last map."


@HEAD_REGISTRY.register()
class LinearHead(nn.Module):
    """Global average pooling, dropout, one linear layer."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)
        # Goyal et al. 2017, section 5.1: the last layer starts from a zero-mean Gaussian of deviation 0.01.
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.fc(self.dropout(features.mean(dim=(2, 3))))
