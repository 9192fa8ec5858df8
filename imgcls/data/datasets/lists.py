"""A list of pictures with their labels, as CSV or JSON lines: any layout, one label or several, without code."""

from __future__ import annotations

import csv
import difflib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imgcls.data.datasets.class_names import composed, few, ordered
from imgcls.data.datasets.files import FileSource
from imgcls.data.datasets.folder import TRAIN_NAME, VAL_NAMES
from imgcls.data.datasets.hold_out import TENTH, HoldOut, held_out

logger = logging.getLogger(__name__)

COLUMNS = ("path", "label", "labels", "weight", "split")
SEPARATOR = "|"  # between several labels in a cell of a CSV file
SUFFIXES = (".csv", ".jsonl")
SPLITS = (TRAIN_NAME, *VAL_NAMES)

Fields = dict[str, Any]  # column -> value of one row


class _Row(NamedTuple):
    path: str
    labels: tuple[str, ...]
    weight: float
    split: str


class ListSource(FileSource):
    """The files that a list names, in its order.

    file: CSV with a header, or one JSON object a line. Columns (keys): ``path``; ``label``, one class, or ``labels``,
        any number of them, none too ("|" between them in CSV, a list in JSON); ``weight``, a sampling weight (1 where
        it is not given); ``split``.
    split: None for all rows; "train", "val" or another of :data:`SPLITS` for the rows whose ``split`` says so, where
        "val" means the first of "val", "valid", "validation" and "test" that there is. Without such a column "train"
        and "val" are the fixed hold-out of :func:`~imgcls.data.datasets.hold_out.held_out`: of each class, or, with
        several labels, of all.
    root: what relative paths start from; the file's own folder when empty.

    Classes are all names of the file, whatever the split, in text order. A mistake is a ``ValueError`` that names the
    line.
    """

    def __init__(
        self, file: str | Path, split: str | None = None, root: str | Path = "", hold_out: HoldOut = TENTH
    ) -> None:
        file = Path(file)
        name = f"list:{file}" + (f"#{split}" if split else "")
        several, rows = _read(file)
        classes = ordered({label for row in rows for label in row.labels}, str(file))
        if not classes:
            raise ValueError(f"no row of {file} has a label; write class names into its column 'labels'")
        chosen = _rows_of(file, rows, split, several, hold_out)
        weights = np.array([row.weight for row in chosen], dtype=np.float64)
        super().__init__(
            name,
            Path(root) if root else file.parent,
            [row.path for row in chosen],
            _label_array(chosen, classes, several),
            classes,
            weights=None if (weights == 1).all() else weights,
        )


def _label_array(rows: Sequence[_Row], classes: Sequence[str], several: bool) -> np.ndarray:
    index_of = {name: index for index, name in enumerate(classes)}
    if not several:
        return np.array([index_of[row.labels[0]] for row in rows], dtype=np.int64)
    labels = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for index, row in enumerate(rows):
        labels[index, [index_of[label] for label in row.labels]] = 1
    return labels


# ------------------------------------------------------------------------------------------------------------- splits


def _rows_of(file: Path, rows: list[_Row], split: str | None, several: bool, hold_out: HoldOut) -> list[_Row]:
    if split is None:
        return rows
    stated = {row.split for row in rows}
    if stated != {""}:
        meant = next((name for name in VAL_NAMES if name in stated), split) if split == "val" else split
        if meant not in stated:
            raise ValueError(f"no row of {file} has the split {split!r}; it has {few(sorted(stated))}; change DATASETS")
        return [row for row in rows if row.split == meant]
    if split not in ("train", "val"):
        raise ValueError(f"{file} has no column 'split', so that #{split} means nothing; add it, or change DATASETS")
    return _hold_out(file, rows, split, several, hold_out)


def _hold_out(file: Path, rows: list[_Row], split: str, several: bool, hold_out: HoldOut) -> list[_Row]:
    paths_of: dict[str, list[str]] = {}
    for row in rows:
        paths_of.setdefault("" if several else row.labels[0], []).append(row.path)
    for name, paths in paths_of.items():
        if len(set(paths)) < 2:
            raise ValueError(
                f"{file} has {len(set(paths))} picture{f' of the class {name!r}' if name else ''}; holding some out "
                "for validation needs 2. Add pictures or a column 'split'"
            )
    chosen = {name: set(held_out(sorted(set(paths)), name, split, file, hold_out)) for name, paths in paths_of.items()}
    return [row for row in rows if row.path in chosen["" if several else row.labels[0]]]


# ------------------------------------------------------------------------------------------------------------ reading


