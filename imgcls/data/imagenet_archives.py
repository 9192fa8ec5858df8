"""ImageNet's class folders from the official archives of ILSVRC 2012 (Russakovsky et al. 2015).

ILSVRC2012_img_train.tar holds a tar file for each class, ILSVRC2012_img_val.tar 50,000 pictures side by side, and
ILSVRC2012_devkit_t12.tar.gz says which class each of these has, as numbers of its own: its ILSVRC2012_ID is not the
place in the usual, sorted order of the classes.

``train`` and ``val`` appear under their names when they are whole. Until then they grow in ``.train.partial``, class by
class, and in ``.val.partial``, so that a run that was killed is taken up where it ended.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import portalocker

from imgcls.data.archives import ArchiveError, Entry, entries, new_folder, write

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
# As torchvision has them.
DIGESTS = {
    TRAIN: "md5:1d675b47d978889d74fa0da5fadfb00e",
    VAL: "md5:29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "md5:fa75699e90414af021442c21a62c3abf",
}
MANIFEST = "imagenet.json"
_LOCK = ".lock"
_LARGEST_NOTE = 64 << 20  # bytes; of the devkit's two files
_SPARE = 1.02  # of the pictures' bytes; the last block of each file is half empty

Say = Callable[[str], None]


@dataclass(frozen=True)
class Counts:
    """How many there are."""

    classes: int = 1000
    train: int = 1_281_167
    val: int = 50_000


class Devkit(NamedTuple):
    """What the devkit says: pictures of each class (WordNet id), and the class of each validation picture in order."""

    train: dict[str, int]
    val: list[str]


def prepare(archives: Path, output: Path, *, expected: Counts = Counts(), say: Say = print) -> bool:
    """Build ``output/train`` and ``output/val`` from the archives in a folder; return whether anything was to be done.

    May be killed at any moment and called again. Raises ``ValueError`` where an archive is absent, damaged or has
    other counts than ``expected``, or where another process is at it; ``OSError`` where the disk is full.
    """
    if (output / MANIFEST).is_file() and (output / "train").is_dir() and (output / "val").is_dir():
        return False
    for name in (TRAIN, VAL, DEVKIT):
        if not (archives / name).is_file():
            raise ValueError(f"there is no file {archives / name}; fetch it from image-net.org or change --archives")
    devkit = read_devkit(archives / DEVKIT, expected)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        _require_room(archives, output, devkit)
        _build_train(archives / TRAIN, output, devkit, expected.train, say)
        _build_val(archives / VAL, output, devkit, say)
        _write_manifest(output, expected)
    return True


# ------------------------------------------------------------------------------------------------------------ devkit


def read_devkit(archive: Path, expected: Counts = Counts()) -> Devkit:
    """The classes, their numbers of pictures, and the validation set's labels."""
    meta, truth = _notes(archive)
    numbers = {number: (wnid, pictures) for number, wnid, pictures in _synsets(meta, archive)}
    try:
        val = [numbers[int(word)][0] for word in truth.split()]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the ground truth in {archive} has the label {error}, which is no class; fetch it again"
        ) from error
    devkit = Devkit(dict(numbers.values()), val)
    found, wanted = (len(devkit.train), len(val)), (expected.classes, expected.val)
    if found != wanted:
        raise ValueError(
            f"{archive} speaks of {found[0]:,} classes and {found[1]:,} validation pictures; expected are "
            f"{wanted[0]:,} and {wanted[1]:,}; fetch it again"
        )
    return devkit


def _notes(archive: Path) -> tuple[bytes, bytes]:
    """The contents of meta.mat and of the validation set's ground truth."""
    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    with archive.open("rb") as file:
        for entry in entries(file, str(archive)):
            name = entry.name.rpartition("/")[2]
            if name in wanted and entry.source is not None and entry.size <= _LARGEST_NOTE:
                wanted[name] = entry.source.read()
    for name, content in wanted.items():
        if not content:
            raise ValueError(f"{archive} has no file {name}; it must be the devkit for tasks 1 and 2; fetch it again")
    meta, truth = wanted.values()
    return meta, truth


