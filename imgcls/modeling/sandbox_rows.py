"""The sandbox's rows: a network written as lists in YAML, read, checked, and cut into stages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2, prod
from typing import Any

from imgcls.config.checks import Limit, each, whole
from imgcls.structures import Problem

KEY = "MODEL.BACKBONE.ROWS"

CHANNELS = whole(1)
# An even kernel has no middle: its map would not be ceil(input / stride).
KERNEL = Limit("an odd whole number >= 1", lambda value: type(value) is int and value > 0 and value % 2 == 1)
# Sine and cosine, of row and column.
TOKEN = Limit("a multiple of 4", lambda value: type(value) is int and value > 0 and value % 4 == 0)
STRIDE = Limit("1, 2, 4, 8, 16, 32", lambda value: type(value) is int and value in (1, 2, 4, 8, 16, 32))
FLAG = Limit("true or false", lambda value: type(value) is bool)

# Kind -> what stands behind it, in this order.
KINDS: dict[str, dict[str, Limit]] = {
    "conv": {"in": CHANNELS, "out": CHANNELS, "kernel": KERNEL, "stride": STRIDE},
    "res": {
        "ins": each(CHANNELS),
        "outs": each(CHANNELS),
        "kernels": each(KERNEL),
        "repeats": whole(1),
        "store": FLAG,
    },
    "convformer": {"in": TOKEN, "kqv": CHANNELS, "kernel": KERNEL, "heads": whole(1), "store": FLAG},
    "transformer": {"in": TOKEN, "kqv": CHANNELS, "heads": whole(1), "store": FLAG},
}


@dataclass(frozen=True)
class Row:
    """One row that is right in itself. number: from 1; written: as in the config; values: by name."""

    number: int
    written: tuple[Any, ...]
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.written[0])

    @property
    def takes(self) -> int:
        """Channels that the row reads."""
        return int(self.values["ins"][0] if self.kind == "res" else self.values["in"])

    @property
    def gives(self) -> int:
        """Channels that it makes."""
        return int(self.values["out"] if self.kind == "conv" else self.takes)

    @property
    def stride(self) -> int:
        return int(self.values.get("stride", 1))

    @property
    def stored(self) -> bool:
        return bool(self.values.get("store", False))

    def __str__(self) -> str:
        return f"row {self.number} {_shown(self.written)}"


@dataclass(frozen=True)
class Stage:
    """Rows up to a stored one (or to the end). total: the stride of its map with regard to the image."""

    rows: tuple[Row, ...]
    total: int

    @property
    def name(self) -> str:
        """ "stem" up to stride 2, otherwise res2 .. res5 for strides 4 .. 32."""
        return "stem" if self.total <= 2 else f"res{int(log2(self.total))}"

    @property
    def stride(self) -> int:
        """With regard to the stage before."""
        return prod(row.stride for row in self.rows)


def read_stages(rows: Sequence[Any], in_channels: int) -> tuple[Stage, ...]:
    """The stages that ``rows`` describe for images of ``in_channels``; a ``ValueError`` names every wrong row."""
    problems = row_problems(rows, in_channels)
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return _stages([_row(number, written) for number, written in enumerate(rows, start=1)])


def row_problems(rows: Sequence[Any], in_channels: int) -> list[Problem]:
    """What is wrong with the rows, each by itself; if nothing, with what stands next to what."""
    if rows and not any(isinstance(row, (list, tuple)) for row in rows):
        return [Problem("the rows are no list of lists", list(rows), f"[{_pattern('conv')}, ...]", KEY)]
    problems = [problem for n, row in enumerate(rows, start=1) if (problem := _problem_of_row(n, row))]
    if problems:
        return problems
    known = [_row(number, row) for number, row in enumerate(rows, start=1)]
    return _misfits(known, in_channels) or _stride_problems(known)


def _row(number: int, written: Sequence[Any]) -> Row:
    return Row(number, tuple(written), dict(zip(KINDS[written[0]], written[1:], strict=True)))


def _shown(written: object) -> str:
    """As YAML would have it."""
    if isinstance(written, (list, tuple)):
        return f"[{', '.join(map(_shown, written))}]"
    return str(written).lower() if isinstance(written, bool) else str(written)


def _pattern(kind: str) -> str:
    return _shown([kind, *KINDS[kind]])


# -- one row ---------------------------------------------------------------------------------------------------------


def _problem_of_row(number: int, row: Any) -> Problem | None:
    where = f"row {number} of {KEY}"
    if not isinstance(row, (list, tuple)) or not row:
        return Problem(f"row {number} is no list", row, " or ".join(map(_pattern, KINDS)), where)
    kind = row[0]
    if not isinstance(kind, str) or kind not in KINDS:
        nearest = sorted(KINDS, key=lambda name: -difflib.SequenceMatcher(None, str(kind), name).ratio())
        return Problem(f"row {number} {_shown(row)} is of no known kind", kind, ", ".join(nearest), where)
    if len(row) != len(KINDS[kind]) + 1:
        what = f"row {number} {_shown(row)} has {len(row) - 1} values behind its kind, not {len(KINDS[kind])}"
        return Problem(what, row, _pattern(kind), where)
    for (name, limit), value in zip(KINDS[kind].items(), row[1:], strict=True):
        if not limit.holds(value):
            what = f"row {number} {_shown(row)} has a wrong value for {name}"
            return Problem(what, value, f"{limit.allowed} in {_pattern(kind)}", where)
    return _problem_of_chain(number, row) if kind == "res" else None


def _problem_of_chain(number: int, row: Sequence[Any]) -> Problem | None:
    """A chain's convolutions must fit each other, and its end its beginning, to which it is added."""
    ins, outs, kernels = row[1:4]
    where = f"row {number} of {KEY}"
    if not len(ins) == len(outs) == len(kernels) or not ins:
        what = f"row {number} {_shown(row)} has {len(ins)} ins, {len(outs)} outs and {len(kernels)} kernels"
        return Problem(what, row, "one of each for every convolution of the chain", where)
    for index, (gives, takes) in enumerate(zip(outs, [*ins[1:], ins[0]], strict=True), start=1):
        if gives != takes:
            last = index == len(ins)
            reader = "the skip, which carries the chain's input," if last else f"convolution {index + 1}"
            what = f"in row {number} {_shown(row)} convolution {index} gives {gives} channels and {reader} has {takes}"
            return Problem(what, outs, f"outs[{index - 1}] {takes}", where)
    return None