def _read(file: Path) -> tuple[bool, list[_Row]]:
    """Whether pictures may have several labels, and the rows."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Fields]]]] = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if file.suffix.lower() not in readers:
        raise ValueError(f"cannot read the list {file}; allowed endings: {', '.join(SUFFIXES)}; change DATASETS")
    if not file.is_file():
        raise ValueError(f"there is no file {file}; change DATASETS.TRAIN/TEST")
    rows: list[_Row] = []
    columns: frozenset[str] = frozenset()
    try:
        for line, fields in readers[file.suffix.lower()](file):
            rows.append(_row(fields, f"line {line} of {file}"))
            # Which of the columns that change what all rows mean, so that rows cannot mean different things.
            given = frozenset(fields) & {"label", "labels", "split"}
            if len(rows) > 1 and given != columns:
                there, here = " and ".join(sorted(columns)), " and ".join(sorted(given))
                raise ValueError(f"line {line} of {file} has {here}, the lines before it have {there}; use the same")
            columns = given
    except UnicodeDecodeError as error:
        line = _first_undecodable(file)
        raise ValueError(f"line {line} of {file} is not UTF-8 text: {error.reason}; save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{file} lists no pictures; add rows, or change DATASETS.TRAIN/TEST")
    if not any(row.weight for row in rows):
        raise ValueError(f"every weight in {file} is 0; give some row a weight above 0")
    return "labels" in columns, rows


def _read_csv(file: Path) -> Iterator[tuple[int, Fields]]:
    # utf-8-sig: spreadsheets begin their files with a mark.
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] | None = None
        try:
            for cells in reader:
                if header is None:
                    header = cells
                    _check_names(header, f"line {reader.line_num} of {file}")
                    if len(set(header)) < len(header):
                        raise ValueError(f"line {reader.line_num} of {file} names a column twice: {', '.join(header)}")
                elif len(cells) not in (0, len(header)):  # 0: an empty line
                    raise ValueError(
                        f"line {reader.line_num} of {file} has {len(cells)} cells, the header {len(header)}; "
                        "put quotes around a cell that has commas"
                    )
                elif cells:
                    fields: Fields = dict(zip(header, cells, strict=True))
                    if "labels" in fields:
                        fields["labels"] = fields["labels"].split(SEPARATOR) if fields["labels"] else []
                    yield reader.line_num, fields
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {file} is no CSV: {error}") from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Fields]]:
    said: set[str] = set()
    with file.open(encoding="utf-8-sig") as stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            where = f"line {number} of {file}"
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is no JSON: {error}; write one object a line") from error
            if not isinstance(fields, dict):
                raise ValueError(f'{where} is no JSON object; write {{"path": "a.jpg", "label": "ant"}}')
            if not fields.keys() <= said:
                _check_names(fields, where, already=said)
                said |= fields.keys()
            yield number, fields


def _check_names(names: Sequence[str] | Fields, where: str, already: set[str] | None = None) -> None:
    """Refuse what lacks a column, or has one that is nearly one of ours; say which ones are not read."""
    others = [name for name in names if name not in COLUMNS and name not in (already or ())]
    for name in others:
        near = _nearly(name.strip().lower())
        if near:
            raise ValueError(f"{where} has the column {name!r}; did you mean {near!r}? Known: {', '.join(COLUMNS)}")
    if "path" not in names or ("label" in names) == ("labels" in names):
        raise ValueError(
            f"{where} has the columns {', '.join(map(repr, names))}; needed are 'path' and either 'label' (one class) "
            "or 'labels' (several), in CSV with commas between them"
        )
    if others:
        logger.info("%s: the columns %s are not read", where, few(others))


def _nearly(name: str) -> str:
    # Letters in another order ("wieght") are less alike to difflib than "height", which is a column of its own.
    swapped = [column for column in COLUMNS if sorted(column) == sorted(name)]
    return next(iter(swapped or difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.85)), "")


def _row(fields: Fields, where: str) -> _Row:
    path = fields.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{where} has the path {path!r}; it must be a file name")
    if "labels" in fields:
        labels = fields["labels"]
        if not isinstance(labels, list):
            raise ValueError(f"{where} has the labels {labels!r}; they must be a list of class names")
    elif "label" in fields:
        labels = [fields["label"]]
    else:
        raise ValueError(f"{where} has no label; add 'label' (one class) or 'labels' (several)")
    return _Row(path, tuple(_class(label, where) for label in labels), _weight(fields, where), _split(fields, where))


def _class(label: Any, where: str) -> str:
    if type(label) is int:  # JSON's numbers; True is none
        return str(label)
    if not isinstance(label, str) or not label or label != label.strip():
        raise ValueError(f"{where} has the label {label!r}; it must be a class name without blanks around it")
    return composed(label)


def _weight(fields: Fields, where: str) -> float:
    value = fields.get("weight", 1.0)
    try:
        weight = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        weight = -1.0
    if not (isfinite(weight) and weight >= 0):
        raise ValueError(f"{where} has the weight {value!r}; it must be a finite number >= 0")
    return weight


def _split(fields: Fields, where: str) -> str:
    split = fields.get("split", "")
    if "split" in fields and split not in SPLITS:
        raise ValueError(f"{where} has the split {split!r}; allowed: {', '.join(SPLITS)}")
    return str(split)


def _first_undecodable(file: Path) -> int:
    with file.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0
