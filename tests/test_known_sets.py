"""The sets that go by a name, in miniature: what is read, that the counts are checked, and how they are prepared."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_image_folder
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as theirs

from imgcls.commands import prepare_data
from imgcls.commands.recipe import ROOTED_SETS
from imgcls.data import SETS, HoldOut, open_source, open_sources
from imgcls.data.datasets import ArraySource, FolderSource, HeldOutSource, known_sets, layouts
from imgcls.data.datasets.known_sets import KNOWN_SETS, Archive
from imgcls.data.fetch import digest_of
from imgcls.data.reading import read_image

RNG = np.random.default_rng(0)

# Published: LeCun et al. 1998; Xiao et al. 2017; Krizhevsky 2009; Coates et al. 2011; Nilsback and Zisserman 2008 with
# its setid.mat; Lake et al. 2015, table of the repository; Saenko et al. 2010, section 4; Russakovsky et al. 2015.
PUBLISHED = {
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "stl10": {"train": 5_000, "test": 8_000, "unlabeled": 100_000},
    "flowers102": {"train": 1_020, "val": 1_020, "test": 6_149},
    "omniglot": {
        **{"background": 964 * 20, "evaluation": 659 * 20},
        **{"background_small1": 136 * 20, "background_small2": 156 * 20},
    },
    "office31": {"amazon": 2_817, "dslr": 498, "webcam": 795},
    "imagenet": {"train": 1_281_167, "val": 50_000},
}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``counts("mnist", train=(3, 3))``: the set's published numbers for the length of a test."""

    def change(name: str, **splits: tuple[int, int]) -> None:
        row = dataclasses.replace(KNOWN_SETS[name], splits={**KNOWN_SETS[name].splits, **splits})
        monkeypatch.setitem(KNOWN_SETS, name, row)

    return change


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------- the table


def test_the_published_counts() -> None:
    found = {name: {split: n for split, (n, _) in row.splits.items()} for name, row in KNOWN_SETS.items()}
    assert found == PUBLISHED
    classes = {name: max(number for _, number in row.splits.values()) for name, row in KNOWN_SETS.items()}
    assert classes == {
        **{"mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "stl10": 10, "flowers102": 102},
        **{"omniglot": 964, "office31": 31, "imagenet": 1000},
    }


def test_every_file_comes_over_https_with_a_sha256_or_by_hand() -> None:
    for name, row in KNOWN_SETS.items():
        assert row.archives or row.by_hand, name
        for archive in row.archives:
            if archive.url.startswith("https://"):
                assert len(archive.digest) == len("sha256:") + 64 and archive.digest.startswith("sha256:")
            else:
                assert row.by_hand and "/" not in archive.url


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", [file for file, _ in theirs.MNIST.resources]),
        ("fashion_mnist", [file for file, _ in theirs.FashionMNIST.resources]),
        ("cifar10", [theirs.CIFAR10.filename]),
        ("cifar100", [theirs.CIFAR100.filename]),
        ("stl10", [theirs.STL10.filename]),
        ("flowers102", [file for file, _ in theirs.Flowers102._file_dict.values()]),
        ("omniglot", ["images_background.zip", "images_evaluation.zip"]),
    ],
)
def test_the_files_are_torchvisions(name: str, files: list[str]) -> None:
    ours = [archive.name for archive in KNOWN_SETS[name].archives]
    assert [file for file in ours if "small" not in file] == files


def test_every_split_has_a_name_in_both_catalogs() -> None:
    for name, splits in PUBLISHED.items():
        for split in splits:
            assert f"{name}_{split}" in SETS
            assert MetadataCatalog.get(f"{name}_{split}").evaluator_type == "classification"
        assert f"{name}_" in ROOTED_SETS


# ------------------------------------------------------------------------------------------------------- class folders


