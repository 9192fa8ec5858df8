"""Data sets by name: the known ones, folders, and whatever the user registered with detectron2."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from imgcls.data.datasets.folder import FolderSource
from imgcls.data.datasets.source import ArraySource, ConcatSource, DictSource, Source
from imgcls.data.digits import load_digits
from imgcls.structures import Problem

DIGITS = tuple("0123456789")


def open_source(name: str, *, root: str = "", classes: Sequence[str] | None = None) -> Source:
    """The data set called ``name``.

    name: one of :data:`SETS`; ``folder:DIR``, ``folder:DIR#train`` or ``folder:DIR#val``; or a name in detectron2's
        DatasetCatalog whose samples have ``file_name`` and ``label``.
    root: where the set lies, instead of $DETECTRON2_DATASETS/<its folder>.
    classes: the training set's, so that another split's labels follow the same names.
    """
    if name.startswith("folder:"):
        return _open_folder(name.removeprefix("folder:"), classes)
    if name in SETS and name not in _taken:
        source = SETS[name](root)
    elif name in DatasetCatalog.list():
        found = DatasetCatalog.get(name)
        source = found if isinstance(found, Source) else DictSource(name, found)
    else:
        known = [*SETS, *DatasetCatalog.list()]
        near = difflib.get_close_matches(name, known, n=3) or list(SETS)
        allowed = f"folder:DIR, or a registered name such as {', '.join(near)}"
        raise Problem("there is no such data set", name, allowed, "DATASETS.TRAIN or DATASETS.TEST").error()
    _require_classes(source, classes)
    return source


def open_sources(
    names: Sequence[str], *, root: str = "", classes: Sequence[str] | None = None, key: str = "DATASETS.TRAIN"
) -> Source:
    """The data sets of one config key as a single source."""
    if not names:
        raise Problem("no data set is named", names, "one name or more", key).error()
    sources = [open_source(name, root=root, classes=classes) for name in names]
    return sources[0] if len(sources) == 1 else ConcatSource(sources)


def _open_folder(spelling: str, classes: Sequence[str] | None) -> FolderSource:
    path, mark, split = spelling.rpartition("#")
    if mark and split in ("train", "val"):
        return FolderSource(path, split, classes)
    return FolderSource(spelling, None, classes)


def _require_classes(source: Source, classes: Sequence[str] | None) -> None:
    if classes is not None and tuple(classes) != source.classes:
        raise ValueError(
            f"{source.name} has the classes {list(source.classes)[:5]}... ({len(source.classes)}), the training set "
            f"has {list(classes)[:5]}... ({len(classes)}); change DATASETS.TRAIN or DATASETS.TEST"
        )


def _dataset_root(root: str, folder: str) -> Path:
    return Path(root) if root else Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / folder


def _class_folders(folder: str, split: str, root: str) -> Source:
    return FolderSource(_dataset_root(root, folder) / split)


def _embedded_digits(split: str, root: str) -> Source:
    pixels, labels = load_digits(split)
    return ArraySource(f"digits_{split}", pixels, labels, DIGITS)


def _mnist(train: bool, root: str) -> Source:
    from torchvision.datasets import MNIST

    folder = _dataset_root(root, "mnist")
    try:
        mnist = MNIST(str(folder), train=train)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
    ) as error:  # absent; the others: a damaged file
        raise ValueError(
            f"MNIST cannot be read from {folder}: {error or 'a file is damaged'}. Fetch it with "
            f"python -c \"from torchvision.datasets import MNIST; MNIST('{folder}', download=True)\", "
            "or set DETECTRON2_DATASETS or --data"
        ) from error
    name = "mnist_train" if train else "mnist_test"
    return ArraySource(name, mnist.data.numpy(), mnist.targets.numpy().astype(np.int64), DIGITS)


# name -> function(root) that opens it. ImageNet and CIFAR-10 as class folders, <root>/train/<class>/<image> and so on.
SETS: dict[str, Callable[[str], Source]] = {
    "imagenet_train": partial(_class_folders, "imagenet", "train"),
    "imagenet_val": partial(_class_folders, "imagenet", "val"),
    "cifar10_train": partial(_class_folders, "cifar10", "train"),
    "cifar10_test": partial(_class_folders, "cifar10", "test"),
    "mnist_train": partial(_mnist, True),
    "mnist_test": partial(_mnist, False),
    "digits_train": partial(_embedded_digits, "train"),
    "digits_val": partial(_embedded_digits, "val"),
}


_taken: set[str] = set()


def register_sets() -> None:
    """Enter :data:`SETS` into detectron2's catalogs; a name that somebody took before stays theirs."""
    for name, opener in SETS.items():
        if name in DatasetCatalog.list():
            _taken.add(name)
            continue
        DatasetCatalog.register(name, partial(opener, ""))
        MetadataCatalog.get(name).set(evaluator_type="classification")


register_sets()