# -- rows together ---------------------------------------------------------------------------------------------------


def _misfits(rows: Sequence[Row], in_channels: int) -> list[Problem]:
    if not rows:
        return [Problem("the sandbox has no rows", [], f"a list of rows such as {_pattern('conv')}", KEY)]
    problems = []
    if rows[0].takes != in_channels:
        what = f"{rows[0]} takes {rows[0].takes} channels, the images have {in_channels}"
        problems.append(Problem(what, rows[0].takes, str(in_channels), f"row 1 of {KEY} (or MODEL.PIXEL_MEAN)"))
    for above, below in pairwise(rows):
        if above.gives != below.takes:
            what = f"{below} takes {below.takes} channels, {above} above it gives {above.gives}"
            where = f"row {above.number} or {below.number} of {KEY}"
            problems.append(Problem(what, below.takes, str(above.gives), where))
    return problems


def _stride_problems(rows: Sequence[Row]) -> list[Problem]:
    total = prod(row.stride for row in rows)
    if total > 32:
        strided = ", ".join(str(row) for row in rows if row.stride > 1)
        what = f"the strides of {strided} multiply to more than 32"
        return [Problem(what, total, "a product of at most 32", KEY)]
    stages = _stages(rows)
    problems = []
    for above, below in pairwise(stages):
        if above.name == below.name:
            first, second = above.rows[-1], below.rows[-1]
            end = "" if second.stored else " (the last row always is)"
            what = f"{first} and {second} would both be stored{end} as {above.name}"
            where = f"store in row {first.number} of {KEY}"
            problems.append(Problem(what, f"strides {above.total} and {below.total}", "one map of each name", where))
    return problems


def _stages(rows: Sequence[Row]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    begun: list[Row] = []
    total = 1
    for row in rows:
        begun.append(row)
        total *= row.stride
        if row.stored or row is rows[-1]:
            stages.append(Stage(tuple(begun), total))
            begun = []
    return tuple(stages)
