"""A transformer's encoder layer on a map, each pixel a token (Vaswani et al. 2017, arXiv:1706.03762, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelTransformer(nn.Module):
    """Positions added; attention of all pixels to all, add & norm; two layers on each pixel, add & norm.

    Every head has queries, keys and values of ``key_channels`` channels of its own. kernel: of the convolutions that
    make them; 1 is the paper's linear map of each pixel, a larger one looks at its surroundings. As in the paper these
    maps and the projection behind the heads have no bias, and the hidden layer is four times as wide.
    """

    def __init__(self, channels: int, key_channels: int, heads: int, kernel: int = 1) -> None:
        super().__init__()
        self.heads = heads
        width = heads * key_channels
        self.query, self.key, self.value = (
            nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False) for _ in range(3)
        )
        self.project = nn.Linear(width, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels)
        self.hidden = nn.Linear(channels, 4 * channels)
        self.output = nn.Linear(4 * channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        # Glorot and Bengio 2010, as in torch's own transformer.
        for layer in (self.query, self.key, self.value, self.project, self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight)
        for linear in (self.hidden, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        size = x.shape[2:]
        x = x + sine_positions(x)
        tokens = self.norm1(x.flatten(2).transpose(1, 2) + self.project(self.attend(x)))
        tokens = self.norm2(tokens + self.output(F.relu(self.hidden(tokens))))
        return tokens.transpose(1, 2).unflatten(2, size)

    def attend(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H * W, heads * key_channels): values, weighted by softmax over the keys."""
        query, key, value = (
            layer(x).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).flatten(2)


def sine_positions(x: Tensor) -> Tensor:
    """(C, H, W) for the map ``x``: section 3.5's encoding of the row in the first half of the channels and of the
    column in the second, sine and cosine in turn. C is a multiple of 4."""
    channels, height, width = x.shape[1:]
    # In float32 at least: bfloat16 cannot tell neighbouring rows of a large map apart.
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = channels // 2
    steps = torch.arange(0, half, 2, device=x.device, dtype=dtype)
    frequencies = 10000.0 ** (-steps / half)

    def encoded(length: int) -> Tensor:
        angles = torch.arange(length, device=x.device, dtype=dtype) * frequencies[:, None]
        return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1)

    rows = encoded(height)[:, :, None].expand(-1, -1, width)
    columns = encoded(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns]).to(x.dtype)
