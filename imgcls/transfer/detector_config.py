"""The keys that a detectron2 detector needs for a hand-over file: as a fragment of YAML, or as a whole config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg

from imgcls.config import get_config
from imgcls.config.yaml_writing import as_yaml, changed_from, nested
from imgcls.modeling import Architecture, family_of, make_trunk
from imgcls.modeling.build import OPTIONS
from imgcls.structures import PreprocessingContract, Problem
from imgcls.transfer.handover import Handover

# Detector -> detectron2's stock YAML that ours resolves to, and the packaged one with the same values.
DETECTORS = {
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "detection/resnet50_retinanet_fpn.yaml"),
    "faster_rcnn": ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "detection/resnet50_faster_rcnn_fpn.yaml"),
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "detection/resnet50_mask_rcnn_fpn.yaml"),
}

# Stages that detectron2's configs freeze.
STOCK_FREEZE_AT = 2

_FRAGMENT = """\
# The keys that a detectron2 detector needs for {weights}; put them over any of detectron2's FPN configs.
# NAME: {retinanet} for RetinaNet, {others} for Faster and Mask R-CNN.
"""
_WHOLE = """\
# {detector} over {variant}: detectron2's {stock} but for the backbone, weights and input keys.
# Self-contained; a script that reads it with detectron2's get_cfg() calls imgcls.add_imgcls_config(cfg) first.
"""


def detector_keys(
    architecture: Architecture, contract: PreprocessingContract, detector: str, weights: str
) -> dict[str, Any]:
    """Dotted key -> value of all that a stock config of ``detector`` must change for this trunk."""
    family = family_of(architecture.variant)
    pyramid, retinanet = family.pyramids
    keys: dict[str, Any] = {
        "MODEL.WEIGHTS": weights,
        "MODEL.BACKBONE.NAME": retinanet if detector == "retinanet" else pyramid,
        "MODEL.BACKBONE.VARIANT": architecture.variant,
        "MODEL.BACKBONE.STEM": architecture.stem,
        "MODEL.PIXEL_MEAN": list(contract.pixel_mean),
        "MODEL.PIXEL_STD": list(contract.pixel_std),
        "INPUT.FORMAT": contract.input_format,
    }
    if architecture.norm == "GN":
        # BatchNorm travels into whatever a detector uses (frozen by default); GroupNorm stays GroupNorm.
        keys["MODEL.BACKBONE.NORM"] = "GN"
    if detector != "retinanet" and getattr(family.variants[architecture.variant], "finest_level", 2) == 3:
        # No map of stride 4 can be made of this trunk's: levels and anchors begin at p3.
        keys["MODEL.RPN.IN_FEATURES"] = ["p3", "p4", "p5", "p6"]
        keys["MODEL.ROI_HEADS.IN_FEATURES"] = ["p3", "p4", "p5"]
        keys["MODEL.ANCHOR_GENERATOR.SIZES"] = [[64], [128], [256], [512]]
    if stage_count(architecture) < STOCK_FREEZE_AT:
        # The stock value would freeze more stages than there are, and one may be the whole network.
        keys["MODEL.BACKBONE.FREEZE_AT"] = 0
    for option, value in architecture.options.items():
        keys[f"MODEL.BACKBONE.{OPTIONS[option]}"] = value
    return keys


def stage_count(architecture: Architecture) -> int:
    """How many stages MODEL.BACKBONE.FREEZE_AT can count."""
    try:
        with torch.device("meta"):
            trunk = make_trunk(architecture, for_detector=True)
    except (RuntimeError, NotImplementedError):  # some of timm's networks cannot be built without memory
        trunk = make_trunk(architecture, for_detector=True)
    return len(trunk.stage_modules())


def detector_fragment(handover: Handover, weights: str | Path) -> str:
    """YAML text with the backbone, weights and input keys of ``handover``."""
    keys = detector_keys(handover.architecture, handover.contract, "retinanet", str(weights))
    others, retinanet = family_of(handover.architecture.variant).pyramids
    head = _FRAGMENT.format(weights=weights, retinanet=retinanet, others=others)
    return head + as_yaml(nested({"VERSION": 2, **keys}))


def detector_yaml(detector: str, architecture: Architecture, contract: PreprocessingContract, weights: str = "") -> str:
    """A whole YAML of ``detector`` over this trunk, independent of any other file.

    Without weights the trunk starts at random and nothing is frozen.
    """
    if detector not in DETECTORS:
        raise Problem("there is no such detector", detector, ", ".join(DETECTORS), "--detector").error()
    stock, packaged = DETECTORS[detector]
    keys = detector_keys(architecture, contract, detector, weights)
    if not weights:
        keys["MODEL.BACKBONE.FREEZE_AT"] = 0
    cfg = get_config(packaged, [word for pair in keys.items() for word in pair])
    changed = changed_from(get_cfg(), cfg)
    changed["VERSION"] = 2
    head = _WHOLE.format(detector=detector, variant=architecture.variant, stock=stock)
    return head + as_yaml(changed)
