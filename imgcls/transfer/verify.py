"""Proof that a hand-over arrives: every tensor bit for bit, and the same features from the detector's trunk."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn

from imgcls.modeling import Trunk, is_bookkeeping
from imgcls.structures import LoadReport, PreprocessingContract
from imgcls.transfer.convert import make_handover
from imgcls.transfer.handover import Handover, read_handover
from imgcls.transfer.load import body_of, contradictions
from imgcls.transfer.probe import (
    bare_trunk,
    difference_to_probe,
    features,
    probe_image,
    relative_difference,
    stage_maps,
)

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass
class Verification:
    """Outcome of :func:`verify`.

    report: what became of each tensor, by its name in the detector's body.
    coverage: rows (stage, loaded, new, missing, unexpected, wrong shape).
    differences: {"float32": {stage: relative difference}, "float64": {...}}.
    problems: why it failed; empty when it passed.
    """

    report: LoadReport = field(default_factory=LoadReport)
    coverage: list[tuple[str, int, int, int, int, int]] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """The whole outcome for people."""
        header = ("module", "loaded", "new", "missing", "unexpected", "wrong shape")
        lines = [tabulate(self.coverage, headers=header)] if self.coverage else []
        for name in self.report.new:
            lines.append(f"new in the detector (by the family's list): {name}")
        for dtype, by_stage in self.differences.items():
            worst = max(by_stage.values())
            listed = ", ".join(f"{stage} {value:.1e}" for stage, value in by_stage.items())
            lines.append(f"largest relative difference of the features in {dtype}: {worst:.1e} ({listed})")
        lines += [f"FAILED: {problem}" for problem in self.problems]
        if self.passed:
            lines.append(f"OK: {len(self.report.loaded)} of {self.report.wanted} tensors arrived bit for bit")
        return "\n".join(lines)


def verify(weights: str | Path, cfg: CfgNode, classifier: str | Path | None = None) -> Verification:
    """Load ``weights`` into the detector of ``cfg`` with detectron2's own checkpointer and look at what arrived.

    classifier: the checkpoint that the file was made from; whole maps are compared with it then, otherwise the
        channels' means that the file carries. Raises ``ValueError`` only where there is no file of the right kind.
    """
    handover = read_handover(weights)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", str(weights)
    result = Verification()
    if not handover.intact:
        result.problems.append("the content is not what its digest was made of: the file is damaged or was changed")
    try:
        model = build_model(cfg)
    except ValueError as error:
        # The builder's own guard has refused the file: nothing can be measured in a detector that must not be built.
        result.problems.append(str(error))
        return result
    body = body_of(model)
    if not isinstance(body, Trunk):
        result.problems += contradictions(handover, cfg, body)
    _load_as_detectron2_does(model, weights)
    _account_for_tensors(result, handover, model, body)
    _compare_features(result, handover, cfg, body, classifier)
    return result


def _load_as_detectron2_does(model: nn.Module, weights: str | Path) -> None:
    # Its tables and warnings would drown the report, which says the same per module.
    logging.disable(logging.WARNING)
    try:
        DetectionCheckpointer(model).load(str(weights))
    finally:
        logging.disable(logging.NOTSET)


def _account_for_tensors(result: Verification, handover: Handover, model: nn.Module, body: nn.Module) -> None:
    own = {name: tensor for name, tensor in body.state_dict().items() if not is_bookkeeping(name)}
    given = handover.weights
    arrived = [name for name in own if name in given and _same_bits(own[name], given[name])]
    wrong = [
        (name, tuple(given[name].shape), tuple(own[name].shape))
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    rest = [name for name in own if name not in set(arrived) | {name for name, *_ in wrong}]
    new = [n for n in rest if n not in given and isinstance(body, Trunk) and body.is_detector_only(n)]
    result.report = LoadReport(
        loaded=tuple(arrived),
        missing=tuple(name for name in rest if name not in new),
        unexpected=tuple(
            name for name in given if name not in own and not _arrived_elsewhere(name, given[name], model)
        ),
        wrong_shape=tuple(wrong),
        new=tuple(new),
    )
    result.coverage = _by_module(result.report)
    if not result.report.complete:
        result.problems.append(result.report.summary() + _why(own, given))
    result.problems += _frozen_but_not_loaded(body, set(arrived))


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _arrived_elsewhere(name: str, tensor: Tensor, model: nn.Module) -> bool:
    """detectron2's C4 heads hold the last stage: a tensor may arrive outside the body."""
    return any(key.endswith("." + name) and _same_bits(own, tensor) for key, own in model.state_dict().items())


