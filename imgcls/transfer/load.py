"""Putting a hand-over into a detector, and refusing what would not work there."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from torch import nn

from imgcls.checkpoint import load_weights, local_path, read_checkpoint
from imgcls.modeling import BUILD_GUARDS, Trunk, same_network
from imgcls.structures import LoadReport
from imgcls.transfer.handover import Handover, is_classifier_checkpoint, read_handover

# Names that transfer/path_handlers.py makes files of.
OF_LIBRARIES = ("torchvision://", "timm://")


def body_of(model: nn.Module) -> nn.Module:
    """The part of a detector that a classifier's trunk becomes: under an FPN its bottom-up, otherwise the backbone."""
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise ValueError(f"a {type(model).__name__} has no backbone; give a detectron2 detector")
    for name in ("bottom_up", "net"):
        if hasattr(backbone, name):
            return getattr(backbone, name)
    return backbone


def load_backbone(model: nn.Module, file: str | Path, cfg: CfgNode | None = None) -> LoadReport:
    """Load a hand-over file into ``model`` (a detector built from ``cfg``), with proof.

    cfg: None, as where a LazyConfig built it: the model itself tells its channel order, mean and std.

    Every tensor of the file must find its place and every tensor of the body must come from the file, but for those
    that the family lists as a detector's own. ``ValueError`` otherwise, and when ``cfg`` contradicts the contract;
    nothing has been changed then. Returns the report of what was loaded.
    """
    handover = read_handover(file)
    if not handover.intact:
        raise ValueError(f"{file} is damaged or was changed: its content is not what its digest was made of")
    body = body_of(model)
    problems = contradictions(handover, stated_by(model) if cfg is None else cfg, body)
    if problems:
        raise ValueError(f"{file} does not fit the config: " + "; ".join(problems))
    excused = body.is_detector_only if isinstance(body, Trunk) else None
    report = load_weights(body, handover.weights, may_be_new=excused)
    return report.require_complete(str(file), "Check MODEL.BACKBONE.VARIANT, or run verify_transfer on the file")


def stated_by(model: nn.Module) -> CfgNode:
    """The input keys of a config, read off a detector of detectron2's."""
    cfg = get_cfg()
    if getattr(model, "input_format", None) is None or not hasattr(model, "pixel_mean"):
        raise ValueError(
            f"a {type(model).__name__} does not say its input_format and pixel_mean; give load_backbone a cfg"
        )
    cfg.INPUT.FORMAT = model.input_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = (
        getattr(model, name).flatten().tolist() for name in ("pixel_mean", "pixel_std")
    )
    return cfg


def contradictions(handover: Handover, cfg: CfgNode, body: nn.Module) -> list[str]:
    """What in a detector's config contradicts the hand-over: input keys, variant, stem, norm."""
    problems = [f"{line} (set {line.split(' ', 1)[0]} to the latter)" for line in handover.contract.differences(cfg)]
    if not isinstance(body, Trunk):
        return problems
    ours, theirs = body.architecture, handover.architecture
    for key, mine, other in (("VARIANT", ours.variant, theirs.variant), ("STEM", ours.stem, theirs.stem)):
        if mine != other and not (key == "VARIANT" and same_network(mine, other)):
            problems.append(
                f"MODEL.BACKBONE.{key} is {mine!r} in the config, the weights are of {other!r} "
                f"(set MODEL.BACKBONE.{key} to the latter)"
            )
    if (ours.norm == "GN") != (theirs.norm == "GN"):
        problems.append(f"MODEL.BACKBONE.NORM is {ours.norm!r} in the config, the weights need {theirs.norm!r}")
    return problems


def guard_weights(cfg: CfgNode, trunk: Trunk) -> None:
    """Called when a trunk is built for a detector: refuse a local ``MODEL.WEIGHTS`` that contradicts the config.

    So a stock trainer that only imports imgcls is guarded too. Files of other origin (a detector's own checkpoint, a
    model zoo's) carry no contract and pass; that their tensors arrive is checked by the first training forward.
    """
    path = cfg.MODEL.WEIGHTS.split("?")[0]
    if path.startswith(OF_LIBRARIES):
        path = str(local_path(path))
    if not os.path.isfile(path) or Path(path).suffix not in (".pth", ".pt"):
        return
    content = read_checkpoint(path, mmap=True, check_digest=False)
    if not (is_classifier_checkpoint(content) or "imgcls" in content):
        return
    problems = contradictions(read_handover(path, mmap=True), cfg, trunk)
    if problems:
        raise ValueError(f"MODEL.WEIGHTS {path} does not fit the config: " + "; ".join(problems))


BUILD_GUARDS.append(guard_weights)
