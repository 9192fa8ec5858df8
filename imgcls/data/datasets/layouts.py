"""How the known sets lie on disk, and how each is read: functions of a set's root folder and a split's name.

torchvision's classes do the reading of MNIST and CIFAR. The rest is read here, because torchvision's would load the
2.7 GB of STL10's unlabelled pictures into memory, number Omniglot's characters in the order in which the disk lists
them, and know no Office31. The layout is torchvision's everywhere.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from imgcls.data.datasets.files import FileSource
from imgcls.data.datasets.folder import FolderSource
from imgcls.data.datasets.source import ArraySource, Source
from imgcls.data.fetch import require_digest

DIGITS = tuple("0123456789")
STL10_SIDE = 96
FLOWERS_DIGESTS = {
    "imagelabels.mat": "sha256:4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
    "setid.mat": "sha256:46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
}
_FLOWERS_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}
_OMNIGLOT_IMAGES = ".png"

# What torchvision's classes raise for files that are absent, damaged, or not what their digest says.
_UNREADABLE = (RuntimeError, ValueError, TypeError, AssertionError, OSError, EOFError)


def class_folders(root: Path, split: str) -> Source:
    """``root/<split>/<class>/<image>``: ImageNet."""
    return FolderSource(root / split)


def mnist(root: Path, split: str) -> Source:
    """``root/MNIST/raw``: (28, 28) greys."""
    from torchvision.datasets import MNIST

    return _of_torchvision(MNIST, root, split, DIGITS)


def fashion_mnist(root: Path, split: str) -> Source:
    """``root/FashionMNIST/raw``: (28, 28) greys."""
    from torchvision.datasets import FashionMNIST

    return _of_torchvision(FashionMNIST, root, split)


def cifar10(root: Path, split: str) -> Source:
    """``root/cifar-10-batches-py``, or class folders ``root/<split>/<class>/<image>`` where there are some."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, root, split)


def cifar100(root: Path, split: str) -> Source:
    """``root/cifar-100-python``, or class folders ``root/<split>/<class>/<image>`` where there are some."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, root, split)


def _cifar(cls: Any, root: Path, split: str) -> Source:
    # The batches are pickles: torchvision compares the digest of each file with its own list before it reads any.
    if not (root / cls.base_folder).is_dir() and (root / split).is_dir():
        return class_folders(root, split)
    return _of_torchvision(cls, root, split)


def _of_torchvision(cls: Callable[..., Any], root: Path, split: str, classes: Sequence[str] = ()) -> Source:
    """A set that torchvision reads into ``data`` and ``targets``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)  # CIFAR's pickles are of 2009
            found = cls(str(root), train=split == "train")
    except _UNREADABLE as error:
        raise ValueError(f"it cannot be read from {root}: {error or 'a file is damaged'}") from error
    return ArraySource("", np.asarray(found.data), np.asarray(found.targets, dtype=np.int64), classes or found.classes)


# -------------------------------------------------------------------------------------------------------------- STL10


def stl10(root: Path, split: str) -> Source:
    """``root/stl10_binary``: (96, 96, 3) colours, read from the file as they are asked for; ``unlabeled`` has label -1.

    Coates et al. 2011. A picture is stored as three planes, each column by column.
    """
    folder = root / "stl10_binary"
    pixels = StoredPictures(_file(folder / f"{split}_X.bin"), (3, STL10_SIDE, STL10_SIDE), (2, 1, 0))
    names = tuple(_file(folder / "class_names.txt").read_text(encoding="ascii").split())
    if split == "unlabeled":
        labels = np.full(len(pixels), -1, dtype=np.int64)
    else:
        labels = np.fromfile(_file(folder / f"{split}_y.bin"), dtype=np.uint8).astype(np.int64) - 1
    if labels.size and not (-1 if split == "unlabeled" else 0) <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"{folder} has labels outside of 1..{len(names)}; a file is damaged")
    return ArraySource("", pixels, labels, names)  # type: ignore[arg-type]


class StoredPictures:
    """Pictures of one shape in a file without a header, mapped into memory: what is not looked at is not read.

    shape: of a picture as it is stored, uint8; axes: the order in which these make (H, W, 3).
    Only the file's name travels to workers, which map it themselves.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
        self._arguments = (path, shape, axes)
        size, each = path.stat().st_size, int(np.prod(shape))
        if size % each or not size:
            raise ValueError(f"{path} has {size} bytes, no whole number of pictures of {each}; it is cut off")
        self._pixels = np.memmap(path, np.uint8, "r", shape=(size // each, *shape))
        self._axes = axes

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self._pixels[index].transpose(self._axes))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return StoredPictures, self._arguments


# ----------------------------------------------------------------------------------------------------- sets of files


def flowers102(root: Path, split: str) -> Source:
    """``root/flowers-102/jpg`` and the two .mat files beside it (Nilsback and Zisserman 2008); needs scipy."""
    folder = root / "flowers-102"
    numbers = _matlab(folder, "setid.mat")[_FLOWERS_SPLITS[split]].ravel().astype(np.int64)
    labels = _matlab(folder, "imagelabels.mat")["labels"].ravel().astype(np.int64)[numbers - 1] - 1
    paths = [f"image_{number:05d}.jpg" for number in numbers]
    gone = next((path for path in paths if not (folder / "jpg" / path).is_file()), None)
    if gone:
        raise ValueError(f"there is no file {folder / 'jpg' / gone}")
    return FileSource("", folder / "jpg", paths, labels, flower_names())


def flower_names() -> tuple[str, ...]:
    """The 102 names, in the order of the labels."""
    text = (resources.files("imgcls.data.datasets") / "flower_names.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _matlab(folder: Path, name: str) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"{name} is a MATLAB file, which takes the package scipy ({error}); install it with: "
            "pip install 'imgcls[matlab]'"
        ) from error
    require_digest(_file(folder / name), FLOWERS_DIGESTS[name])
    content: dict[str, Any] = loadmat(folder / name)
    return content


def omniglot(root: Path, split: str) -> Source:
    """``root/omniglot-py/images_<split>/<alphabet>/characterNN/<drawing>.png``; a class is ``<alphabet>/characterNN``.

    Lake et al. 2015. Other than "background" and "evaluation", the splits "background_small1" and "background_small2"
    are parts of the background set.
    """
    folder = root / "omniglot-py" / f"images_{split}"
    paths: list[str] = []
    labels: list[int] = []
    classes = [f"{alphabet}/{character}" for alphabet in _listed(folder) for character in _listed(folder / alphabet)]
    for label, name in enumerate(classes):
        drawings = [file for file in _listed(folder / name) if file.endswith(_OMNIGLOT_IMAGES)]
        paths += [f"{name}/{file}" for file in drawings]
        labels += [label] * len(drawings)
    return FileSource("", folder, paths, np.asarray(labels, dtype=np.int64), tuple(classes))


def office31(root: Path, split: str) -> Source:
    """``root/<domain>/images/<class>/<image>`` (Saenko et al. 2010); the domains are amazon, dslr and webcam."""
    return FolderSource(root / split / "images")


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _listed(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
