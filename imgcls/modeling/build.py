"""From the config to a trunk: the only place where ``MODEL.BACKBONE`` is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm

from imgcls.config import register_check
from imgcls.layers import NORMS
from imgcls.modeling.backbone_base import Architecture, Trunk
from imgcls.modeling.spec import Family, family_of, variant_problem
from imgcls.structures import Problem

logger = logging.getLogger(__name__)

CLASSIFIER = "ClsNet"

# Called with (cfg, trunk) for every trunk built inside a detector; levels above plug their refusals in here.
BUILD_GUARDS: list[Callable[[CfgNode, Trunk], None]] = []


def build_trunk(cfg: CfgNode, input_shape: ShapeSpec, family: Family | None = None) -> Trunk:
    """The trunk of ``MODEL.BACKBONE.VARIANT``, frozen as ``FREEZE_AT`` says, guarded against weights that stay away.

    family: the one whose builder was named; None (the FPN wrappers) takes the variant's own.
    """
    _require_keys(cfg)
    node = cfg.MODEL.BACKBONE
    owner = family_of(node.VARIANT)
    if family is not None and family is not owner:
        raise Problem(
            f"the variant is not of the family of {family.builder}",
            node.VARIANT,
            f"{', '.join(family.variants)}; or MODEL.BACKBONE.NAME {owner.builder}",
            "MODEL.BACKBONE.VARIANT or MODEL.BACKBONE.NAME",
        ).error()
    if node.STEM not in owner.stems:
        raise Problem(
            f"{owner.name} has no such stem", node.STEM, ", ".join(owner.stems), "MODEL.BACKBONE.STEM"
        ).error()
    norm = resolve_norm(cfg)
    trunk: Trunk = owner.build(
        owner.variants[node.VARIANT],
        in_channels=input_shape.channels,
        norm=norm,
        out_features=_out_features(cfg),
        stem=node.STEM,
    )
    trunk.architecture = Architecture(node.VARIANT, node.STEM, norm)
    trunk.detector_only = owner.detector_only
    trunk.freeze(node.FREEZE_AT)
    trunk.watch_arrival()
    if not is_classifier(cfg):
        if cfg.MODEL.WEIGHTS:
            trunk.weights_expected = f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS!r}"
        for guard in BUILD_GUARDS:
            guard(cfg, trunk)
    return trunk


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the config trains a classifier rather than a detector."""
    return cfg.MODEL.META_ARCHITECTURE == CLASSIFIER


def resolve_norm(cfg: CfgNode) -> str:
    """The kind of norm that MODEL.BACKBONE.NORM stands for here; says in the log when that is another word."""
    asked = cfg.MODEL.BACKBONE.NORM
    kind = asked
    if asked == "auto":
        kind = "BN" if is_classifier(cfg) else "FrozenBN"
    if kind not in NORMS:
        allowed = ", ".join(("auto", *NORMS))
        raise Problem("unknown norm", asked, allowed, "MODEL.BACKBONE.NORM").error()
    if kind == "SyncBN" and cfg.MODEL.DEVICE == "cpu":
        # torch's SyncBatchNorm refuses CPU tensors as soon as there are two ranks.
        kind = "naiveSyncBN"
    if kind != asked:
        logger.info("MODEL.BACKBONE.NORM %s resolved to %s (%d ranks)", asked, kind, comm.get_world_size())
    return kind


def _out_features(cfg: CfgNode) -> list[str] | None:
    node = cfg.MODEL.BACKBONE
    if node.OUT_FEATURES:
        return list(node.OUT_FEATURES)
    if is_classifier(cfg):
        return None
    if "fpn" in node.NAME:
        return list(cfg.MODEL.FPN.IN_FEATURES)
    return ["res2", "res3", "res4", "res5"]


def _require_keys(cfg: CfgNode) -> None:
    if "VARIANT" not in cfg.MODEL.BACKBONE:
        raise Problem(
            "the config lacks imgcls' keys",
            cfg.MODEL.BACKBONE.NAME,
            "a config that went through imgcls.add_imgcls_config(cfg)",
            "the script: call add_imgcls_config(cfg) before cfg.merge_from_file",
        ).error()


@register_check
def check_backbone(cfg: CfgNode) -> list[Problem]:
    """Variant, builder and freezing, before anything is built."""
    node = cfg.MODEL.BACKBONE
    if not is_classifier(cfg) and "imgcls" not in node.NAME:
        return []
    problem = variant_problem(node.VARIANT)
    if problem is not None:
        return [problem]
    if node.FREEZE_AT > 0 and not cfg.MODEL.WEIGHTS:
        return [
            Problem(
                "stages would be frozen at random weights",
                f"FREEZE_AT {node.FREEZE_AT}, WEIGHTS ''",
                "FREEZE_AT 0, or weights to freeze",
                "MODEL.BACKBONE.FREEZE_AT or MODEL.WEIGHTS",
            )
        ]
    return _check_local_weights(cfg)


def _check_local_weights(cfg: CfgNode) -> list[Problem]:
    path = cfg.MODEL.WEIGHTS.split("?")[0]
    if path and "://" not in path and not os.path.isfile(path):
        return [Problem("there is no such file", cfg.MODEL.WEIGHTS, "a file of weights, or ''", "MODEL.WEIGHTS")]
    return []
