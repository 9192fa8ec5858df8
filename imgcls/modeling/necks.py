"""One feature pyramid for every trunk, in two forms: plain, and with RetinaNet's P6 and P7."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import nn

from imgcls.modeling.backbone_base import Trunk
from imgcls.modeling.build import build_trunk
from imgcls.modeling.fitting import fitted
from imgcls.modeling.spec import family_of
from imgcls.structures import Problem


@BACKBONE_REGISTRY.register()
def build_imgcls_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over the trunk of MODEL.BACKBONE.VARIANT, P6 by pooling: for Faster and Mask R-CNN."""
    trunk = _trunk_for_pyramid(cfg, input_shape)
    top = LastLevelMaxPool()
    # detectron2 pools "p5" whatever the strides; with the small stem the last map is another.
    last = cfg.MODEL.FPN.IN_FEATURES[-1] if cfg.MODEL.FPN.IN_FEATURES else list(trunk.output_shape())[-1]
    top.in_feature = f"p{int(math.log2(trunk.output_shape()[last].stride))}"
    return _pyramid(cfg, trunk, top)


@BACKBONE_REGISTRY.register()
def build_imgcls_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over the trunk of MODEL.BACKBONE.VARIANT, P6 and P7 by convolutions on its last map: for RetinaNet."""
    trunk = _trunk_for_pyramid(cfg, input_shape)
    last = list(trunk.output_shape())[-1]
    top = LastLevelP6P7(trunk.output_shape()[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    return _pyramid(cfg, trunk, top)


def _trunk_for_pyramid(cfg: CfgNode, input_shape: ShapeSpec) -> Trunk:
    """The trunk with all levels that MODEL.FPN.IN_FEATURES asks for: one below its last stage is pooled."""
    family = family_of(cfg.MODEL.BACKBONE.VARIANT)
    if build_imgcls_fpn_backbone.__name__ not in family.pyramids:
        what = f"{family.name} has one map only: a feature pyramid needs several"
        raise Problem(what, cfg.MODEL.BACKBONE.NAME, ", ".join(family.pyramids), "MODEL.BACKBONE.NAME").error()

    def build(maps: Sequence[str] | None) -> Trunk:
        own = cfg.clone()
        own.defrost()
        own.MODEL.BACKBONE.OUT_FEATURES = list(maps or ())
        return build_trunk(own, input_shape)

    return fitted(build, cfg.MODEL.BACKBONE.OUT_FEATURES or cfg.MODEL.FPN.IN_FEATURES)


def _pyramid(cfg: CfgNode, trunk: Trunk, top_block: nn.Module) -> FPN:
    if not cfg.MODEL.FPN.IN_FEATURES:
        allowed = "names of the trunk's maps, e.g. ['res3', 'res4', 'res5']"
        raise Problem("the pyramid has no input", [], allowed, "MODEL.FPN.IN_FEATURES").error()
    strides = {name: trunk.output_shape()[name].stride for name in cfg.MODEL.FPN.IN_FEATURES}
    if any(2 * fine != coarse for fine, coarse in pairwise(strides.values())):
        listed = ", ".join(f"{name} {stride}" for name, stride in strides.items())
        what = f"each map of a pyramid must be twice as coarse as the one before (strides: {listed})"
        key = "MODEL.FPN.IN_FEATURES or MODEL.BACKBONE.OUTPUT_STRIDE"
        raise Problem(what, list(strides), "maps of strides such as 8, 16, 32", key).error()
    pyramid = FPN(
        bottom_up=trunk,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    _require_levels(cfg, pyramid)
    return pyramid


# Meta-architecture -> keys that name levels of the pyramid.
_LEVEL_KEYS = {
    "RetinaNet": ("MODEL.RETINANET.IN_FEATURES",),
    "GeneralizedRCNN": ("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"),
}


def _require_levels(cfg: CfgNode, pyramid: FPN) -> None:
    """Refuse a detector that reads levels which this trunk's pyramid has not: strides shrink with the small stem."""
    levels = pyramid.output_shape()
    for key in _LEVEL_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        _, node, leaf = key.split(".")
        asked = cfg.MODEL[node][leaf]
        if any(level not in levels for level in asked):
            raise Problem("the pyramid has no such level", list(asked), ", ".join(levels), key).error()


class _PaddedPyramid(SimpleFeaturePyramid):
    """detectron2 spells the name of its constraint otherwise than the code that reads it: nothing would be padded."""

    @property
    def size_divisibility(self) -> int:
        return int(self._size_divisibility)


@BACKBONE_REGISTRY.register()
def build_imgcls_simple_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViTDet's pyramid (Li et al. 2022, section 3) over one map, P6 by pooling: for Faster and Mask R-CNN.

    Levels p2 to p5 from a map of stride 16. From one of stride 32 they begin at p3: so must the detector's IN_FEATURES.
    """
    return _simple_pyramid(cfg, input_shape, 4, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_imgcls_retinanet_simple_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViTDet's pyramid over one map, levels p3 to p5, P6 and P7 by convolutions on p5: for RetinaNet."""
    top = LastLevelP6P7(cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS, in_feature="p5")
    return _simple_pyramid(cfg, input_shape, 8, top)


def _simple_pyramid(cfg: CfgNode, input_shape: ShapeSpec, finest: int, top_block: nn.Module) -> SimpleFeaturePyramid:
    """Over the map that MODEL.FPN.IN_FEATURES names; a list of several, as stock YAMLs have, is the trunk's last map.

    MODEL.FPN.NORM "" is the paper's LN.
    """
    if len(cfg.MODEL.FPN.IN_FEATURES) > 1:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.FPN.IN_FEATURES = []
    trunk = build_trunk(cfg, input_shape)
    name, shape = list(trunk.output_shape().items())[-1]
    if shape.stride not in (16, 32):
        what = "the simple pyramid needs a map of stride 16 or 32"
        raise Problem(what, f"{name} of stride {shape.stride}", "such a map", "MODEL.FPN.IN_FEATURES").error()
    return _PaddedPyramid(
        trunk,
        name,
        cfg.MODEL.FPN.OUT_CHANNELS,
        # The factors that detectron2 knows, for levels of stride ``finest`` to 32.
        scale_factors=[scale for scale in (4.0, 2.0, 1.0, 0.5) if finest <= shape.stride / scale <= 32],
        top_block=top_block,
        norm=cfg.MODEL.FPN.NORM or "LN",
    )
