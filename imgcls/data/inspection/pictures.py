"""What the pictures are: readable, large enough, of what kind and colours; and how they spread over the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode

from imgcls.data.inspection.findings import NOTE, SERIOUS, WARNING, Finding, first
from imgcls.data.inspection.fingerprint import KINDS
from imgcls.data.inspection.survey import Survey

ASPECT = 3.0  # longer to shorter side; a centre crop of more loses most of the picture
RATIO = 10.0  # largest to smallest class
FEW = 5  # pictures of a class in val below which its figures are mostly chance


def unreadable_findings(survey: Survey) -> list[Finding]:
    """The files that training would stumble over."""
    if not survey.errors:
        return []
    lines = (f"{survey.name(row)}: {_reason(survey, row)}" for row in sorted(survey.errors))
    what = "pictures that cannot be read: training ends at the first"
    remedy = "replace or remove them; or set DATALOADER.ON_ERROR skip to leave them out"
    return [Finding(SERIOUS, "unreadable", survey.role, len(survey.errors), what, first(lines), remedy)]


def _reason(survey: Survey, row: int) -> str:
    """Without the name, which stands before it, and the remedy, which stands below."""
    told = survey.errors[row].removeprefix(f"cannot read the image {survey.name(row)}: ")
    return told.removesuffix("; replace the file or remove it")


def balance_findings(survey: Survey) -> list[Finding]:
    """Empty and rare classes, and the effective number of classes."""
    counts = class_counts(survey)
    classes, role = survey.source.classes, survey.role
    found = []
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty and role == "train":
        what, remedy = "classes without a picture", "add pictures, or take them out of the list of classes"
        found.append(Finding(WARNING, "class_empty", role, len(empty), what, first(empty), remedy))
    present = counts[counts > 0]
    if len(present) and present.max() >= RATIO * present.min():
        rarest = [f"{classes[index]}: {counts[index]}" for index in np.argsort(counts, kind="stable") if counts[index]]
        what = (
            f"classes, the largest with {present.max()} pictures, the smallest with {present.min()} "
            f"({present.max() / present.min():.0f} : 1); as good as {effective_number(counts):.1f} of equal size"
        )
        remedy = "DATALOADER.SAMPLING balanced, or MODEL.LOSS.CLASS_WEIGHTS ['balanced']; judge by balanced_accuracy"
        if survey.labels.ndim > 1:
            remedy = "MODEL.LOSS.POS_WEIGHTS ['balanced']; judge by mAP"
        found.append(Finding(WARNING, "imbalance", role, len(present), what, first(rarest), remedy))
    few = [f"{name}: {count}" for name, count in zip(classes, counts, strict=True) if 0 < count < FEW]
    if few and role == "val":
        what = f"classes with fewer than {FEW} pictures in val: their figures are mostly chance"
        found.append(Finding(NOTE, "class_small_in_val", role, len(few), what, first(few), "add pictures to val"))
    return found


def class_counts(survey: Survey) -> np.ndarray:
    """(K,) how many pictures each class has."""
    if survey.labels.ndim > 1:
        return (survey.labels > 0).sum(axis=0)
    return np.bincount(survey.labels[survey.labels >= 0], minlength=len(survey.source.classes))


def effective_number(counts: np.ndarray) -> float:
    """How many classes of equal size would be as diverse: e to the entropy (Hill 1973, the number of order 1)."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def size_findings(survey: Survey, cfg: CfgNode) -> list[Finding]:
    """Pictures that have to be enlarged, and very long ones."""
    sizes = survey.sizes[survey.good]
    if not len(sizes):
        return []
    key = "INPUT.TRAIN_SIZE" if survey.role == "train" else "INPUT.TEST_SIZE"
    side = cfg.INPUT.TRAIN_SIZE if survey.role == "train" else cfg.INPUT.TEST_SIZE
    found = []
    rows, short = np.flatnonzero(survey.good), sizes.min(axis=1)
    small = np.flatnonzero(short < side)
    if len(small):
        severity = WARNING if len(small) >= 0.01 * len(short) else NOTE
        middle = f"the median short side is {np.median(short):.0f}"
        what = f"pictures with a side below {key} {side}: they are enlarged; {middle}"
        lines = _sized(survey, rows[small[np.argsort(short[small], kind="stable")]])
        remedy = f"lower {key}, or remove the smallest"
        found.append(Finding(severity, "too_small", survey.role, len(small), what, lines, remedy))
    long = np.flatnonzero(sizes.max(axis=1) > ASPECT * short)
    if len(long):
        what = f"pictures more than {ASPECT:g} times as long as wide: crops see little of them"
        remedy = "look at them; cut them up, or remove them"
        found.append(Finding(NOTE, "too_long", survey.role, len(long), what, _sized(survey, rows[long]), remedy))
    return found


