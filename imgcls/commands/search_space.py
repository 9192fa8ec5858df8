"""The search space of a sweep: a YAML whose keys are config keys, and what may stand there.

SOLVER.BASE_LR: [0.01, 1.0, log]             # a number in between, even over the orders of magnitude
MODEL.LOSS.LABEL_SMOOTHING: [0.0, 0.2]       # a number in between
SOLVER.MAX_ITER: [100, 1000, int]            # a whole number, both ends included
SOLVER.OPTIMIZER: {choices: [SGD, AdamW]}    # one of these
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode

from imgcls.config.yaml_reading import Tree, read_yaml
from imgcls.structures import Problem

if TYPE_CHECKING:
    from optuna.trial import Trial

ALLOWED = "[low, high], with log or int or both behind, or {choices: [...]}"
WORDS = {"log", "int"}


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``, both included; log: its logarithm is what is even. whole: 1, 2, 3 ..."""

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Trial) -> float:
        """What this trial has, drawn when it has nothing yet."""
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def ends(self) -> list[float]:
        return [self.low, self.high]

    def of(self, value: Any) -> float | None:
        """How a config's value is named here; None when it lies outside."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and self.low <= value <= self.high else None


@dataclass(frozen=True)
class Choices:
    """One of several values, each as the text that would stand on the command line."""

    key: str
    texts: tuple[str, ...]

    def suggest(self, trial: Trial) -> str:
        return str(trial.suggest_categorical(self.key, self.texts))

    def ends(self) -> list[str]:
        return list(self.texts)

    def of(self, value: Any) -> str | None:
        return as_text(value) if as_text(value) in self.texts else None


Dimension = Range | Choices


def as_text(value: Any) -> str:
    """A config's value as it is typed on the command line."""
    return value if isinstance(value, str) else repr(list(value) if isinstance(value, tuple) else value)


def read_space(path: str | Path) -> list[Dimension]:
    """The dimensions of the YAML at ``path``, in its order; a mistake is a ``ValueError`` in four parts."""
    if not Path(path).is_file():
        raise Problem("there is no such file", str(path), "a YAML with the search space", "--space").error()
    rows = dict(_rows(read_yaml(path)))
    if not rows:
        raise Problem("the search space is empty", str(path), "lines KEY: [low, high]", "--space").error()
    return [_dimension(key, row, f"{key} in {path}") for key, row in rows.items()]


def _rows(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys may be dotted or nested, as people write configs."""
    for key, value in tree.items():
        if isinstance(value, dict) and "choices" not in value:
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _dimension(key: str, row: Any, where: str) -> Dimension:
    if isinstance(row, dict):
        choices = row["choices"]
        if len(row) > 1 or not isinstance(choices, list) or len(set(map(as_text, choices))) < 2:
            raise Problem("there is nothing to choose", row, "{choices: [...]} with two or more", where).error()
        return Choices(key, tuple(dict.fromkeys(map(as_text, choices))))
    if not isinstance(row, list) or len(row) < 2 or not set(map(str, row[2:])) <= WORDS:
        raise Problem("this is no range and no choice", row, ALLOWED, where).error()
    low, high = (_number(end, row, where) for end in row[:2])
    log, whole = "log" in row[2:], "int" in row[2:]
    if not low < high or (log and low <= 0) or (whole and (low % 1 or high % 1)):
        allowed = f"low < high{', both > 0 for log' if log else ''}{', both whole for int' if whole else ''}"
        raise Problem("the range is not sound", row, allowed, where).error()
    return Range(key, low, high, log, whole)


def _number(end: Any, row: Any, where: str) -> float:
    try:
        number = literal_eval(end) if isinstance(end, str) else end  # YAML 1.1 takes 1e-3 for text
    except (ValueError, SyntaxError):
        number = None
    if not isinstance(number, int | float) or isinstance(number, bool) or not isfinite(number):
        raise Problem("this is no number", end, ALLOWED, where).error()
    return number


def overrides(values: dict[str, Any]) -> list[str]:
    """``KEY VALUE`` pairs, as on the command line."""
    return [word for key, value in values.items() for word in (key, as_text(value))]


def require_fitting(space: list[Dimension], load: Callable[[list[str]], CfgNode]) -> None:
    """Raise ``ValueError`` unless the config takes both ends, or every choice, of every dimension.

    load: gives the checked config for ``KEY VALUE`` pairs.
    """
    for dimension in space:
        for end in dimension.ends():
            cfg = load(overrides({dimension.key: end}))
            fits = not isinstance(dimension, Range) or dimension.whole or type(value_at(cfg, dimension.key)) is float
            if not fits:
                allowed = "a range with int behind: the key holds whole numbers"
                raise Problem("the range is of fractions", dimension.ends(), allowed, dimension.key).error()


def own_values(space: list[Dimension], cfg: CfgNode) -> dict[str, Any] | None:
    """Where the config itself lies in the space; None when it lies outside."""
    values = {dimension.key: dimension.of(value_at(cfg, dimension.key)) for dimension in space}
    return None if None in values.values() else values


def value_at(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node
