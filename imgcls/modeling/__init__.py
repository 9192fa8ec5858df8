"""Networks: families, trunks, necks, heads, losses and ClsNet."""

from imgcls.modeling import backbones, necks
from imgcls.modeling.backbone_base import Architecture, StagedTrunk, Trunk, is_bookkeeping
from imgcls.modeling.build import BUILD_GUARDS, build_trunk, build_variant, is_classifier, make_trunk, plain
from imgcls.modeling.cls_net import ClsNet, make_classifier
from imgcls.modeling.distillation import Distillation, Teacher
from imgcls.modeling.heads import HEAD_REGISTRY
from imgcls.modeling.input_channels import fit_channels, fit_to_input, input_convolution
from imgcls.modeling.losses import BALANCED, LOSS_REGISTRY, build_loss
from imgcls.modeling.spec import (
    Family,
    Source,
    all_variants,
    families,
    family_of,
    register_family,
    same_network,
    variant_problem,
)

__all__ = [
    "BALANCED",
    "BUILD_GUARDS",
    "HEAD_REGISTRY",
    "LOSS_REGISTRY",
    "Architecture",
    "ClsNet",
    "Distillation",
    "Family",
    "Source",
    "StagedTrunk",
    "Teacher",
    "Trunk",
    "all_variants",
    "backbones",
    "build_loss",
    "build_trunk",
    "build_variant",
    "families",
    "family_of",
    "fit_channels",
    "fit_to_input",
    "input_convolution",
    "is_bookkeeping",
    "is_classifier",
    "make_classifier",
    "make_trunk",
    "necks",
    "plain",
    "register_family",
    "same_network",
    "variant_problem",
]
