"""A folder of class folders: any root, nested or flat, with or without a validation split."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from imgcls.data.datasets.class_names import align, ordered
from imgcls.data.datasets.files import FileSource
from imgcls.data.datasets.hold_out import TENTH, HoldOut, held_out
from imgcls.data.reading import IMAGE_SUFFIXES

TRAIN_NAME, VAL_NAMES = "train", ("val", "valid", "validation", "test")


class FolderSource(FileSource):
    """``root/<class>/**/<image>``; classes are the folders' names, sorted as text ("1", "10", "2").

    split: None for all files, "train" or "val" for the fixed ``hold_out`` (:func:`held_out`).
    classes: the training set's classes, when this is another split of it: labels follow these names, a folder that is
        not among them is an error, and one that is lacking is said in the log.
    Hidden folders and files, ``__MACOSX`` and files that are not images by their ending are passed over. A class
    folder may be a link; links to folders below it are not followed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        classes: Sequence[str] | None = None,
        hold_out: HoldOut = TENTH,
    ) -> None:
        root = Path(root)
        name = f"folder:{root}" + (f"#{split}" if split else "")
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}; change --data or DATASETS.TRAIN/TEST")
        found = class_folders(root)
        if not found:
            raise ValueError(f"{root} has no class folders; expected {root}/<class>/<image>; change --data or DATASETS")
        names = tuple(classes) if classes is not None else ordered(found, str(root))
        paths: list[str] = []
        labels: list[int] = []
        for folder, label in zip(found, align(found, names, str(root)), strict=True):
            files = _files_of_class(root, folder)
            if split is not None:
                files = held_out(files, folder, split, root, hold_out)
            paths += [f"{folder}/{file}" for file in files]
            labels += [label] * len(files)
        super().__init__(name, root, paths, np.asarray(labels, dtype=np.int64), names)


def _files_of_class(root: Path, name: str) -> list[str]:
    _refuse_loop(root, name)
    files = sorted(_images_below(root / name))
    if not files:
        raise ValueError(
            f"the class folder {root / name} has no images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}); add some or remove the folder"
        )
    return files


def _refuse_loop(root: Path, name: str) -> None:
    target, top = os.path.realpath(root / name), os.path.realpath(root)
    if os.path.commonpath([target, top]) == target:
        raise ValueError(f"the class folder {root / name} is a link to {target}, which contains it; remove the link")


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder`` that count as classes, sorted as text."""
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
