"""Networks: families, trunks, necks, heads, losses and ClsNet."""

from imgcls.modeling import backbones, necks
from imgcls.modeling.backbone_base import Architecture, StagedTrunk, Trunk, is_bookkeeping
from imgcls.modeling.build import BUILD_GUARDS, build_trunk, is_classifier
from imgcls.modeling.cls_net import ClsNet
from imgcls.modeling.heads import HEAD_REGISTRY
from imgcls.modeling.losses import LOSS_REGISTRY
from imgcls.modeling.spec import Family, all_variants, family_of, register_family

__all__ = [
    "BUILD_GUARDS",
    "HEAD_REGISTRY",
    "LOSS_REGISTRY",
    "Architecture",
    "ClsNet",
    "Family",
    "StagedTrunk",
    "Trunk",
    "all_variants",
    "backbones",
    "build_trunk",
    "family_of",
    "is_bookkeeping",
    "is_classifier",
    "necks",
    "register_family",
]
