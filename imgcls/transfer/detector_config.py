"""The fragment of a detector's YAML that goes with a hand-over file."""

from __future__ import annotations

from pathlib import Path

from imgcls.transfer.handover import Handover

_TEMPLATE = """\
# The keys that a detectron2 detector needs for {weights}; put them over any of detectron2's FPN configs.
# NAME: build_imgcls_retinanet_fpn_backbone for RetinaNet, build_imgcls_fpn_backbone for Faster and Mask R-CNN.
VERSION: 2
MODEL:
  WEIGHTS: "{weights}"
  BACKBONE:
    NAME: build_imgcls_retinanet_fpn_backbone
    VARIANT: {variant}
    STEM: {stem}
{norm}  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
INPUT:
  FORMAT: {format}
"""


def detector_fragment(handover: Handover, weights: str | Path) -> str:
    """YAML text with the backbone, weights and input keys of ``handover``."""
    architecture, contract = handover.architecture, handover.contract
    # BatchNorm travels into whatever a detector uses (frozen by default); GroupNorm stays GroupNorm.
    norm = f"    NORM: {architecture.norm}\n" if architecture.norm == "GN" else ""
    return _TEMPLATE.format(
        weights=weights,
        variant=architecture.variant,
        stem=architecture.stem,
        norm=norm,
        mean=list(contract.pixel_mean),
        std=list(contract.pixel_std),
        format=contract.input_format,
    )
