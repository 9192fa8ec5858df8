"""Swin Transformer: Liu et al. 2021, arXiv:2103.14030, section 3.3 and table 7, on detectron2's class, with its keys.

Three things differ from detectron2's class. A side of a map that one window covers is not shifted, as in the authors'
classifier, torchvision and timm; so the last stage of 224-pixel images is another one than detectron2's. Stochastic
depth is torchvision's, so that timm is not needed. And the table of relative positions is no tensor of the state dict:
it follows from the window's size.

As in detectron2 every map but the stem's has a LayerNorm of its own (norm0 .. norm3). norm3 is the classifier's last
norm and travels; the other three are a detector's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import (
    BasicLayer,
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    window_partition,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from imgcls.modeling.backbone_base import Trunk, require_maps
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule

WINDOW = 7
FEATURES = ("stem", "res2", "res3", "res4", "res5")
# What keeps a pixel from looking at one that the shift has brought beside it: added to the logits of the attention.
FAR = -100.0


@dataclass(frozen=True)
class SwinSpec:
    """One row of section 3.3's list: C, the blocks of each stage; and each stage's heads, of 32 channels each."""

    channels: int
    blocks: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    own_norm: str = "LN"


VARIANTS = {
    "swin_t": SwinSpec(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": SwinSpec(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": SwinSpec(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": SwinSpec(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}

TORCHVISION_RULES = (
    KeyRule(r"\.relative_position_index$", change="drop"),
    KeyRule(r"^features\.0\.0\.", "patch_embed.proj."),
    KeyRule(r"^features\.0\.2\.", "patch_embed.norm."),
    *(KeyRule(rf"^features\.{2 * i + 1}\.", f"layers.{i}.blocks.") for i in range(4)),
    *(KeyRule(rf"^features\.{2 * i + 2}\.", f"layers.{i}.downsample.") for i in range(3)),
    KeyRule(r"\.mlp\.0\.", ".mlp.fc1."),
    KeyRule(r"\.mlp\.3\.", ".mlp.fc2."),
    KeyRule(r"^norm\.", "norm3."),
    KeyRule(r"^head\.", "head.fc."),
)
TIMM_RULES = (
    KeyRule(r"\.(relative_position_index|attn_mask)$", change="drop"),  # in older files
    # There the merging of patches begins a stage, in detectron2 it ends the stage before.
    *(KeyRule(rf"^layers\.{i}\.downsample\.", f"layers.{i - 1}.downsample.") for i in range(1, 4)),
    KeyRule(r"^norm\.", "norm3."),
)
TIMM_NAMES = {"swin_t": "tiny", "swin_s": "small", "swin_b": "base", "swin_l": "large"}


class SwinBlock(SwinTransformerBlock):
    """detectron2's block on maps (N, H, W, C), which shifts each side of the map by its own number of pixels."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__(dim, heads, WINDOW)
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index, persistent=False)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor, shifts: tuple[int, int], mask: Tensor | None) -> Tensor:
        """shifts: pixels up and to the left; mask: what :func:`shift_mask` makes of them, None without a shift."""
        x = x + self.drop_path(self._attention(self.norm1(x), shifts, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor, shifts: tuple[int, int], mask: Tensor | None) -> Tensor:
        count, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        rows, columns = x.shape[1] // WINDOW, x.shape[2] // WINDOW
        if mask is not None:
            x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
        x = self.attn(window_partition(x, WINDOW).flatten(1, 2), mask)
        x = x.view(count, rows, columns, WINDOW, WINDOW, channels).transpose(2, 3)
        x = x.reshape(count, rows * WINDOW, columns * WINDOW, channels)
        if mask is not None:
            x = torch.roll(x, shifts, (1, 2))
        return x[:, :height, :width]


class SwinStage(BasicLayer):
    """detectron2's layer: blocks, every other one shifted, and the merging of patches for the next stage."""

    def __init__(self, dim: int, heads: int, drop_path: Sequence[float], *, merges: bool) -> None:
        super().__init__(dim, 0, heads, WINDOW, downsample=PatchMerging if merges else None)
        self.depth = len(drop_path)
        self.blocks = nn.ModuleList(SwinBlock(dim, heads, rate) for rate in drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, W, C) -> the stage's map, and what the next stage takes: (N, ceil(H / 2), ceil(W / 2), 2 C)."""
        height, width = x.shape[1:3]
        shifts = shift_of(height), shift_of(width)
        mask = shift_mask(height, width, shifts, x) if any(shifts) else None
        for index, block in enumerate(self.blocks):
            x = block(x, shifts, mask if index % 2 else None)
        if self.downsample is None:
            return x, x
        merged = self.downsample(x.flatten(1, 2), height, width)
        return x, merged.unflatten(1, ((height + 1) // 2, (width + 1) // 2))


def shift_of(side: int) -> int:
    """By how many pixels every other block shifts a map of this height or width (section 3.2): none in one window."""
    return WINDOW // 2 if side > WINDOW else 0


def shift_mask(height: int, width: int, shifts: tuple[int, int], like: Tensor) -> Tensor:
    """(windows, pixels, pixels): 0 where two pixels of a window were near each other before the shift, else FAR."""
    rows, columns = (
        _stretches(side + -side % WINDOW, shift, like) for side, shift in zip((height, width), shifts, strict=True)
    )
    regions = window_partition((3 * rows[:, None] + columns)[None, :, :, None], WINDOW).flatten(1)
    return like.new_zeros(()).masked_fill(regions[:, None] != regions[:, :, None], FAR)


def _stretches(side: int, shift: int, like: Tensor) -> Tensor:
    # Behind the last window's beginning stands first what was there already, then what came round from the front.
    place = torch.arange(side, device=like.device)
    return (place >= side - WINDOW).int() + (place >= side - shift).int()


class SwinTrunk(Trunk, SwinTransformer):
    """detectron2's Swin with imgcls' names of maps, freezing, gradient checkpointing and arrival check."""

    # A stage returns its map before the norm, channels last, and the next stage's input.
    stages_return_maps = False

    def __init__(
        self,
        spec: SwinSpec,
        *,
        in_channels: int = 3,
        norm: str = "LN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
        drop_path: float = 0.0,
    ) -> None:
        wanted = list(out_features or FEATURES[-1:])
        require_maps("a Swin Transformer", wanted, FEATURES)
        last = max(map(FEATURES.index, wanted))
        SwinTransformer.__init__(
            self, in_chans=in_channels, embed_dim=spec.channels, depths=(), num_heads=(), out_indices=()
        )
        self._size_divisibility = 0  # every part pads what it needs
        self._out_features = wanted
        self._out_feature_channels = {"stem": spec.channels}
        self._out_feature_strides = {"stem": 4}
        depth = sum(spec.blocks)
        rates = [drop_path * block / (depth - 1) for block in range(depth)]
        for index, name in enumerate(FEATURES[1:]):
            self._out_feature_channels[name] = spec.channels * 2**index
            self._out_feature_strides[name] = 4 * 2**index
            stage_rates, rates = rates[: spec.blocks[index]], rates[spec.blocks[index] :]
            if index < last:
                # Stages that nobody reads would cost memory, and DDP would wait for their gradients.
                width = self._out_feature_channels[name]
                merges = index + 1 < last
                self.layers.append(SwinStage(width, spec.heads[index], stage_rates, merges=merges))
            if name in wanted:
                self.add_module(f"norm{index}", nn.LayerNorm(self._out_feature_channels[name]))
        self.num_layers = len(self.layers)
        # The authors' release, in detectron2's words: truncated Gaussians of deviation 0.02 for the linear layers.
        self.layers.apply(self._init_weights)

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        """Without norm0 .. norm3: the norms of the maps that are returned are never frozen."""
        return list(zip(FEATURES, (self.patch_embed, *self.layers), strict=False))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W), normalised -> feature name -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        if self.training:
            self.require_arrival()
        x = self.run_stage(self.patch_embed, x)
        maps = {"stem": x}
        x = x.permute(0, 2, 3, 1)
        for index, stage in enumerate(self.layers):
            own, x = self.run_stage(stage, x)
            name = FEATURES[index + 1]
            if name in self._out_features:
                maps[name] = getattr(self, f"norm{index}")(own).permute(0, 3, 1, 2)
        return {name: maps[name] for name in maps if name in self._out_features}


FAMILY = register_family(
    Family(
        name="swin",
        variants=VARIANTS,
        build=SwinTrunk,
        options=("drop_path",),
        detector_only=("norm0.*", "norm1.*", "norm2.*"),
        sources={
            # torchvision's stem cuts off what is no whole patch (detectron2 pads): the odd size is odd behind it.
            "torchvision": Source(
                {name: name for name in VARIANTS if name != "swin_l"}, TORCHVISION_RULES, sizes=(64, 100)
            ),
            # timm's masks and windows are made for one size.
            "timm": Source(
                {name: f"swin_{size}_patch4_window7_224" for name, size in TIMM_NAMES.items()},
                TIMM_RULES,
                sizes=(224,),
            ),
        },
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_swin_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """Swin Transformer of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
