"""The figures of single classes: as a table to read, and as CSV files beside the results."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

PER_CLASS, CONFUSION = "per_class.csv", "confusion_matrix.csv"
MOST_ROWS = 40


def per_class_text(classes: Sequence[str], columns: Mapping[str, Tensor], most: int = MOST_ROWS) -> str:
    """One row a class; of more than ``most`` classes those that do worst by the first figure."""
    figures = [name for name in columns if name != "images"]
    rows = list(_rows(classes, columns))
    note = ""
    if len(rows) > most:
        by = list(columns).index(figures[0]) + 1
        rows = sorted(rows, key=lambda row: (row[by] != row[by], row[by]))[:most]
        note = f"\n(the {most} classes of {len(classes)} with the lowest {figures[0]}; {PER_CLASS} has all)"
    digits = ["", *("d" if name == "images" else ".3f" if name == "threshold" else ".1f" for name in columns)]
    return tabulate(rows, headers=["class", *columns], floatfmt=digits, disable_numparse=[0]) + note


def write_tables(
    folder: Path, classes: Sequence[str], columns: Mapping[str, Tensor], confusion: Tensor | None = None
) -> None:
    """Write :data:`PER_CLASS`, and :data:`CONFUSION` (a row for each true class) if there is one; older ones go."""
    _write(folder / PER_CLASS, [["class", *columns], *_rows(classes, columns)])
    if confusion is not None:
        counts = ([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
        _write(folder / CONFUSION, [["true class", *classes], *counts])


def _rows(classes: Sequence[str], columns: Mapping[str, Tensor]) -> Iterable[list[Any]]:
    return ([*row] for row in zip(classes, *(column.tolist() for column in columns.values()), strict=True))


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    temporary.replace(path)