def _by_module(report: LoadReport) -> list[tuple[str, int, int, int, int, int]]:
    kinds = (
        report.loaded,
        report.new,
        report.missing,
        report.unexpected,
        tuple(name for name, *_ in report.wrong_shape),
    )
    counts = [Counter(name.split(".")[0] for name in names) for names in kinds]
    modules = sorted(set().union(*counts), key=lambda name: (name != "stem", name))
    return [(module, *(count[module] for count in counts)) for module in modules]  # type: ignore[misc]


def _why(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Whether the file's keys are the body's behind a prefix: the commonest reason that nothing is found."""
    first = next(iter(own))
    for name in given:
        prefix = name.removesuffix(first)
        if prefix != name and prefix and all(prefix + key in given for key in own):
            return f". The file's keys begin with {prefix!r}; a hand-over has none: write it with convert_to_detection"
    return ""


def _frozen_but_not_loaded(body: nn.Module, arrived: set[str]) -> list[str]:
    frozen = [name for name, parameter in body.named_parameters() if not parameter.requires_grad]
    lost = [name for name in frozen if name not in arrived]
    if not lost:
        return []
    return [f"{len(lost)} frozen tensors were not loaded ({', '.join(lost[:3])}, ...): they would stay random"]


def _compare_features(
    result: Verification, handover: Handover, cfg: CfgNode, body: nn.Module, classifier: str | Path | None
) -> None:
    probe = handover.probe
    image = probe_image(probe["seed"], probe["size"], len(cfg.MODEL.PIXEL_MEAN))
    as_detector = PreprocessingContract(
        cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD), probe["size"], 0, ""
    )
    original = make_handover(classifier) if classifier is not None else handover
    trunk = _trunk_alone(original)
    for dtype, limit in LIMITS.items():
        maps = features(body, image, as_detector, dtype)
        known = {n: value for n, value in maps.items() if n in probe["means"] and not _dilated(n, body, trunk)}
        if trunk is None or (original is handover and dtype == torch.float64):
            # What the file's writer saw: rounding of float32 would be told as a difference here, float64's is not.
            found = difference_to_probe(known, probe)
        else:
            theirs = stage_maps(trunk, image, original.contract, dtype)
            found = {
                name: relative_difference(theirs[name], value) if theirs[name].shape == value.shape else float("inf")
                for name, value in known.items()
            }
            if handover.folded and original is not handover:
                # Folding rounds the first convolution to float32 once more: float64 sees that rounding.
                limit = LIMITS[torch.float32]
        if not found:
            result.problems.append(f"the detector reads none of the maps that the file describes ({', '.join(maps)})")
            return
        label = str(dtype).removeprefix("torch.")
        result.differences[label] = found
        worst = max(found, key=lambda name: found[name])
        if not found[worst] <= limit:
            result.problems.append(
                f"the features of {worst} differ by {found[worst]:.1e} of their largest value in {label} (limit "
                f"{limit:.0e})" + _swapped(handover, body, image, as_detector)
            )


def _trunk_alone(handover: Handover) -> Trunk | None:
    """The file's trunk outside any detector; None where its tensors do not even make one (which is told elsewhere)."""
    try:
        return bare_trunk(handover.architecture, handover.weights, len(handover.contract.pixel_mean))
    except ValueError:
        return None


def _dilated(name: str, body: nn.Module, trunk: Trunk | None) -> bool:
    """Whether the detector keeps a map at another stride (MODEL.BACKBONE.OUTPUT_STRIDE): it is another map then."""
    if trunk is None or not isinstance(body, Trunk):
        return False
    return body._out_feature_strides[name] != trunk._out_feature_strides[name]


def _swapped(handover: Handover, body: nn.Module, image: Tensor, contract: PreprocessingContract) -> str:
    """Whether reading the channels in the other order explains a difference."""
    maps = features(body, image, contract, torch.float64, swap_channels=True)
    known = {name: value for name, value in maps.items() if name in handover.probe["means"]}
    if max(difference_to_probe(known, handover.probe).values()) > LIMITS[torch.float32]:
        return ""
    return "; with the channels in the other order they agree: the first convolution's channels (RGB, BGR) are swapped"
