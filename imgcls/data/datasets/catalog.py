"""Data sets by name: the known ones, folders, and whatever the user registered with detectron2."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from imgcls.data.datasets import known_sets
from imgcls.data.datasets.class_names import aligned
from imgcls.data.datasets.coco_labels import CocoLabelsSource
from imgcls.data.datasets.folder import FolderSource
from imgcls.data.datasets.hold_out import TENTH, HeldOutSource, HoldOut
from imgcls.data.datasets.lists import SPLITS, ListSource
from imgcls.data.datasets.rotated import RotatedClasses
from imgcls.data.datasets.shards import ShardSource
from imgcls.data.datasets.source import ArraySource, ConcatSource, DictSource, Source
from imgcls.data.digit_sets import SIZES, DigitSets
from imgcls.data.digits import load_digits
from imgcls.structures import Problem


def open_source(
    name: str, *, root: str = "", classes: Sequence[str] | None = None, hold_out: HoldOut = TENTH
) -> Source:
    """The data set called ``name``.

    name: one of :data:`SETS`; ``folder:DIR``, ``folder:DIR#train`` or ``folder:DIR#val``; or a name in detectron2's
        DatasetCatalog whose samples have ``file_name`` and ``label``. ``#train`` and ``#val`` behind any of these names
        are the two parts of a fixed split.
    root: where the set lies, instead of $DETECTRON2_DATASETS/<its folder>.
    classes: the training set's, so that another split's labels follow the same names.
    hold_out: how much ``#val`` takes, and which of the possible splits it is.
    """
    prefix, colon, spelling = name.partition(":")
    if colon and prefix in OPENERS:
        return aligned(OPENERS[prefix](spelling, root, classes, hold_out), classes)
    whole, mark, split = name.rpartition("#")
    if mark and split in ("train", "val") and name not in DatasetCatalog.list():
        return HeldOutSource(open_source(whole, root=root, classes=classes), split, hold_out)
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
    return aligned(source, classes)


def open_sources(
    names: Sequence[str],
    *,
    root: str = "",
    classes: Sequence[str] | None = None,
    hold_out: HoldOut = TENTH,
    key: str = "DATASETS.TRAIN",
) -> Source:
    """The data sets of one config key as a single source."""
    if not names:
        raise Problem("no data set is named", names, "one name or more", key).error()
    sources = [open_source(name, root=root, classes=classes, hold_out=hold_out) for name in names]
    return sources[0] if len(sources) == 1 else ConcatSource(sources)


def _open_folder(spelling: str, root: str, classes: Sequence[str] | None, hold_out: HoldOut) -> FolderSource:
    path, mark, split = spelling.rpartition("#")
    if mark and split in ("train", "val"):
        return FolderSource(path, split, classes, hold_out)
    return FolderSource(spelling, None, classes)


def _open_list(spelling: str, root: str, classes: Sequence[str] | None, hold_out: HoldOut) -> ListSource:
    file, mark, split = spelling.rpartition("#")
    return ListSource(file, split, root, hold_out) if mark and split in SPLITS else ListSource(spelling, None, root)


def _open_coco_labels(spelling: str, root: str, classes: Sequence[str] | None, hold_out: HoldOut) -> Source:
    return _part_of(CocoLabelsSource, spelling, hold_out)


def _open_shards(spelling: str, root: str, classes: Sequence[str] | None, hold_out: HoldOut) -> Source:
    return _part_of(ShardSource, spelling, hold_out)


def _open_rotated(spelling: str, root: str, classes: Sequence[str] | None, hold_out: HoldOut) -> RotatedClasses:
    return RotatedClasses(open_source(spelling, root=root, hold_out=hold_out))


def _part_of(opener: Callable[[str], Source], spelling: str, hold_out: HoldOut) -> Source:
    whole, mark, split = spelling.rpartition("#")
    if mark and split in ("train", "val"):
        return HeldOutSource(opener(whole), split, hold_out)
    return opener(spelling)


def _embedded_digits(split: str, root: str) -> Source:
    pixels, labels = load_digits(split)
    return ArraySource(f"digits_{split}", pixels, labels, tuple("0123456789"))


def _digit_sets(split: str, root: str) -> Source:
    return DigitSets(split)


# What stands before the colon of a name -> function(what stands behind it, root, classes of the training set).
OPENERS: dict[str, Callable[[str, str, Sequence[str] | None, HoldOut], Source]] = {
    "folder": _open_folder,
    "list": _open_list,
    "coco-labels": _open_coco_labels,
    "shards": _open_shards,
    "rotated": _open_rotated,
}

# name -> function(root) that opens it.
SETS: dict[str, Callable[[str], Source]] = {
    **known_sets.openers(),
    "digits_train": partial(_embedded_digits, "train"),
    "digits_val": partial(_embedded_digits, "val"),
    **{f"digitsets_{split}": partial(_digit_sets, split) for split in SIZES},
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
