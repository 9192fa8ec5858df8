"""ViT: Dosovitskiy et al. 2020, arXiv:2010.11929, table 1 (B, L), and DeiT, arXiv:2012.12877, table 1 (Ti, S).

The network is detectron2's ViT (ViTDet, Li et al. 2022, arXiv:2203.16527) with its keys. That class has no class token:
the classifier's trunk adds ``cls_token``, which stays behind at the hand-over. Patches that cannot attend to it give
other maps than in the classifier, in ViTDet as here, so a hand-over is compared with the trunk without class token.

Both classifiers of the paper's appendix D.3: the class token is read, or (``_gap``) the patches are averaged and the
mean is normalised; as in MAE and timm the class token is there in both. The final norm belongs to the head.

Position embeddings keep detectron2's layout [1, 1 + N, C], class token first. For images of another size than
``pretrain_size`` they are resampled in every forward as detectron2 and MAE do it, bicubically; timm's resampling
antialiases and torchvision's aligns the corners, both once, at loading. What no whole patch covers is not seen (images
are cut at a multiple of the patch size), as in detectron2.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.utils import get_abs_pos
from detectron2.modeling.backbone.vit import Block, ViT
from torch import Tensor, nn

from imgcls.modeling.backbone_base import Trunk, require_maps
from imgcls.modeling.build import build_trunk, is_classifier
from imgcls.modeling.heads import LayerNormHead, last_channels
from imgcls.modeling.spec import Family, Source, register_family
from imgcls.structures import KeyRule, Problem

# The map of the patches, called as in detectron2, and the class token as a map of one pixel.
PATCHES, TOKEN = "last_feat", "token"
# Pixels, ViTDet's images: relative positions of blocks without windows are made for their grid.
DETECTOR_SIZE = 1024


@dataclass(frozen=True)
class ViTSpec:
    """One row: patch size in pixels, width D, layers, heads; the MLP's width is 4 D throughout.

    average: the classifier reads the mean of the patches, not the class token.
    size: pixels, side of the images that the position embeddings are made for.
    """

    patch: int
    width: int
    depth: int
    heads: int
    average: bool = False
    size: int = 224
    ln_eps: float = 1e-6
    own_norm: str = "LN"

    @property
    def finest_level(self) -> int:
        """The first level p2 or p3 of the simple pyramid, which enlarges the map four times at most."""
        return 2 if self.patch <= 16 else 3


TOKEN_VARIANTS = {
    "vit_ti_16": ViTSpec(16, 192, 12, 3),
    "vit_ti_32": ViTSpec(32, 192, 12, 3),
    "vit_s_16": ViTSpec(16, 384, 12, 6),
    "vit_s_32": ViTSpec(32, 384, 12, 6),
    "vit_b_16": ViTSpec(16, 768, 12, 12),
    "vit_b_32": ViTSpec(32, 768, 12, 12),
    "vit_l_16": ViTSpec(16, 1024, 24, 16),
    "vit_l_32": ViTSpec(32, 1024, 24, 16),
}
VARIANTS = TOKEN_VARIANTS | {f"{name}_gap": replace(row, average=True) for name, row in TOKEN_VARIANTS.items()}


class FittingBlock(Block):
    """detectron2's block, but a map that fits into one window is attended to as it is.

    detectron2 fills the window up with zeros, which take part in the softmax as further keys.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.window_size and max(x.shape[1:3]) <= self.window_size:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return super().forward(x)


