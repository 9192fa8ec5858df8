"""Reading what a trainer left, without any of the code that is on trial: checkpoints, metrics.json, the trace."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Digests = dict[str, str]  # of each tensor and value in a checkpoint, by its dotted name

# Of a line in metrics.json: how long things took, and what they took it on.
TIMES = re.compile(r"time|seconds|images_per_second|memory|max_mem")
POINTER, BEST, FINAL = "last_checkpoint", "model_best.pth", "model_final.pth"


@dataclass
class Checkpoint:
    """One file as it lies there. problem: why it cannot be relied on; empty when nothing is wrong."""

    path: Path
    problem: str = ""
    iteration: int = -1
    digests: Digests = field(default_factory=dict)

    @property
    def owes_evaluation(self) -> bool:
        """Whether a signal cut the evaluation of its iteration short."""
        return any(name.startswith("evaluation_due.") for name in self.digests)


def read_checkpoint(path: Path) -> Checkpoint:
    """Load it, and look for numbers that are not finite and for a manifest that is another file's."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        digests = {name: _digest(value) for name, value in leaves(content) if name != "digest"}
        iteration = int(content["iteration"])
    except Exception as error:  # whatever torch makes of a file that is torn
        return Checkpoint(path, f"{path.name} cannot be read: {type(error).__name__}", named_iteration(path))
    found = Checkpoint(path, "", iteration, digests)
    bad = [name for name, value in leaves(content) if _not_finite(value)]
    manifest = path.with_name(f"{path.name}.json")
    if bad:
        found.problem = f"{path.name} is not finite in {bad[0]}"
    elif manifest.is_file() and not _fits(manifest, path):
        found.problem = f"{manifest.name} is not that of {path.name}"
    return found


def named_iteration(path: Path) -> int:
    """The iteration that the name of a file says, that of the last one being behind all others."""
    number = path.stem.removeprefix("model_")
    return int(number) if number.isdecimal() else sys.maxsize if path.name == FINAL else -1


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts and lists that is neither, with its dotted name; empty ones count as values."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    if not items:
        yield name, value
    for key, item in items:
        yield from leaves(item, f"{name}.{key}" if name else str(key))


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        tensor = value.detach().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return f"{tensor.dtype}{tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
    return repr(value)


def _not_finite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())


def _fits(manifest: Path, path: Path) -> bool:
    try:
        stated = json.loads(manifest.read_text(encoding="utf-8"))
        return bool(stated["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest())
    except (ValueError, KeyError, TypeError):
        return False


def checkpoints(folder: Path) -> dict[str, Checkpoint]:
    """Every file under a checkpoint's name."""
    return {path.name: read_checkpoint(path) for path in sorted(folder.glob("model_*.pth"))}


def newest(found: Mapping[str, Checkpoint]) -> Checkpoint | None:
    """The one that a resume ought to take: of the highest iteration among those that are sound, the best one apart."""
    sound = [checkpoint for name, checkpoint in found.items() if not checkpoint.problem and name != BEST]
    return max(sound, key=lambda checkpoint: checkpoint.iteration, default=None)


def pointed_at(folder: Path) -> str:
    """The file that ``last_checkpoint`` names; empty without one."""
    pointer = folder / POINTER
    return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""


def differing(ours: Digests, theirs: Digests) -> list[str]:
    """The names under which two checkpoints differ."""
    return sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))


def json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file that are JSON objects, and how many are not."""
    if not path.is_file():
        return [], 0
    good, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            good.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            bad += 1
    return good, bad


def figures(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.json without their times."""
    lines, _ = json_lines(path)
    return [{key: value for key, value in line.items() if not TIMES.search(key)} for line in lines]


def line_problems(name: str, path: Path, theirs: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a file of lines, beside those of the run that nobody killed."""
    ours, torn = (figures(path), json_lines(path)[1])
    problems = [f"{torn} lines of {name} do not parse"] if torn else []
    steps = [line.get("iteration", -1) for line in ours]
    if steps != sorted(set(steps)):
        problems.append(f"the iterations of {name} do not rise strictly")
    expected = {line["iteration"]: line for line in theirs}
    missing = sorted(set(expected) - set(steps))
    other = [
        line["iteration"] for line in ours if line.get("iteration") in expected and line != expected[line["iteration"]]
    ]
    if missing or len(set(steps) - set(expected)):
        problems.append(f"{name} has {len(steps)} lines, not {len(theirs)}; missing: {missing[:5]}")
    if other:
        problems.append(f"{name} differs from the uninterrupted run from iteration {other[0]} on")
    return problems


@dataclass
class Reference:
    """The run that nobody killed."""

    checkpoints: dict[str, Checkpoint]  # as they lie there at the end
    states: dict[int, Digests]  # of every checkpoint that there ever was, by its iteration
    metrics: list[dict[str, Any]]
    trace: list[dict[str, Any]]
    places: list[tuple[int, str, str]]  # iteration, operation and file of everything done inside a save, in order
    seconds: float  # from its start to its end

    def end_problems(self, run: Path, trace: Path, *, extra: bool = False) -> list[str]:
        """How a finished run differs from this one. extra: it may have checkpoints of other iterations as well."""
        ours = checkpoints(run)
        problems = [checkpoint.problem for checkpoint in ours.values() if checkpoint.problem]
        if not extra and set(ours) != set(self.checkpoints):
            problems.append(f"there are {', '.join(ours)}; expected {', '.join(self.checkpoints)}")
        for name in sorted({BEST, FINAL} | (set() if extra else set(ours))):
            if name not in ours or name not in self.checkpoints:
                problems += [f"{name} is missing"] if name in {*ours, *self.checkpoints} else []
                continue
            other = differing(ours[name].digests, self.checkpoints[name].digests)
            if other:
                problems.append(f"{name} differs in {len(other)} entries, e.g. {other[0]}")
        problems += [f"{left.name} is left" for left in run.glob(".*.tmp")]
        problems += line_problems("metrics.json", run / "metrics.json", self.metrics)
        problems += line_problems("the trace", trace, self.trace)
        return problems

    def state_problems(self, found: Mapping[str, Checkpoint]) -> list[str]:
        """Checkpoints that are not what the uninterrupted run had at their iteration.

        One that says that its evaluation is due still, for a signal cut it short, has nothing to be compared with.
        """
        problems = []
        for name, checkpoint in found.items():
            if checkpoint.problem:
                problems.append(checkpoint.problem)
            elif checkpoint.iteration in self.states and not checkpoint.owes_evaluation:
                other = differing(checkpoint.digests, self.states[checkpoint.iteration])
                if other:
                    problems.append(
                        f"{name} differs in {len(other)} entries from the uninterrupted run, e.g. {other[0]}"
                    )
        return problems