@pytest.mark.parametrize(
    ("name", "split"), [("imagenet", "train"), ("imagenet", "val"), ("cifar10", "test"), ("cifar100", "train")]
)
def test_class_folders(
    name: str, split: str, tmp_path: Path, counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under $DETECTRON2_DATASETS/<set>, or under ``root`` itself."""
    place = f"{name}/{split}"
    write_image_folder(tmp_path / place, {"n01": 1, "n02": 2})
    counts(name, **{split: (3, 2)})
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with pytest.raises(
        ValueError, match=rf"{name}_{split}: .*datasets/{name}.* python scripts/prepare_.* datasets/{name} \(what"
    ):
        open_source(f"{name}_{split}")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for source in (open_source(f"{name}_{split}"), DatasetCatalog.get(f"{name}_{split}")):
        assert (source.classes, len(source)) == (("n01", "n02"), 3)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    assert len(open_source(f"{name}_{split}", root=str(tmp_path / name))) == 3


def test_other_counts_than_the_published_are_refused(tmp_path: Path, counts: Callable[..., None]) -> None:
    write_image_folder(tmp_path / "train", {"n01": 1, "n02": 2})
    for wrong in ((4, 2), (2, 2), (3, 3), (3, 1)):
        counts("imagenet", train=wrong)
        told = rf"imagenet_train has 3 pictures of 2 classes in {tmp_path}; it should have {wrong[0]} of {wrong[1]}\. A"
        with pytest.raises(ValueError, match=told):
            open_source("imagenet_train", root=str(tmp_path))
    assert len(open_source(f"folder:{tmp_path}/train")) == 3  # as the message says


# --------------------------------------------------------------------------------------------------- torchvision's own


def idx(values: np.ndarray) -> bytes:
    """LeCun's format: two zeros, type 8 (bytes), dimensions, the sizes as big-endian 32 bits, the bytes."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(root: Path, cls: str) -> dict[str, np.ndarray]:
    """Three and two pictures in torchvision's layout; the pictures."""
    raw, made = root / cls / "raw", {}
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        made[part] = pixels(count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(made[part]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) + 7))
    return made