def _sized(survey: Survey, rows: np.ndarray) -> tuple[str, ...]:
    return first(f"{survey.name(int(row))}: {survey.sizes[row][0]} x {survey.sizes[row][1]}" for row in rows)


def kind_findings(survey: Survey) -> list[Finding]:
    """Pictures that the reader changes to get 8-bit RGB: said once each, since another program may do otherwise."""
    number = max(1, int(survey.good.sum()))
    remedies = {
        "grey": "nothing: they become three equal channels",
        "grey in colour": "nothing",
        "transparent": "transparency is dropped; if what is behind matters, put them on a background",
        "16 bits": "nothing: they are scaled to 8 bits",
        "turned by EXIF": "nothing: they are set upright, in training and evaluation alike",
        "animated": "only the first picture is used",
    }
    found = []
    for bit, kind in enumerate(KINDS):
        rows = np.flatnonzero(survey.good & (survey.kinds >> bit & 1 == 1))
        if len(rows):
            code, what = (
                f"kind_{kind.replace(' ', '_').lower()}",
                f"pictures that are {kind} ({len(rows) / number:.1%})",
            )
            # Where most are of a kind, five of them say nothing.
            examples = first(survey.name(int(row)) for row in rows) if len(rows) < 0.5 * number else ()
            remedy = remedies.get(kind, "nothing: they become 8-bit RGB")
            found.append(Finding(NOTE, code, survey.role, len(rows), what, examples, remedy))
    return found


def colour_findings(survey: Survey, cfg: CfgNode) -> list[Finding]:
    """The mean and standard deviation of the set's values beside the config's."""
    mean, std = mean_and_std(survey)
    stated_mean, stated_std = np.array(cfg.MODEL.PIXEL_MEAN), np.array(cfg.MODEL.PIXEL_STD)
    if not survey.good.any() or len(stated_mean) != 3:
        return []
    off = np.abs(mean - stated_mean).max() > stated_std.min() or not (0.5 < (std / stated_std).mean() < 2)
    what = (
        f"pictures: mean {_three(mean)}, std {_three(std)} (RGB); the config has MODEL.PIXEL_MEAN "
        f"{_three(stated_mean)}, PIXEL_STD {_three(stated_std)}"
    )
    remedy = "nothing"
    if off:
        remedy = "with weights that were trained elsewhere nothing; from scratch, set these keys to the set's own"
    return [Finding(NOTE, "colours", survey.role, int(survey.good.sum()), what, (), remedy)]


def mean_and_std(survey: Survey) -> tuple[np.ndarray, np.ndarray]:
    """Each (3,), RGB in 0..255, over all pictures as if they were of one size."""
    moments = survey.moments[survey.good].astype(np.float64)
    if not len(moments):
        return np.zeros(3), np.zeros(3)
    mean = moments[:, 0].mean(axis=0)
    return mean, np.sqrt(np.maximum(moments[:, 1].mean(axis=0) - mean**2, 0))


def _three(values: Sequence[float] | np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.1f}" for value in values) + "]"
