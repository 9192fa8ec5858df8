"""The sets that go by a name: how many pictures each has, as published, and where its files come from.

SHA-256 digests and sizes are those that tensorflow_datasets and Keras publish for the same files; Omniglot's small
sets were compared with the files themselves. ``folder:DIR`` reads a part of a set, or one that was cleaned: under its
own name a set is whole or refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imgcls.data.datasets import layouts
from imgcls.data.datasets.source import Source

Reader = Callable[[Path, str], Source]  # (root of the set, split) -> the split


class Archive(NamedTuple):
    """One file to fetch and where its content goes."""

    url: str  # its last part is the file's name; without https:// it is the name alone, and nothing is fetched
    digest: str  # "" where none is known
    place: str  # below the set's root: the folder to unpack it into, or the file
    top: str = ""  # the folder of the archive that becomes the place
    split: str = ""  # the only split that needs it; empty: all do

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class KnownSet:
    """A row of the table."""

    reader: Reader
    splits: Mapping[str, tuple[int, int]]  # split -> (pictures, classes that they have)
    archives: tuple[Archive, ...] = ()
    by_hand: str = ""  # how to come by the files where no program may fetch them

    def open(self, name: str, split: str, root: Path) -> Source:
        """The split, or a ``ValueError`` that says what is amiss and which command mends it."""
        try:
            source = self.reader(root, split)
        except ValueError as error:
            raise ValueError(f"{name}_{split}: {error}. {self.remedy(name, root)}") from error
        if not source.name:
            source.name = f"{name}_{split}"
        self._require_counts(source, name, split, root)
        return source

    def _require_counts(self, source: Source, name: str, split: str, root: Path) -> None:
        assert source.labels is not None
        found = len(source), int((np.unique(source.labels) >= 0).sum())
        if found != self.splits[split]:
            pictures, classes = self.splits[split]
            raise ValueError(
                f"{name}_{split} has {found[0]:,} pictures of {found[1]:,} classes in {root}; it should have "
                f"{pictures:,} of {classes:,}. A part of it can be read as folder:DIR. {self.remedy(name, root)}"
            )

    def remedy(self, name: str, root: Path) -> str:
        command = "prepare_imagenet.py --output" if name == "imagenet" else f"prepare_data.py {name} --root"
        return (
            f"To have it whole: python scripts/{command} {root} (what is damaged must be removed first); or change "
            "DETECTRON2_DATASETS or --data"
        )


def set_root(name: str, root: str = "") -> Path:
    """Where the set lies: ``root``, or its folder in $DETECTRON2_DATASETS (default: datasets)."""
    return Path(root) if root else Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / name


def open_known(name: str, split: str, root: str) -> Source:
    return KNOWN_SETS[name].open(name, split, set_root(name, root))


def openers() -> dict[str, Callable[[str], Source]]:
    """``<set>_<split>`` -> function(root) that opens it."""
    return {
        f"{name}_{split}": partial(open_known, name, split) for name, row in KNOWN_SETS.items() for split in row.splits
    }


def _idx_files(base: str, folder: str, digests: Mapping[str, str]) -> tuple[Archive, ...]:
    return tuple(
        Archive(f"{base}/{part}-ubyte.gz", f"sha256:{digest}", f"{folder}/raw/{part}-ubyte")
        for part, digest in digests.items()
    )


def _omniglot_file(split: str, digest: str) -> Archive:
    name = f"images_{split}"
    base = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    return Archive(f"{base}/{name}.zip", f"sha256:{digest}", f"omniglot-py/{name}", name, split)


_MNIST = {
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_FASHION = {
    "train-images-idx3": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
_OFFICE31 = "domain_adaptation_images.tar.gz"

# Pictures and classes: Russakovsky et al. 2015; LeCun et al. 1998; Xiao et al. 2017; Krizhevsky 2009; Coates et al.
# 2011; Nilsback and Zisserman 2008; Lake et al. 2015 (20 drawings of each character); Saenko et al. 2010.
KNOWN_SETS: dict[str, KnownSet] = {
    "imagenet": KnownSet(
        layouts.class_folders,
        {"train": (1_281_167, 1000), "val": (50_000, 1000)},
        by_hand="scripts/prepare_imagenet.py builds it from the official archives, which image-net.org hands out",
    ),
    "mnist": KnownSet(
        layouts.mnist,
        {"train": (60_000, 10), "test": (10_000, 10)},
        _idx_files("https://ossci-datasets.s3.amazonaws.com/mnist", "MNIST", _MNIST),
    ),
    "fashion_mnist": KnownSet(
        layouts.fashion_mnist,
        {"train": (60_000, 10), "test": (10_000, 10)},
        _idx_files(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "FashionMNIST",
            _FASHION,
        ),
    ),
    "cifar10": KnownSet(
        layouts.cifar10,
        {"train": (50_000, 10), "test": (10_000, 10)},
        (
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "cifar-10-batches-py",
                "cifar-10-batches-py",
            ),
        ),
    ),
    "cifar100": KnownSet(
        layouts.cifar100,
        {"train": (50_000, 100), "test": (10_000, 100)},
        (
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                "cifar-100-python",
                "cifar-100-python",
            ),
        ),
    ),
    "stl10": KnownSet(
        layouts.stl10,
        {"train": (5_000, 10), "test": (8_000, 10), "unlabeled": (100_000, 0)},
        (
            Archive(
                "https://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                "sha256:f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
                "stl10_binary",
                "stl10_binary",
            ),
        ),
    ),
    "flowers102": KnownSet(
        layouts.flowers102,
        {"train": (1_020, 102), "val": (1_020, 102), "test": (6_149, 102)},
        (
            Archive(
                f"{_FLOWERS_URL}/102flowers.tgz",
                "sha256:2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",
                "flowers-102/jpg",
                "jpg",
            ),
            *(
                Archive(f"{_FLOWERS_URL}/{name}", digest, f"flowers-102/{name}")
                for name, digest in layouts.FLOWERS_DIGESTS.items()
            ),
        ),
    ),
    "omniglot": KnownSet(
        layouts.omniglot,
        {
            "background": (19_280, 964),
            "evaluation": (13_180, 659),
            "background_small1": (2_720, 136),
            "background_small2": (3_120, 156),
        },
        (
            _omniglot_file("background", "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
            _omniglot_file("evaluation", "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
            _omniglot_file("background_small1", "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"),
            _omniglot_file("background_small2", "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"),
        ),
    ),
    "office31": KnownSet(
        layouts.office31,
        {"amazon": (2_817, 31), "dslr": (498, 31), "webcam": (795, 31)},
        tuple(Archive(_OFFICE31, "", domain, domain, domain) for domain in ("amazon", "dslr", "webcam")),
        by_hand=f"{_OFFICE31} is handed out over Google Drive only: fetch it in a browser and name it with --from",
    ),
}