@pytest.mark.parametrize(("name", "cls"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_its_likes(name: str, cls: str, tmp_path: Path, counts: Callable[..., None]) -> None:
    counts(name, train=(3, 3), test=(2, 2))
    made = write_idx(tmp_path, cls)
    train, test = (open_source(f"{name}_{split}", root=str(tmp_path)) for split in ("train", "test"))
    assert (train.name, len(train), len(test), len(train.classes)) == (f"{name}_train", 3, 2, 10)
    assert train.classes == (tuple("0123456789") if name == "mnist" else tuple(theirs.FashionMNIST.classes))
    assert [sample["label"] for sample in train] == [7, 8, 9]
    np.testing.assert_array_equal([sample["pixels"] for sample in train], made["train"])
    np.testing.assert_array_equal([sample["pixels"] for sample in test], made["t10k"])


def test_mnist_that_is_absent_or_damaged(tmp_path: Path) -> None:
    remedy = r"To have it whole: python scripts/prepare_data\.py mnist --root"
    with pytest.raises(ValueError, match=rf"mnist_train: it cannot be read from {tmp_path}/none: .*\. {remedy}"):
        open_source("mnist_train", root=str(tmp_path / "none"))
    write_idx(tmp_path, "MNIST")
    for content in (b"", b"\0\0\x08\x03", b"\0\0\x08\x03" + struct.pack(">III", 3, 28, 28) + b"abc"):
        (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(ValueError, match=rf"mnist_train: it cannot be read from {tmp_path}: .+\. {remedy}"):
            open_source("mnist_train", root=str(tmp_path))


def write_cifar(root: Path, cls: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """One batch of four and one of two pictures, and torchvision's list of digests changed to theirs."""
    folder, made = root / cls.base_folder, {}
    folder.mkdir(parents=True)
    key, names = ("labels", "label_names") if cls is theirs.CIFAR10 else ("fine_labels", "fine_label_names")
    lists: dict[str, list[list[str]]] = {}
    for split, count in (("train", 4), ("test", 2)):
        content, labels = pixels(count, 3 * 32 * 32), RNG.permutation(count).tolist()
        made[split] = content.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1), labels
        (folder / split).write_bytes(pickle.dumps({"data": content, key: labels}))
        lists[split] = [[split, digest_of(folder / split, "md5")[4:]]]
    (folder / "meta").write_bytes(pickle.dumps({names: ["ant", "bee", "cat", "dog"]}))
    monkeypatch.setattr(cls, "train_list", lists["train"])
    monkeypatch.setattr(cls, "test_list", lists["test"])
    meta = {"filename": "meta", "key": names, "md5": digest_of(folder / "meta", "md5")[4:]}
    monkeypatch.setattr(cls, "meta", meta)
    return made


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, tmp_path: Path, counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    counts(name, train=(4, 4), test=(2, 2))
    made = write_cifar(tmp_path, getattr(theirs, name.upper()), monkeypatch)
    for split, (pictures, labels) in made.items():
        source = open_source(f"{name}_{split}", root=str(tmp_path))
        assert source.classes == ("ant", "bee", "cat", "dog")
        assert [sample["label"] for sample in source] == labels
        np.testing.assert_array_equal([sample["pixels"] for sample in source], pictures)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_pickle_of_somebody_else_is_never_opened(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, theirs.CIFAR10, monkeypatch)
    evil = pickle.dumps(Canary(tmp_path / "opened"))
    (tmp_path / theirs.CIFAR10.base_folder / file).write_bytes(evil)
    for split in ("train", "test"):
        with pytest.raises(
            ValueError, match=rf"cifar10_{split}: it cannot be read from {tmp_path}: Dataset .*corrupted"
        ):
            open_source(f"cifar10_{split}", root=str(tmp_path))
    assert not (tmp_path / "opened").exists()
    pickle.loads(evil)  # our own canary, which makes a folder in this test's own
    assert (tmp_path / "opened").exists()  # it would have sung


# -------------------------------------------------------------------------------------------------------------- STL10

STL10_NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def write_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("\n".join(STL10_NAMES) + "\n")
    for split, count in (("train", 3), ("test", 2), ("unlabeled", 4)):
        (folder / f"{split}_X.bin").write_bytes(pixels(count, 3, 96, 96).tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(bytes(range(10 - count + 1, 11)))
    monkeypatch.setattr(theirs.STL10, "_check_integrity", lambda self: True)  # of its digests


def test_stl10_is_what_torchvision_reads(
    tmp_path: Path, counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts("stl10", train=(3, 3), test=(2, 2), unlabeled=(4, 0))
    write_stl10(tmp_path, monkeypatch)
    for split in ("train", "test", "unlabeled"):
        source, reference = open_source(f"stl10_{split}", root=str(tmp_path)), theirs.STL10(str(tmp_path), split)
        assert source.classes == tuple(reference.classes) == tuple(STL10_NAMES)
        assert len(source) == len(reference)
        for sample, (picture, label) in zip(source, reference, strict=True):
            assert sample["label"] == label
            np.testing.assert_array_equal(sample["pixels"], np.asarray(picture))
    assert set(source.labels) == {-1}


def test_stl10_stays_on_disk(tmp_path: Path, counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is not forked gets the file's name, not 2.7 GB."""
    counts("stl10", unlabeled=(4, 0))
    write_stl10(tmp_path, monkeypatch)
    source = open_source("stl10_unlabeled", root=str(tmp_path))
    assert isinstance(source, ArraySource)
    assert isinstance(source.pixels._pixels, np.memmap)
    sent = pickle.dumps(source)
    assert len(sent) < 2000 < 4 * 27648
    # Made two lines above, as a worker that is spawned gets it.
    np.testing.assert_array_equal(pickle.loads(sent)[2]["pixels"], source[2]["pixels"])


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("train_X.bin", bytes(3 * 27648 - 1), "has 82943 bytes, no whole number of pictures of 27648; it is cut off"),
        ("train_X.bin", b"", "has 0 bytes, no whole number"),
        ("train_X.bin", bytes(2 * 27648), "2 pictures but 3 labels"),
        ("train_y.bin", bytes([1, 2, 11]), r"has labels outside of 1\.\.10"),
        ("train_y.bin", bytes([0, 2, 10]), r"has labels outside of 1\.\.10"),
        ("train_y.bin", None, r"there is no file .*train_y\.bin"),
        ("class_names.txt", None, r"there is no file .*class_names\.txt"),
    ],
)
def test_stl10_that_is_damaged(
    file: str, content: bytes | None, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stl10(tmp_path, monkeypatch)
    place = tmp_path / "stl10_binary" / file
    place.unlink() if content is None else place.write_bytes(content)
    with pytest.raises(ValueError, match=f"stl10_train: .*{match}.*prepare_data.py stl10"):
        open_source("stl10_train", root=str(tmp_path))


# ------------------------------------------------------------------------------------------------- Flowers, Omniglot


def write_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        Image.fromarray(pixels(4, 4, 3)).save(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[102, 1, 7, 7, 1, 30]], np.uint8)})
    savemat(folder / "setid.mat", {"trnid": [[3, 1]], "valid": [[6, 4]], "tstid": [[2, 5, 3]]})
    for name in ("imagelabels.mat", "setid.mat"):
        monkeypatch.setitem(layouts.FLOWERS_DIGESTS, name, digest_of(folder / name))
    monkeypatch.setattr(theirs.Flowers102, "_check_integrity", lambda self: True)  # of its digests
    return folder


def test_flowers_are_what_torchvision_reads(
    tmp_path: Path, counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts("flowers102", train=(2, 2), val=(2, 2), test=(3, 2))
    write_flowers(tmp_path, monkeypatch)
    for split in ("train", "val", "test"):
        source = open_source(f"flowers102_{split}", root=str(tmp_path))
        reference = theirs.Flowers102(str(tmp_path), split)
        assert [sample["label"] for sample in source] == reference._labels
        assert [sample["file_name"] for sample in source] == list(map(str, reference._image_files))
    assert source.classes == tuple(theirs.Flowers102.classes)
    assert len(set(layouts.flower_names())) == 102


def test_flowers_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_flowers(tmp_path, monkeypatch)
    (folder / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(ValueError, match=r"flowers102_train: there is no file .*image_00003\.jpg"):
        open_source("flowers102_train", root=str(tmp_path))
    savemat(folder / "setid.mat", {"trnid": [[1]]})
    with pytest.raises(ValueError, match=r"setid\.mat is not the file that it should be"):
        open_source("flowers102_train", root=str(tmp_path))


def test_without_scipy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flowers(tmp_path, monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"setid\.mat is a MATLAB file.*pip install 'imgcls\[matlab\]'"):
        open_source("flowers102_train", root=str(tmp_path))


def write_omniglot(root: Path, split: str, alphabets: dict[str, int]) -> Path:
    """Two drawings of each character, in one bit, black on white."""
    folder = root / "omniglot-py" / f"images_{split}"
    for alphabet, characters in alphabets.items():
        for number in range(1, characters + 1):
            place = folder / alphabet / f"character{number:02d}"
            place.mkdir(parents=True)
            for drawing in (2, 1):
                picture = Image.new("1", (105, 105), 1)
                picture.putpixel((number, drawing), 0)
                picture.save(place / f"{number:04d}_{drawing:02d}.png")
    return folder


def test_omniglot_keeps_its_alphabets(
    tmp_path: Path, counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one order on every machine: torchvision's is the disk's."""
    counts("omniglot", background=(10, 5), evaluation=(2, 1))
    write_omniglot(tmp_path, "background", {"Latin": 3, "Greek": 2})
    write_omniglot(tmp_path, "evaluation", {"Tengwar": 1})
    source = open_source("omniglot_background", root=str(tmp_path))
    assert source.classes == (
        *("Greek/character01", "Greek/character02"),
        *("Latin/character01", "Latin/character02", "Latin/character03"),
    )
    assert [sample["label"] for sample in source] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert open_source("omniglot_evaluation", root=str(tmp_path)).classes == ("Tengwar/character01",)
    monkeypatch.setattr(theirs.Omniglot, "_check_integrity", lambda self: True)  # of the zip's digest
    reference = theirs.Omniglot(str(tmp_path), background=True)
    by_name = {
        (reference._characters[label], name): reference[index][0]
        for index, (name, label) in enumerate(reference._flat_character_images)
    }
    assert len(by_name) == len(source)
    for sample in source:
        key = source.classes[sample["label"]], os.path.basename(sample["file_name"])
        np.testing.assert_array_equal(np.asarray(read_image(sample["file_name"]))[..., 0], np.asarray(by_name.pop(key)))


# ----------------------------------------------------------------------------------------------- Office31 and hold-outs


@pytest.fixture
def office31(tmp_path: Path, counts: Callable[..., None]) -> Path:
    for domain, each in (("amazon", 20), ("dslr", 4), ("webcam", 6)):
        write_image_folder(tmp_path / domain / "images", {"bike": each, "mug": 2 * each}, side=2)
        counts("office31", **{domain: (3 * each, 2)})
    return tmp_path


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(("amazon", "dslr", "webcam"), 2)))
def test_any_pair_of_domains(one: str, other: str, office31: Path) -> None:
    train = open_source(f"office31_{one}", root=str(office31))
    test = open_source(f"office31_{other}", root=str(office31), classes=train.classes)
    assert train.classes == test.classes == ("bike", "mug")
    assert f"/{one}/images/" in train[0]["file_name"] and f"/{other}/images/" in test[0]["file_name"]


def files(name: str, root: Path, hold_out: HoldOut) -> set[str]:
    return {sample["file_name"] for sample in open_source(name, root=str(root), hold_out=hold_out)}


@pytest.mark.parametrize("hold_out", [HoldOut(), HoldOut(0.25, 3), HoldOut(0.9, 1)])
@pytest.mark.parametrize("where", ["folder", "set"])
def test_a_split_of_a_set_without_one(where: str, hold_out: HoldOut, office31: Path) -> None:
    name = "office31_amazon" if where == "set" else f"folder:{office31}/amazon/images"
    train, val = files(f"{name}#train", office31, hold_out), files(f"{name}#val", office31, hold_out)
    assert not train & val and train | val == files(name, office31, HoldOut())
    for each, class_name in ((20, "bike"), (40, "mug")):
        assert sum(f"/{class_name}/" in file for file in val) == round(hold_out.share * each)


@pytest.mark.parametrize("where", ["folder", "set"])
def test_the_seed_chooses_the_split(where: str, office31: Path) -> None:
    name = "office31_amazon" if where == "set" else f"folder:{office31}/amazon/images"
    splits = [frozenset(files(f"{name}#val", office31, HoldOut(0.1, seed))) for seed in range(12)]
    assert len(set(splits)) == 12
    assert splits[5] == frozenset(files(f"{name}#val", office31, HoldOut(0.1, 5)))
    # Each of 60 pictures is held out by one seed of ten on average: seeds that are much alike would repeat themselves.
    assert 35 <= len(frozenset.union(*splits)) <= 60


def test_a_source_in_memory_is_split_by_class(tmp_path: Path) -> None:
    labels = np.array([0] * 30 + [1] * 10 + [2] * 3)
    source = ArraySource(
        "mine", np.arange(43, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), labels, "abc"
    )
    train, val = (HeldOutSource(source, split, HoldOut(0.2, 7)) for split in ("train", "val"))
    assert (train.name, val.name, val.classes) == ("mine#train", "mine#val", ("a", "b", "c"))
    assert [np.bincount(part.labels).tolist() for part in (train, val)] == [[24, 8, 2], [6, 2, 1]]
    seen = [int(sample["pixels"][0, 0]) for part in (train, val) for sample in part]
    assert sorted(seen) == list(range(43))
    assert [sample["image_id"] for sample in val] == list(range(9))
    assert [sample["label"] for sample in val] == labels[[int(s["pixels"][0, 0]) for s in val]].tolist()
    with pytest.raises(ValueError, match="few has 1 picture of the class 'b'; holding some out for validation needs 2"):
        HeldOutSource(ArraySource("few", np.zeros((3, 2, 2), np.uint8), np.array([0, 0, 1]), "ab"), "val")


def test_several_labels_and_none_are_split_as_a_whole() -> None:
    many = ArraySource(
        "many", np.zeros((20, 2, 2), np.uint8), np.eye(2, dtype=np.float32)[[0, 1] * 10], "ab", multi_label=True
    )
    assert [len(HeldOutSource(many, split)) for split in ("train", "val")] == [18, 2]
    assert HeldOutSource(many, "val").labels.shape == (2, 2)
    none = ArraySource("none", np.zeros((20, 2, 2), np.uint8), np.full(20, -1), "ab")
    assert [len(HeldOutSource(none, split)) for split in ("train", "val")] == [18, 2]
    none.labels = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="none cannot be split: its labels are not known beforehand"):
        HeldOutSource(none, "val")


def test_share_and_seed_come_from_the_config(office31: Path, classifier_cfg: Callable[..., Any]) -> None:
    from imgcls.engine import finalize

    sets = [f"folder:{office31}/amazon/images#{split}" for split in ("train", "val")]
    cfg = classifier_cfg("mobilenet_v1_0.25", "DATASETS.TRAIN", (sets[0],), "DATASETS.TEST", (sets[1],))
    chosen = []
    for share, seed in ((0.1, 0), (0.1, 4), (0.5, 4)):
        cfg.merge_from_list(["DATASETS.HOLD_OUT", share, "DATASETS.SPLIT_SEED", seed])
        _, data = finalize(cfg)
        assert data.train is not None and data.test is not None
        assert (len(data.train), len(data.test)) == (60 * (1 - share), 60 * share)
        chosen.append({sample["file_name"] for sample in data.test})
    assert chosen[0] != chosen[1]
    assert chosen[1] < chosen[2]  # a larger share keeps what a smaller one held out


def test_several_sets_are_split_each(office31: Path) -> None:
    source = open_sources([f"office31_{d}#val" for d in ("amazon", "dslr")], root=str(office31), hold_out=HoldOut(0.5))
    assert len(source) == 30 + 6
    with pytest.raises(ValueError, match=r"there is no such data set: got 'office31_amazn'.*office31_amazon"):
        open_source("office31_amazn#val")


def test_a_folder_split_is_still_a_folder(office31: Path) -> None:
    assert isinstance(open_source(f"folder:{office31}/dslr/images#val"), FolderSource)


# ------------------------------------------------------------------------------------------------------ prepare_data.py


def run(tool: Callable[..., Any], *words: object) -> tuple[int, list[str], str]:
    done = tool("scripts/prepare_data.py", *words)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_mnist_from_files_that_one_has(
    tmp_path: Path, tool: Callable[..., Any], counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts("mnist", train=(3, 3), test=(2, 2))
    write_idx(tmp_path, "MNIST")
    given = tmp_path / "given"
    given.mkdir()
    archives = []
    for archive in KNOWN_SETS["mnist"].archives:
        content = (tmp_path / archive.place).read_bytes()
        (given / archive.name).write_bytes(gzip.compress(content))
        archives.append(archive._replace(digest=digest_of(given / archive.name)))
    monkeypatch.setitem(KNOWN_SETS, "mnist", dataclasses.replace(KNOWN_SETS["mnist"], archives=tuple(archives)))
    root = tmp_path / "root"
    code, out, err = run(tool, "mnist", "--root", root, "--from", given)
    assert (code, err) == (0, "")
    assert out[0] == f"{root}/MNIST/raw/train-images-idx3-ubyte: 2,368 bytes from {given}/train-images-idx3-ubyte.gz"
    assert out[4:] == ["mnist_train: 3 pictures, 3 classes", "mnist_test: 2 pictures, 2 classes", f"complete in {root}"]
    assert len(list(given.iterdir())) == 4  # the user's files stay
    assert sorted(path.name for path in (root / "MNIST/raw").iterdir()) == sorted(a.place[10:] for a in archives)
    assert run(tool, "mnist", "--root", root)[1][0] == f"{root}/MNIST/raw/train-images-idx3-ubyte: there already"
    (given / archives[0].name).write_bytes(b"something else")
    code, out, err = run(tool, "mnist", "--root", tmp_path / "other", "--from", given)
    assert code == 2 and "train-images-idx3-ubyte.gz is not the file that it should be" in err
    assert not (tmp_path / "other").exists()


def zip_of(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as bundle:
        for path in sorted(folder.rglob("*.png")):
            bundle.write(path, path.relative_to(folder.parent).as_posix())
    return out.getvalue()


def test_a_split_alone_is_fetched_checked_unpacked_and_counted(
    tmp_path: Path, tool: Callable[..., Any], counts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zip_of(write_omniglot(tmp_path / "made", "background_small1", {"Greek": 2}))
    archive = tmp_path / "images_background_small1.zip"
    archive.write_bytes(content)
    fetched: list[str] = []

    def fetch(url: str, target: Path, digest: str, *, progress: Any) -> bool:
        fetched.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return True

    monkeypatch.setattr(prepare_data, "fetch", fetch)
    counts("omniglot", background_small1=(4, 2))
    root = tmp_path / "root"
    code, out, err = run(tool, "omniglot", "--root", root, "--splits", "background_small1")
    assert (code, err) == (0, "")
    url = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_background_small1.zip"
    assert fetched == [url]
    assert out[1:] == [
        f"{root}/omniglot-py/images_background_small1: 4 files from {root}/images_background_small1.zip",
        "omniglot_background_small1: 4 pictures, 2 classes",
        f"complete in {root}",
    ]
    assert [path.name for path in root.iterdir()] == ["omniglot-py"]  # the archive is gone
    run(tool, "omniglot", "--root", tmp_path / "kept", "--splits", "background_small1", "--keep")
    assert (tmp_path / "kept" / "images_background_small1.zip").read_bytes() == content
    assert len(open_source("omniglot_background_small1", root=str(root))) == 4


def test_a_set_that_is_handed_out_by_hand_only(office31: Path, tmp_path: Path, tool: Callable[..., Any]) -> None:
    root = tmp_path / "root"
    code, out, err = run(tool, "office31", "--root", root)
    assert (code, out) == (2, [])
    assert (
        err.startswith("error: domain_adaptation_images.tar.gz is handed out over Google Drive only")
        and "--from" in err
    )
    for top in ("", "domain_adaptation_images/"):
        with tarfile.open(tmp_path / "o.tgz", "w:gz") as bundle:
            for domain in ("amazon", "dslr", "webcam"):
                bundle.add(office31 / domain, f"{top}{domain}")
        code, out, err = run(tool, "office31", "--root", root / (top or "flat"), "--from", tmp_path / "o.tgz")
        assert (code, err) == (0, "")
        assert out[3:6] == [
            f"office31_{d}: {n} pictures, 2 classes" for d, n in (("amazon", 60), ("dslr", 12), ("webcam", 18))
        ]


def test_other_counts_than_expected_are_said(
    office31: Path, counts: Callable[..., None], tool: Callable[..., Any]
) -> None:
    counts("office31", dslr=(498, 31))
    code, _, err = run(tool, "office31", "--root", office31)
    assert code == 2
    assert f"office31_dslr has 12 pictures of 2 classes in {office31}; it should have 498 of 31" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["imagenet"], "imagenet is not fetched: scripts/prepare_imagenet.py builds it"),
        (["mnist", "--from", "nowhere"], "there is no file or folder nowhere; change --from"),
        (["mnist", "--splits", "val"], "mnist has no such split: got 'val'; allowed: train, test; change --splits"),
        (["mnits"], "invalid choice: 'mnits'"),
    ],
)
def test_wrong_words(words: list[str], told: str, tmp_path: Path, tool: Callable[..., Any]) -> None:
    code, out, err = run(tool, *words, "--root", tmp_path / "root")
    assert (code, out, len(err.splitlines())) == (2, [], 1)
    assert err.startswith("error: ") and told in err
    assert not (tmp_path / "root").exists()


def test_the_folder_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert known_sets.set_root("mnist") == Path("/data/mnist")
    assert known_sets.set_root("mnist", "/mine") == Path("/mine")
    assert Archive("https://a.b/c/d.zip", "", "").name == "d.zip"
