"""The hand-over file: one ``.pth`` with a trunk's tensors, its architecture, its contract and a probe of its features.

``{"model": {unprefixed keys}, "__author__": "imgcls", "matching_heuristics": True, "imgcls": {...}, "digest": ...}``.
Stock detectron2 matches the unprefixed keys into ``backbone.bottom_up.*`` as well as into ``backbone.*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from imgcls.checkpoint import content_digest, read_checkpoint
from imgcls.modeling import Architecture
from imgcls.structures import PreprocessingContract

AUTHOR = "imgcls"


@dataclass(frozen=True)
class Handover:
    """A hand-over file's content.

    weights: the trunk's tensors, unprefixed.
    folded: whether std and channel order were folded into the first convolution.
    probe: seed and size of the probe image, and what the trunk makes of it (see ``transfer/probe.py``).
    metrics, classes: of the classifier, for the record.
    classifier: tensors that only the classifier has (its head), under ClsNet's names. detectron2 does not see them; a
        classifier that starts from the file takes them. Empty in what is converted from a training run.
    intact: whether the content is what its digest was made of.
    """

    weights: Mapping[str, Tensor]
    architecture: Architecture
    contract: PreprocessingContract
    folded: bool
    probe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    classes: tuple[str, ...]
    classifier: Mapping[str, Tensor] = field(default_factory=dict)
    intact: bool = True

    def to_content(self) -> dict[str, Any]:
        """What is written; plain values and tensors only."""
        return {
            "model": dict(self.weights),
            "__author__": AUTHOR,
            "matching_heuristics": True,
            "imgcls": {
                "architecture": self.architecture.to_dict(),
                "contract": self.contract.to_dict(),
                "folded": self.folded,
                "probe": dict(self.probe),
                "metrics": dict(self.metrics),
                "classes": list(self.classes),
                "classifier": dict(self.classifier),
            },
        }


def read_handover(path: str | Path, *, mmap: bool = False) -> Handover:
    """Read a hand-over file; a file of another kind is a ``ValueError`` that says which and what to do.

    A digest that does not hold is left to the caller (``intact``): verifying wants to say what else is wrong.
    """
    content = read_checkpoint(path, mmap=mmap, check_digest=False)
    if is_classifier_checkpoint(content):
        raise ValueError(
            f"{path} is a classifier's checkpoint; its keys match nothing in a detector. Convert it first: "
            f"convert_to_detection --weights {path} --output backbone.pth, and give MODEL.WEIGHTS backbone.pth"
        )
    notes = content.get("imgcls")
    if not isinstance(notes, dict):
        raise ValueError(
            f"{path} was not written by convert_to_detection: it has no preprocessing contract. "
            "Convert a classifier's checkpoint with convert_to_detection"
        )
    intact = mmap or content.get("digest") == content_digest(content)
    return Handover(
        weights=content["model"],
        architecture=Architecture(**notes["architecture"]),
        contract=PreprocessingContract.from_dict(notes["contract"]),
        folded=notes["folded"],
        probe=notes["probe"],
        metrics=notes["metrics"],
        classes=tuple(notes["classes"]),
        classifier=notes.get("classifier", {}),
        intact=intact,
    )


def is_classifier_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is what imgcls' training writes."""
    return "contract" in content and "architecture" in content