class ViTTrunk(Trunk, ViT):
    """The patches' embedding and the blocks: map ``last_feat`` (N, C, H / patch, W / patch), ``token`` (N, C, 1, 1).

    Stages for freezing: patch embedding with positions and class token, then every block.

    pretrain_size: pixels, side of the images that the position embeddings are made for; 0: the row's own.
    for_detector: without class token.
    window_size, rel_pos: a detector's only. ViTDet's attention inside windows of so many patches, in all but the last
        block of each quarter, and its relative positions, which start from zero: window_size 14, rel_pos True.
    """

    stages_return_maps = False

    def __init__(
        self,
        spec: ViTSpec,
        *,
        in_channels: int = 3,
        norm: str = "LN",
        out_features: Sequence[str] | None = None,
        stem: str = "standard",
        drop_path: float = 0.0,
        pretrain_size: int = 0,
        for_detector: bool = False,
        window_size: int = 0,
        rel_pos: bool = False,
    ) -> None:
        _require_timm()
        _refuse(spec, pretrain_size, for_detector, window_size, rel_pos)
        ViT.__init__(
            self,
            patch_size=spec.patch,
            in_chans=in_channels,
            embed_dim=spec.width,
            depth=0,
            pretrain_img_size=pretrain_size or spec.size,
            pretrain_use_cls_token=True,
            out_feature=PATCHES,
        )
        grid = DETECTOR_SIZE // spec.patch
        for index in range(spec.depth):
            block = FittingBlock(
                spec.width,
                spec.heads,
                drop_path=drop_path * index / max(spec.depth - 1, 1),
                norm_layer=partial(nn.LayerNorm, eps=spec.ln_eps),
                use_rel_pos=rel_pos,
                window_size=0 if attends_globally(index, spec.depth) else window_size,
                input_size=(grid, grid),
            )
            self.blocks.append(block)
        self._add_token(spec, for_detector)
        self._out_features = _known(out_features, for_detector, spec.average)
        # DeiT's initialisation, and MAE's for fine-tuning: linear layers, positions and class token from a truncated
        # normal distribution of deviation 0.02, the patches' convolution as torch does it.
        self.apply(self._init_weights)

    def _add_token(self, spec: ViTSpec, for_detector: bool) -> None:
        self.cls_token = None if for_detector else nn.Parameter(torch.zeros(1, 1, spec.width))
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self._out_feature_channels[TOKEN] = spec.width
            self._out_feature_strides[TOKEN] = None

    @property
    def size_divisibility(self) -> int:
        """Detectors pad their images to whole patches."""
        return int(self._out_feature_strides[PATCHES])

    first_stage_parameters = ("pos_embed", "cls_token")

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        blocks = [(f"blocks.{index}", block) for index, block in enumerate(self.blocks)]
        return [("patch_embed", self.patch_embed), *blocks]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.require_arrival()
        x = self.patch_embed(x)
        grid = x.shape[1:3]
        x = x + get_abs_pos(self.pos_embed, True, grid)
        if self.cls_token is not None:
            token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            # The blocks take maps: token and patches lie in one row.
            x = torch.cat([token, x.flatten(1, 2)], dim=1)[:, None]
        for block in self.blocks:
            x = self.run_stage(block, x)
        maps = {}
        if self.cls_token is not None:
            maps[TOKEN] = x[:, 0, 0, :, None, None]
            x = x[:, 0, 1:].unflatten(1, grid)
        maps[PATCHES] = x.permute(0, 3, 1, 2)
        return {name: maps[name] for name in self._out_features}