def _synsets(meta: bytes, archive: Path) -> Iterator[tuple[int, str, int]]:
    """ILSVRC2012_ID, WordNet id and number of training pictures of each class; WordNet's inner nodes are no classes."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"the devkit has a MATLAB file, which takes the package scipy ({error}); install it with: "
            "pip install 'imgcls[matlab]'"
        ) from error
    try:
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        for row in rows:
            if int(row["num_children"]) == 0:
                yield int(row["ILSVRC2012_ID"]), _wnid(str(row["WNID"])), int(row["num_train_images"])
    except Exception as error:  # a damaged file can make loadmat raise anything
        raise ValueError(f"meta.mat in {archive} cannot be read: {error}; fetch it again") from error


def _wnid(text: str) -> str:
    # It becomes a folder's name.
    if not re.fullmatch(r"n\d{8}", text):
        raise ValueError(f"{text!r} is no WordNet id")
    return text


# ----------------------------------------------------------------------------------------------------------- building


def _build_train(archive: Path, output: Path, devkit: Devkit, expected: int, say: Say) -> None:
    if (output / "train").is_dir():
        return
    growing = output / ".train.partial"
    growing.mkdir(exist_ok=True)
    _sweep(growing)
    done = {path.name for path in growing.iterdir()}
    if done:
        say(f"train: going on behind {len(done):,} of {len(devkit.train):,} classes")
    with archive.open("rb") as file:
        for entry in entries(file, str(archive)):
            wnid = entry.name.removesuffix(".tar")
            if wnid not in devkit.train or entry.source is None:
                raise ArchiveError(f"{archive} has {entry.name!r}, which is the tar file of no class; fetch it again")
            if wnid in done:
                continue
            _build_class(entry, growing / wnid, f"{archive} ({entry.name})")
            done.add(wnid)
            if len(done) % 50 == 0 or len(done) == len(devkit.train):
                say(f"train: {len(done):,} of {len(devkit.train):,} classes")
    lacking = sorted(set(devkit.train) - done)
    if lacking:
        raise ArchiveError(f"{archive} lacks {len(lacking)} classes, the first is {lacking[0]}; fetch it again")
    _require_pictures(growing, devkit, expected, archive)
    os.replace(growing, output / "train")


def _build_class(entry: Entry, folder: Path, name: str) -> None:
    assert entry.source is not None
    with new_folder(folder) as growing:
        for picture in entries(entry.source, name):
            write(picture, growing / _flat(picture.name, name), name)


def _require_pictures(growing: Path, devkit: Devkit, expected: int, archive: Path) -> None:
    """The total decides. Where it is wrong, the devkit's numbers tell which classes to build again."""
    found = {wnid: len(os.listdir(growing / wnid)) for wnid in devkit.train}
    if sum(found.values()) == expected:
        return
    wrong = [wnid for wnid, pictures in found.items() if pictures != devkit.train[wnid]]
    for wnid in wrong:
        shutil.rmtree(growing / wnid)
    shown = ", ".join(f"{wnid} {found[wnid]:,} instead of {devkit.train[wnid]:,}" for wnid in wrong[:3])
    raise ArchiveError(
        f"{archive} has {sum(found.values()):,} pictures, expected are {expected:,} ({len(wrong)} classes differ from "
        f"the devkit: {shown}); fetch it again"
    )


def _build_val(archive: Path, output: Path, devkit: Devkit, say: Say) -> None:
    if (output / "val").is_dir():
        return
    growing = output / ".val.partial"
    for wnid in devkit.train:
        (growing / wnid).mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    with archive.open("rb") as file:
        for entry in entries(file, str(archive)):
            name = _flat(entry.name, str(archive))
            found = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
            number = int(found[1]) if found else 0
            if not 1 <= number <= len(devkit.val) or number in seen:
                raise ArchiveError(f"{archive} has {entry.name!r}, which is none of its pictures; fetch it again")
            seen.add(number)
            path = growing / devkit.val[number - 1] / name
            if not (path.is_file() and path.stat().st_size == entry.size):
                path.unlink(missing_ok=True)  # the one that was being written when the last run was killed
                write(entry, path, str(archive))
            if len(seen) % 10_000 == 0 or len(seen) == len(devkit.val):
                say(f"val: {len(seen):,} of {len(devkit.val):,} pictures")
    if len(seen) != len(devkit.val):
        raise ArchiveError(f"{archive} has {len(seen):,} pictures, expected are {len(devkit.val):,}; fetch it again")
    os.replace(growing, output / "val")


def _flat(name: str, archive: str) -> str:
    if "/" in name or not name.endswith(".JPEG"):
        raise ArchiveError(f"{archive} has {name!r}; expected are .JPEG files without folders; fetch it again")
    return name


def _write_manifest(output: Path, counts: Counts) -> None:
    partial = output / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(asdict(counts)) + "\n", encoding="utf-8")
    os.replace(partial, output / MANIFEST)


# -------------------------------------------------------------------------------------------------------- precautions


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """The system gives the lock up when the process ends, killed or not."""
    with (output / _LOCK).open("a") as lock:
        try:
            portalocker.lock(lock, portalocker.LOCK_EX | portalocker.LOCK_NB)
        except portalocker.exceptions.LockException as error:
            raise ValueError(f"another process is preparing {output}; wait for it or change --output") from error
        yield


def _sweep(growing: Path) -> None:
    """Remove the class that a killed run was at."""
    for path in growing.iterdir():
        if path.name.startswith("."):
            shutil.rmtree(path)


def _require_room(archives: Path, output: Path, devkit: Devkit) -> None:
    needed = 0
    if not (output / "train").is_dir():
        with (archives / TRAIN).open("rb") as file:
            for entry in entries(file, str(archives / TRAIN)):
                whole = (output / ".train.partial" / entry.name.removesuffix(".tar")).is_dir()
                needed += 0 if whole else entry.size
    if not (output / "val").is_dir():
        needed += (archives / VAL).stat().st_size
    free = shutil.disk_usage(output).free
    if needed * _SPARE > free:
        raise ValueError(
            f"{output} needs {needed * _SPARE / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB left; make room, or "
            "change --output"
        )
