"""A folder of class folders: any root, nested or flat, with or without a validation split."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from imgcls.data.datasets.source import Source
from imgcls.data.reading import IMAGE_SUFFIXES, check_header

logger = logging.getLogger(__name__)

HOLD_OUT = 0.1  # share of each class that "#val" takes when there is no validation folder
TRAIN_NAME, VAL_NAMES = "train", ("val", "valid", "validation", "test")
# Opening a header takes some 50 microseconds: beyond this many files an even selection is looked at.
HEADERS_CHECKED = 20_000


class FolderSource(Source):
    """``root/<class>/**/<image>``; classes are the folders' names, sorted as text ("1", "10", "2").

    split: None for all files, "train" or "val" for the fixed 9:1 hold-out (:func:`held_out`).
    classes: the training set's classes, when this is another split of it: labels follow these names, a folder that is
        not among them is an error, and one that is lacking is said in the log.
    Hidden folders and files, ``__MACOSX`` and files that are not images by their ending are passed over. A class
    folder may be a link; links to folders below it are not followed.
    """

    def __init__(self, root: str | Path, split: str | None = None, classes: Sequence[str] | None = None) -> None:
        self.root = Path(root)
        self.name = f"folder:{root}" + (f"#{split}" if split else "")
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {self.root}; change --data or DATASETS.TRAIN/TEST")
        found = _folders_in(self.root)
        if not found:
            raise ValueError(
                f"{self.root} has no class folders; expected {self.root}/<class>/<image>; change --data or DATASETS"
            )
        self.classes = tuple(classes or found)
        self._match(found)
        paths, labels = self._collect(found, split)
        self.labels = np.asarray(labels, dtype=np.int64)
        self._paths = PackedPaths(paths)
        self._check_headers()

    def _match(self, found: Sequence[str]) -> None:
        extra = sorted(set(found) - set(self.classes))
        if extra:
            raise ValueError(
                f"{self.root} has the class folder {extra[0]!r} ({len(extra)} in all) that the training set has not; "
                f"its classes are {_few(self.classes)}; rename or remove it, or change DATASETS.TEST"
            )
        lacking = sorted(set(self.classes) - set(found))
        if lacking:
            logger.warning("%s has no folder for %d classes: %s", self.root, len(lacking), _few(lacking))

    def _collect(self, found: Sequence[str], split: str | None) -> tuple[list[str], list[int]]:
        index_of = {name: index for index, name in enumerate(self.classes)}
        paths: list[str] = []
        labels: list[int] = []
        for name in found:
            self._refuse_loop(name)
            files = sorted(_images_below(self.root / name))
            if not files:
                raise ValueError(
                    f"the class folder {self.root / name} has no images "
                    f"({', '.join(sorted(IMAGE_SUFFIXES))}); add some or remove the folder"
                )
            chosen = files if split is None else held_out(files, name, split, self.root)
            paths += [f"{name}/{file}" for file in chosen]
            labels += [index_of[name]] * len(chosen)
        return paths, labels

    def _refuse_loop(self, name: str) -> None:
        target, root = os.path.realpath(self.root / name), os.path.realpath(self.root)
        if os.path.commonpath([target, root]) == target:
            raise ValueError(
                f"the class folder {self.root / name} is a link to {target}, which contains it; remove the link"
            )

    def _check_headers(self) -> None:
        step = max(1, len(self) // HEADERS_CHECKED)
        for index in range(0, len(self), step):
            check_header(self.path(index))

    def path(self, index: int) -> str:
        """The file of sample ``index``."""
        return os.path.join(self.root, self._paths[index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image_id": index, "label": int(self.labels[index]), "file_name": self.path(index)}


class PackedPaths:
    """Strings in one block of bytes: forked workers share it, where a list of str is copied page by page."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


def held_out(files: Sequence[str], class_name: str, split: str, root: Path) -> list[str]:
    """The files of one class that belong to "train" or "val": a tenth, chosen by a checksum of the names, is held out.

    The rule looks at names only, so it is the same on every machine and the split of a file never depends on its
    neighbours' content.
    """
    if len(files) < 2:
        raise ValueError(
            f"the class folder {root / class_name} has {len(files)} image; holding some out for validation needs 2. "
            f"Add images, or give {root}/train and {root}/val"
        )
    ranked = sorted(files, key=lambda file: (zlib.crc32(os.fsencode(f"{class_name}/{file}")), file))
    count = max(1, round(HOLD_OUT * len(files)))
    val = set(ranked[:count])
    return [file for file in files if (file in val) == (split == "val")]


def splits_below(root: str | Path) -> tuple[str, str]:
    """The names of the training and validation sets that ``--data root`` means.

    ``root/train`` with ``root/val`` (or valid, validation, test) when they are there, otherwise the hold-out of
    ``root/train`` or of root. A folder "train" of images among other class folders is a class.
    """
    root = Path(root).absolute()
    found = _folders_in(root) if root.is_dir() else []
    train, val = root / TRAIN_NAME, next((root / name for name in VAL_NAMES if name in found), None)
    others = [name for name in found if name not in (TRAIN_NAME, *VAL_NAMES)]
    if TRAIN_NAME in found and (not others or _folders_in(train)):
        return (f"folder:{train}", f"folder:{val}") if val else (f"folder:{train}#train", f"folder:{train}#val")
    if val and not others:
        raise ValueError(f"{root} has {val.name} but no {TRAIN_NAME}; expected {train}/<class>/<image>; change --data")
    return f"folder:{root}#train", f"folder:{root}#val"


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _visible(entry.name))


def _images_below(folder: Path) -> Iterator[str]:
    # Links to folders are not followed: a loop would turn one image into dozens of samples.
    for current, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if _visible(name)]
        inside = "" if current == os.fspath(folder) else os.path.relpath(current, folder)
        for file in files:
            if _visible(file) and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(inside, file)


def _raise(error: OSError) -> NoReturn:
    # os.walk would pass over a folder that may not be read, and its images with it.
    raise error


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