def attends_globally(index: int, depth: int) -> bool:
    """Whether a block has no window in ViTDet (section 3): the last of each quarter of the blocks."""
    return (index + 1) % max(depth // 4, 1) == 0


def _require_timm() -> None:
    try:
        with warnings.catch_warnings():
            # timm says that detectron2 imports from the module's old name.
            warnings.filterwarnings("ignore", "Importing from timm.models.layers is deprecated", FutureWarning)
            importlib.import_module("timm.models.layers")
    except ImportError as error:
        raise ImportError(
            f"detectron2's ViT needs timm, which is not installed: pip install 'imgcls[timm]' ({error})"
        ) from error


def _refuse(spec: ViTSpec, pretrain_size: int, for_detector: bool, window_size: int, rel_pos: bool) -> None:
    if pretrain_size and pretrain_size < spec.patch:
        what, allowed = "images smaller than a patch", f"at least {spec.patch}, or 0 for {spec.size}"
        raise Problem(what, pretrain_size, allowed, "MODEL.BACKBONE.PRETRAIN_SIZE").error()
    if (window_size or rel_pos) and not for_detector:
        what = "windows and relative positions are for detectors; a classifier's ViT attends globally"
        given = f"WINDOW_SIZE {window_size}, REL_POS {rel_pos}"
        raise Problem(what, given, "0 and False", "MODEL.BACKBONE.WINDOW_SIZE, MODEL.BACKBONE.REL_POS").error()


def _known(out_features: Sequence[str] | None, for_detector: bool, average: bool) -> list[str]:
    wanted = list(out_features or (PATCHES if for_detector or average else TOKEN,))
    if for_detector:
        require_maps("a detector's ViT", wanted, (PATCHES,))
    else:
        require_maps("a classifier's ViT", wanted, (TOKEN, PATCHES))
    return wanted


def vit_head(
    row: ViTSpec, shapes: Mapping[str, ShapeSpec], num_classes: int, *, dropout: float | None = None, norm: str = "LN"
) -> nn.Module:
    """The final norm and the classifier: over the class token, or over the mean of the patches."""
    return LayerNormHead(
        last_channels(shapes), num_classes, norm_first=not row.average, eps=row.ln_eps, dropout=dropout or 0.0
    )


# -- layouts of other libraries --------------------------------------------------------------------------------------

TORCHVISION_RULES = (
    KeyRule(r"^conv_proj\.", "patch_embed.proj."),
    KeyRule(r"^class_token$", "cls_token"),
    KeyRule(r"^encoder\.pos_embedding$", "pos_embed"),
    KeyRule(r"^encoder\.ln\.", "head.norm."),
    KeyRule(r"^heads\.head\.", "head.fc."),
    KeyRule(r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    KeyRule(r"\.ln_([12])\.", r".norm\1."),
    KeyRule(r"\.self_attention\.in_proj_", ".attn.qkv."),
    KeyRule(r"\.self_attention\.out_proj\.", ".attn.proj."),
    # torchvision 0.11 and before, its published files among them: linear_1 and linear_2.
    KeyRule(r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    KeyRule(r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)

# Files and transformers before 5 name things in the first way, its modules since then in the second.
HUGGINGFACE_RULES = (
    KeyRule(r"^vit\."),
    KeyRule(r"^(pooler\.|embeddings\.mask_token$)", change="drop"),
    KeyRule(r"^embeddings\.cls_token$", "cls_token"),
    KeyRule(r"^embeddings\.position_embeddings$", "pos_embed"),
    KeyRule(r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    KeyRule(r"^layernorm\.", "head.norm."),
    KeyRule(r"^classifier\.", "head.fc."),
    KeyRule(r"^(encoder\.layer|layers)\.", "blocks."),
    KeyRule(r"\.attention\.(attention\.query|q_proj)\.", ".attn.qkv.", part=(0, 3)),
    KeyRule(r"\.attention\.(attention\.key|k_proj)\.", ".attn.qkv.", part=(1, 3)),
    KeyRule(r"\.attention\.(attention\.value|v_proj)\.", ".attn.qkv.", part=(2, 3)),
    KeyRule(r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    KeyRule(r"\.layernorm_before\.", ".norm1."),
    KeyRule(r"\.layernorm_after\.", ".norm2."),
    KeyRule(r"\.intermediate\.dense\.", ".mlp.fc1."),
    KeyRule(r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)

# A detector's checkpoint: its pyramid and heads have no counterpart, its relative positions none in a classifier.
VITDET_RULES = (
    KeyRule(r"^(?!backbone\.net\.)", change="drop"),
    KeyRule(r"\.rel_pos_[hw]$", change="drop"),
    KeyRule(r"^backbone\.net\."),
)


def timm_rules(row: ViTSpec) -> Sequence[KeyRule]:
    """timm's layout, and MAE's, which is timm's: the trunk's names are ours; the decoder of a pretraining is dropped.

    The norm behind the blocks of MAE's pretraining is no classifier's: averaging, it is replaced by ``fc_norm``.
    """
    norm = (KeyRule(r"^norm\.", change="drop"), KeyRule(r"^fc_norm\.", "head.norm."))
    return (
        KeyRule(r"^(decoder_|mask_token$)", change="drop"),
        KeyRule(r"^head\.", "head.fc."),
        *(norm if row.average else (KeyRule(r"^norm\.", "head.norm."),)),
    )


def to_timm_rules(row: ViTSpec) -> Sequence[KeyRule]:
    """From a classifier's tensors (ClsNet's names, or the trunk's alone) to timm's and MAE's."""
    return (
        KeyRule(r"^backbone\."),
        KeyRule(r"^head\.norm\.", "fc_norm." if row.average else "norm."),
        KeyRule(r"^head\.fc\.", "head."),
    )


def to_vitdet_rules(row: ViTSpec) -> Sequence[KeyRule]:
    """From a classifier's tensors to those of a ViTDet's body, without what that has not."""
    return (
        KeyRule(r"^(head\.|(backbone\.)?cls_token$)", change="drop"),
        KeyRule(r"^(backbone\.)?", "backbone.net."),
    )


# Layout -> rules, of a row, from our tensors' names to that layout's; for checkpoint.apply_key_rules.
EXPORTS = {"timm": to_timm_rules, "mae": to_timm_rules, "vitdet": to_vitdet_rules}


def _timm_options(row: ViTSpec) -> dict[str, Any]:
    # By default timm's L/32 has no classes.
    return {"patch_size": row.patch, "global_pool": "avg" if row.average else "token", "num_classes": 1000}


def _huggingface_options(row: ViTSpec) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "patch_size": row.patch,
        "hidden_size": row.width,
        "intermediate_size": 4 * row.width,
        "num_hidden_layers": row.depth,
        "num_attention_heads": row.heads,
        "layer_norm_eps": row.ln_eps,  # 1e-12 in its default configuration and its published ones
    }


# timm has no tiny network of patch 32; the option makes one of that of patch 16.
_TIMM_NAMES = {
    "vit_ti_16": "vit_tiny_patch16_224",
    "vit_ti_32": "vit_tiny_patch16_224",
    "vit_s_16": "vit_small_patch16_224",
    "vit_s_32": "vit_small_patch32_224",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
}
SOURCES = {
    "torchvision": Source(
        names={name: name for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")},
        rules=TORCHVISION_RULES,
        sizes=(224,),
    ),
    "timm": Source(
        names=_TIMM_NAMES | {f"{ours}_gap": theirs for ours, theirs in _TIMM_NAMES.items()},
        rules=timm_rules,
        options=_timm_options,
        sizes=(224,),
    ),
    "mae": Source(
        names={"vit_b_16_gap": "vit_base_patch16", "vit_l_16_gap": "vit_large_patch16"}, rules=timm_rules, sizes=(224,)
    ),
    "huggingface": Source(
        names={ours: theirs.replace("_", "-") for ours, theirs in _TIMM_NAMES.items() if ours != "vit_ti_32"},
        rules=HUGGINGFACE_RULES,
        options=_huggingface_options,
        sizes=(224,),
    ),
    # A body without head: no logits to compare.
    "vitdet": Source(names={"vit_b_16": "ViTDet-B", "vit_l_16": "ViTDet-L"}, rules=VITDET_RULES, sizes=()),
}


FAMILY = register_family(
    Family(
        name="vit",
        variants=VARIANTS,
        build=ViTTrunk,
        head=vit_head,
        options=("drop_path", "for_detector", "pretrain_size", "window_size", "rel_pos"),
        detector_only=("blocks.*.attn.rel_pos_h", "blocks.*.attn.rel_pos_w"),
        classifier_only=("cls_token",),
        pyramids=("build_imgcls_simple_fpn_backbone", "build_imgcls_retinanet_simple_fpn_backbone"),
        sources=SOURCES,
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_vit_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """ViT of ``MODEL.BACKBONE.VARIANT``; in a detector its one map is ``last_feat``."""
    if not (is_classifier(cfg) or cfg.MODEL.BACKBONE.OUT_FEATURES):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.BACKBONE.OUT_FEATURES = [PATCHES]
    return build_trunk(cfg, input_shape, FAMILY)
