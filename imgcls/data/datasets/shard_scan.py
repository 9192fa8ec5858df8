"""Shards without an index: what the headers of WebDataset tar files say."""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imgcls.data.datasets.class_names import composed, few, ordered
from imgcls.data.datasets.files import PackedPaths
from imgcls.data.datasets.shard_index import Shard, ShardIndex
from imgcls.data.fetch import digest_of
from imgcls.data.reading import IMAGE_SUFFIXES

CLASSES = "classes.txt"  # names of the classes 0, 1, ..., one a line, beside the shards
_ZEROS = 1024  # bytes of zeros at least, with which a tar file ends


class Entry(NamedTuple):
    """A sample in a tar file: its picture's name, place and size in bytes, and its label as it is written there."""

    name: str
    offset: int
    size: int
    label: int | str | list[str]


def find_shards(place: str) -> list[Path]:
    """The tar files in the folder ``place``, or those that the pattern ``place`` matches, sorted by name."""
    pattern = os.path.join(glob.escape(place), "*.tar") if os.path.isdir(place) else place
    found = [Path(path) for path in sorted(glob.glob(pattern)) if os.path.isfile(path)]
    if not found:
        raise ValueError(f"there is no shard {pattern}; change DATASETS.TRAIN/TEST")
    if len({path.parent for path in found}) > 1:
        raise ValueError(f"the shards of {pattern} lie in several folders; put them into one, or name several sets")
    return found


def entries_of(shard: Path) -> Iterator[Entry]:
    """The samples of a tar file in WebDataset's layout: neighbouring members that share their name up to its first dot.

    A sample is one picture and its label: ``cls`` (the number or the name of the class), or ``json`` with ``label``
    or ``labels``. Members of other kinds are passed over; only headers and labels are read.
    """
    sample: dict[str, tuple[int, int]] = {}
    current = ""
    with shard.open("rb") as file:
        for member in _members(shard):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not (stem and extension and member.isreg()) or member.issparse():
                continue
            key = f"{folder}/{stem}" if folder else stem
            if key != current and sample:
                yield _entry(shard, file, current, sample)
                sample = {}
            current = key
            if extension in sample:
                raise ValueError(f"the shard {shard} has {member.name} twice in a row; write it anew")
            sample[extension] = (member.offset_data, member.size)
        if sample:
            yield _entry(shard, file, current, sample)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as archive:  # compressed ones cannot be read from the middle
            yield from archive
        with shard.open("rb") as file:
            file.seek(-min(_ZEROS, os.path.getsize(shard)), os.SEEK_END)
            if file.read().strip(b"\0"):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {shard} is no whole uncompressed tar file: {error}; copy it again") from error


def _entry(shard: Path, file: io.BufferedReader, key: str, sample: dict[str, tuple[int, int]]) -> Entry:
    pictures = [extension for extension in sample if f".{extension.lower()}" in IMAGE_SUFFIXES]
    labels = [extension for extension in ("cls", "json") if extension in sample]
    if len(pictures) != 1 or not labels:
        raise ValueError(
            f"the sample {key} of the shard {shard} has {', '.join(sample)}; it needs one picture, and cls or json"
        )
    offset, size = sample[labels[0]]
    content = os.pread(file.fileno(), size, offset)
    return Entry(
        f"{key}.{pictures[0]}", *sample[pictures[0]], _label(content, labels[0], f"{key} of the shard {shard}")
    )


def _label(content: bytes, kind: str, where: str) -> int | str | list[str]:
    try:
        label: Any = content.decode().strip()
        if kind == "json":
            fields = json.loads(label)
            label = fields["labels"] if "labels" in fields else fields["label"]
        if isinstance(label, str) and label.removeprefix("-").isdecimal():
            label = int(label)
        if isinstance(label, list) and all(isinstance(name, str | int) for name in label):
            return [composed(str(name)) for name in label]
        if (type(label) is int and label >= 0) or (isinstance(label, str) and label):
            return composed(label) if isinstance(label, str) else label
        raise ValueError(f"{label!r} is neither a class nor a list of classes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the label ({kind}) of the sample {where} cannot be read: {error}; write it anew") from error


def index_shards(shards: Sequence[Path], classes: Sequence[str] | None = None, *, digests: bool = False) -> ShardIndex:
    """Read the headers of ``shards``.

    classes: in their order, where they are known. Otherwise labels that are numbers are indices, named by the lines of
        ``classes.txt`` beside the shards or else "0", "1", ...; labels that are names are sorted as text.
    digests: take each shard's SHA-256 too, which reads all of it.
    """
    found, entries = [], []
    for path in shards:
        inside = list(entries_of(path))
        status = path.stat()
        digest = digest_of(path) if digests else ""
        found.append(Shard(path.name, status.st_size, len(inside), digest, 0 if digests else status.st_mtime_ns))
        entries += inside
    if not entries:
        raise ValueError(f"the shards of {shards[0].parent} have no samples; change DATASETS.TRAIN/TEST")
    names = tuple(classes) if classes is not None else _classes_of(entries, shards[0].parent)
    return ShardIndex(
        classes=names,
        shards=tuple(found),
        offsets=np.array([entry.offset for entry in entries], dtype=np.int64),
        sizes=np.array([entry.size for entry in entries], dtype=np.int64),
        labels=_labels_of(entries, names, shards[0].parent),
        names=PackedPaths.of(entry.name for entry in entries),
    )


def _classes_of(entries: Sequence[Entry], folder: Path) -> tuple[str, ...]:
    if len({type(entry.label) for entry in entries}) > 1:
        raise ValueError(f"the labels in the shards of {folder} are of different kinds; write them anew")
    numbers = [entry.label for entry in entries if isinstance(entry.label, int)]
    if numbers:
        return _numbered_classes(1 + max(numbers), folder)
    labels = [entry.label if isinstance(entry.label, list) else [entry.label] for entry in entries]
    return ordered({str(name) for names in labels for name in names}, str(folder))


def _numbered_classes(number: int, folder: Path) -> tuple[str, ...]:
    if not (folder / CLASSES).is_file():
        return tuple(map(str, range(number)))
    names = (folder / CLASSES).read_text(encoding="utf-8").splitlines()
    if len(names) < number or len(set(names)) < len(names):
        raise ValueError(f"{folder / CLASSES} needs {number} different names, one a line; it has {len(set(names))}")
    return tuple(names)


def _labels_of(entries: Sequence[Entry], classes: Sequence[str], folder: Path) -> np.ndarray:
    index_of = {name: index for index, name in enumerate(classes)}
    if not isinstance(entries[0].label, list):
        # Numbers are indices wherever they stand; names only come where no numbers do.
        numbers = [entry.label if isinstance(entry.label, int) else index_of[str(entry.label)] for entry in entries]
        return np.array(numbers, dtype=np.int64)
    labels = np.zeros((len(entries), len(classes)), dtype=np.float32)
    for row, entry in enumerate(entries):
        assert isinstance(entry.label, list)
        unknown = [name for name in entry.label if name not in index_of]
        if unknown:
            raise ValueError(
                f"{entry.name} in the shards of {folder} has the labels {few(unknown)}, which are no classes"
            )
        labels[row, [index_of[name] for name in entry.label]] = 1
    return labels
