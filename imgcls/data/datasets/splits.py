"""The training and the validation set that a single ``--data`` means."""

from __future__ import annotations

import os
from pathlib import Path

from imgcls.data.datasets.folder import TRAIN_NAME, VAL_NAMES, class_folders
from imgcls.data.datasets.lists import SUFFIXES
from imgcls.data.datasets.shard_index import INDEX


def splits_below(root: str | Path) -> tuple[str, str]:
    """The names of the training and validation sets that ``--data root`` means.

    A list file means its two parts. A folder of packed shards means its ``train`` and its ``val``, or the hold-out of
    what it has. Any other folder has ``root/train`` and ``root/val`` (or valid, validation, test) when they are there,
    otherwise the hold-out of ``root/train`` or of root. A folder "train" of images among class folders is a class.
    """
    root = Path(root).absolute()
    if root.is_file() and root.suffix.lower() in SUFFIXES:
        return f"list:{root}#train", f"list:{root}#val"
    return _packed(root) or _class_folders(root)


def _packed(root: Path) -> tuple[str, str] | None:
    if (root / INDEX).is_file():
        return f"shards:{root}#train", f"shards:{root}#val"
    if not (root / TRAIN_NAME / INDEX).is_file():
        return None
    train = root / TRAIN_NAME
    val = next((root / name for name in VAL_NAMES if (root / name / INDEX).is_file()), None)
    return (f"shards:{train}", f"shards:{val}") if val else (f"shards:{train}#train", f"shards:{train}#val")


def _class_folders(root: Path) -> tuple[str, str]:
    found = class_folders(root) if os.path.isdir(root) else []
    train, val = root / TRAIN_NAME, next((root / name for name in VAL_NAMES if name in found), None)
    others = [name for name in found if name not in (TRAIN_NAME, *VAL_NAMES)]
    if TRAIN_NAME in found and (not others or class_folders(train)):
        return (f"folder:{train}", f"folder:{val}") if val else (f"folder:{train}#train", f"folder:{train}#val")
    if val and not others:
        raise ValueError(f"{root} has {val.name} but no {TRAIN_NAME}; expected {train}/<class>/<image>; change --data")
    return f"folder:{root}#train", f"folder:{root}#val"
