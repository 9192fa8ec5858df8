"""From the config to a trunk: the only place where ``MODEL.BACKBONE`` is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm

from imgcls.config import register_check
from imgcls.layers import NORMS
from imgcls.modeling.backbone_base import Architecture, Trunk
from imgcls.modeling.fitting import fitted
from imgcls.modeling.heads import FAMILY_HEAD
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
    trunk = make_trunk(
        Architecture(node.VARIANT, node.STEM, resolve_norm(cfg), _options(cfg, owner)),
        in_channels=input_shape.channels,
        out_features=_out_features(cfg, owner),
        drop_path=node.DROP_PATH,
        output_stride=node.OUTPUT_STRIDE,
        for_detector=not is_classifier(cfg),
    )
    trunk.checkpointing = node.CHECKPOINT
    trunk.freeze(node.FREEZE_AT)
    trunk.watch_arrival()
    if not is_classifier(cfg):
        if cfg.MODEL.WEIGHTS:
            trunk.weights_expected = f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS!r}"
        for guard in BUILD_GUARDS:
            guard(cfg, trunk)
    return trunk


def make_trunk(
    architecture: Architecture,
    *,
    in_channels: int = 3,
    out_features: Sequence[str] | None = None,
    drop_path: float = 0.0,
    output_stride: int = 32,
    for_detector: bool = False,
) -> Trunk:
    """The trunk of ``architecture``, with random weights; what the family cannot do is a ``ValueError``.

    out_features: maps to return; None: the one that the classifier reads (for_detector False), or the last.
    """
    family = family_of(architecture.variant)
    if architecture.stem not in family.stems:
        allowed = ", ".join(family.stems)
        raise Problem(f"{family.name} has no such stem", architecture.stem, allowed, "MODEL.BACKBONE.STEM").error()
    if drop_path and "drop_path" not in family.options:
        raise Problem(f"{family.name} has no stochastic depth", drop_path, "0.0", "MODEL.BACKBONE.DROP_PATH").error()
    if output_stride < 32 and not family.dilatable:
        what = f"the stages of {family.name} cannot be dilated"
        raise Problem(what, output_stride, "32", "MODEL.BACKBONE.OUTPUT_STRIDE").error()
    options = dict(architecture.options)
    if "drop_path" in family.options:
        options["drop_path"] = drop_path
    if "for_detector" in family.options:
        options["for_detector"] = for_detector
    trunk: Trunk = family.build(
        family.variants[architecture.variant],
        in_channels=in_channels,
        norm=architecture.norm,
        out_features=out_features,
        stem=architecture.stem,
        **options,
    )
    trunk.architecture = architecture
    trunk.detector_only = family.detector_only
    if output_stride < 32:
        trunk.dilate_to(output_stride)
    return trunk


def build_variant(
    name: str,
    *,
    out_features: Sequence[str] | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    stem: str = "standard",
    freeze_at: int = 0,
    drop_path: float = 0.0,
    output_stride: int = 32,
    **options: Any,
) -> Trunk:
    """The trunk of variant ``name`` for a detector that is built in Python, without a YAML.

    out_features: maps to return, of ceil(input / stride) pixels each; None: the last. The level below the network's
        last may be named too, and is pooled then.
    norm: BN | SyncBN | naiveSyncBN | FrozenBN | GN | auto (FrozenBN); BN and auto leave a network's own norms alone.
    freeze_at: stages to freeze; the first step refuses to train when no weights came into them.
    options: others of the family's options, by the names in ``OPTIONS`` (``pretrain_size=224``).
    """
    family = family_of(name)
    for option, value in options.items():
        if option not in OPTIONS or option not in family.options:
            allowed = ", ".join(known for known in OPTIONS if known in family.options) or "no further options"
            raise Problem(f"{family.name} has no option {option}", value, allowed, "the call of build_variant").error()
    architecture = Architecture(name, stem, norm_of(name, norm, "FrozenBN"), {k: _plain(v) for k, v in options.items()})

    def build(maps: Sequence[str] | None) -> Trunk:
        return make_trunk(
            architecture,
            in_channels=in_channels,
            out_features=maps,
            drop_path=drop_path,
            output_stride=output_stride,
            for_detector=True,
        )

    trunk = fitted(build, _plain(out_features))
    trunk.freeze(freeze_at)
    trunk.watch_arrival()
    return trunk


def _plain(value: Any) -> Any:
    """LazyConfig hands over lists of its own kind; these would end up in files."""
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return [_plain(item) for item in value] if sequence else value


def plain(variant: str) -> Architecture:
    """``variant`` with nothing chosen: BatchNorm where its norms can be chosen."""
    return Architecture(variant, norm=family_of(variant).own_norm(variant) or "BN")


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the config trains a classifier rather than a detector."""
    return cfg.MODEL.META_ARCHITECTURE == CLASSIFIER


def resolve_norm(cfg: CfgNode) -> str:
    """The kind of norm that MODEL.BACKBONE.NORM stands for here; says in the log when that is another word."""
    asked = cfg.MODEL.BACKBONE.NORM
    kind = norm_of(cfg.MODEL.BACKBONE.VARIANT, asked, "BN" if is_classifier(cfg) else "FrozenBN")
    if kind == "SyncBN" and cfg.MODEL.DEVICE == "cpu":
        # torch's SyncBatchNorm refuses CPU tensors as soon as there are two ranks.
        kind = "naiveSyncBN"
    if kind != asked and kind in NORMS:
        logger.info("MODEL.BACKBONE.NORM %s resolved to %s (%d ranks)", asked, kind, comm.get_world_size())
    return kind


def norm_of(variant: str, asked: str, auto: str) -> str:
    """The norm of ``variant`` when ``asked`` for one: the network's own if it has its own, ``auto`` for "auto"."""
    fixed = family_of(variant).own_norm(variant)
    if fixed:
        # BN stands in the base of every classifier's config; it means the BatchNorm of networks that have one.
        if asked not in ("auto", "BN", fixed):
            what = f"the norms of {variant} are not to be chosen ({fixed})"
            raise Problem(what, asked, f"auto, {fixed}", "MODEL.BACKBONE.NORM").error()
        return fixed
    kind = auto if asked == "auto" else asked
    if kind not in NORMS:
        allowed = ", ".join(("auto", *NORMS))
        raise Problem("unknown norm", asked, allowed, "MODEL.BACKBONE.NORM").error()
    return kind


# Option of a family that shapes its tensors -> key; a value that is empty or 0 leaves the row's own.
OPTIONS = {"rows": "ROWS", "pretrain_size": "PRETRAIN_SIZE", "window_size": "WINDOW_SIZE", "rel_pos": "REL_POS"}


def _options(cfg: CfgNode, family: Family) -> dict[str, Any]:
    given = {option: cfg.MODEL.BACKBONE[key] for option, key in OPTIONS.items() if cfg.MODEL.BACKBONE[key]}
    for option, value in given.items():
        if option not in family.options:
            key = f"MODEL.BACKBONE.{OPTIONS[option]}"
            raise Problem(f"{family.name} does not read this key", value, "its default", key).error()
    return given


def _out_features(cfg: CfgNode, family: Family) -> list[str] | None:
    node = cfg.MODEL.BACKBONE
    if node.OUT_FEATURES:
        return list(node.OUT_FEATURES)
    if is_classifier(cfg):
        auxiliary = family.auxiliary if cfg.MODEL.HEAD.AUX_WEIGHT > 0 and cfg.MODEL.HEAD.NAME == FAMILY_HEAD else ()
        return [*auxiliary, "res5"] if auxiliary else None
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
