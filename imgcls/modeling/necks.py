"""One feature pyramid for every trunk, in two forms: plain, and with RetinaNet's P6 and P7."""

from __future__ import annotations

import math

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from imgcls.modeling.backbone_base import Trunk
from imgcls.modeling.build import build_trunk
from imgcls.structures import Problem


@BACKBONE_REGISTRY.register()
def build_imgcls_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over the trunk of MODEL.BACKBONE.VARIANT, P6 by pooling: for Faster and Mask R-CNN."""
    trunk = build_trunk(cfg, input_shape)
    top = LastLevelMaxPool()
    # detectron2 pools "p5" whatever the strides; with the small stem the last map is another.
    last = cfg.MODEL.FPN.IN_FEATURES[-1] if cfg.MODEL.FPN.IN_FEATURES else list(trunk.output_shape())[-1]
    top.in_feature = f"p{int(math.log2(trunk.output_shape()[last].stride))}"
    return _pyramid(cfg, trunk, top)


@BACKBONE_REGISTRY.register()
def build_imgcls_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over the trunk of MODEL.BACKBONE.VARIANT, P6 and P7 by convolutions on its last map: for RetinaNet."""
    trunk = build_trunk(cfg, input_shape)
    last = list(trunk.output_shape())[-1]
    top = LastLevelP6P7(trunk.output_shape()[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    return _pyramid(cfg, trunk, top)


def _pyramid(cfg: CfgNode, trunk: Trunk, top_block: nn.Module) -> FPN:
    if not cfg.MODEL.FPN.IN_FEATURES:
        allowed = "names of the trunk's maps, e.g. ['res3', 'res4', 'res5']"
        raise Problem("the pyramid has no input", [], allowed, "MODEL.FPN.IN_FEATURES").error()
    return FPN(
        bottom_up=trunk,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
