"""WebDataset tar shards, read by number: any sample of any shard, so that an order over all of them is exact."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from imgcls.data.datasets.remote_folder import RemoteFolder
from imgcls.data.datasets.shard_index import INDEX, Shard, ShardIndex, read_header, read_table, write_index
from imgcls.data.datasets.shard_scan import find_shards, index_shards
from imgcls.data.datasets.source import Source
from imgcls.data.fetch import digest_of
from imgcls.data.reading import ImageError, check_header

OPEN_FILES = 32  # shards that a process holds open at most, of each set
FILES_CHECKED = 2_000  # pictures that are looked at when a set is opened


class ShardSource(Source):
    """Pictures in tar files. A sample has ``encoded``, the bytes of an image file, and ``name``, its shard and name.

    place: a folder that ``tools/pack_dataset.py`` wrote; the URL of such a folder, whose shards are fetched into a
        cache when they are needed (:class:`~imgcls.data.datasets.remote_folder.RemoteFolder`); or a folder of
        somebody else's shards, or a pattern such as ``DIR/train-*.tar``, whose headers are read the first time.

    A shard that is missing or has another size is a ``ValueError`` when the set is opened. A picture whose bytes are
    not those that were packed is an :class:`~imgcls.data.reading.ImageError` when it is read.
    """

    labels: np.ndarray
    runs: np.ndarray

    def __init__(self, place: str) -> None:
        self.name = f"shards:{place}"
        self._remote = RemoteFolder(place) if "://" in place else None
        self._folder, index = _open_remote(self._remote) if self._remote else _open_local(place)
        self.classes, self.labels, self.weights = index.classes, index.labels, index.weights
        self.multi_label = index.labels.ndim == 2
        self.runs = np.array([shard.samples for shard in index.shards], dtype=np.int64)
        self._ends = np.cumsum(self.runs)
        self._shards, self._names = index.shards, index.names
        self._offsets, self._sizes, self._checksums = index.offsets, index.sizes, index.checksums
        self._open_file = lru_cache(OPEN_FILES)(_File)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open_file = lru_cache(OPEN_FILES)(_File)

    def check_files(self) -> None:
        if self._remote:  # it would fetch them all
            return
        for index in range(0, len(self), max(1, len(self) // FILES_CHECKED)):
            check_header(self._content(index), name=self._called(index))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index] if self.multi_label else int(self.labels[index])
        sample = {"image_id": index, "label": label}
        return {**sample, "encoded": self._content(index), "name": self._called(index)}

    def _content(self, index: int) -> bytes:
        called, size = self._called(index), int(self._sizes[index])
        try:
            content = self._open_file(self._path(self._shard_of(index))).read(size, int(self._offsets[index]))
        except FileNotFoundError as error:
            raise ImageError(f"cannot read {called}: the shard is not there any more; bring it back", called) from error
        if len(content) < size or (self._checksums is not None and zlib.crc32(content) != self._checksums[index]):
            what = "its bytes are not those that were packed" if len(content) == size else "the shard ends before it"
            raise ImageError(f"cannot read {called}: {what}; copy the shard again", called)
        return content

    def _shard_of(self, index: int) -> Shard:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]

    def _called(self, index: int) -> str:
        place = self._remote.url if self._remote else self._folder
        return f"{place}/{self._shard_of(index).file}:{self._names[index]}"

    def _path(self, shard: Shard) -> Path:
        return self._remote.local(shard.file, shard.digest) if self._remote else self._folder / shard.file


class _File:
    """A file that is open for reading at any place; no place is kept, so forked processes do not disturb each other."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _open_remote(remote: RemoteFolder) -> tuple[Path, ShardIndex]:
    header = read_header(remote.read(INDEX), f"{remote.url}/{INDEX}")
    if not header["packed"]:
        raise ValueError(
            f"{remote.url} has an index without digests, so nothing that is fetched could be checked; write the shards "
            "with tools/pack_dataset.py, or copy them here and open that folder"
        )
    table = header["table"]
    return remote.cache, read_table(header, remote.local(table["file"], table["digest"]))


def _open_local(place: str) -> tuple[Path, ShardIndex]:
    folder = Path(place)
    if (folder / INDEX).is_file():
        header = read_header((folder / INDEX).read_bytes(), str(folder / INDEX))
        if header["packed"]:
            for shard in header["shards"]:
                _require_size(folder, shard)
            return folder, read_table(header, folder / header["table"]["file"])
    return _open_foreign(place)


def _require_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"the shard {path} is missing; bring it back, or pack the set again")
    if path.stat().st_size != shard.bytes:
        raise ValueError(f"the shard {path} has {path.stat().st_size} bytes, not {shard.bytes}; copy it again")


def _open_foreign(place: str) -> tuple[Path, ShardIndex]:
    """Shards of somebody else's: by the index kept beside them while they are the same, otherwise by their headers."""
    shards = find_shards(place)
    folder = shards[0].parent
    # Two patterns in one folder are two sets.
    stem = "index" if os.path.isdir(place) else f"index-{zlib.crc32(os.fsencode(Path(place).name)):08x}"
    kept = folder / f"{stem}.json"
    if kept.is_file():
        header = read_header(kept.read_bytes(), str(kept))
        known = [(shard.file, shard.bytes, shard.changed) for shard in header["shards"]]
        if [_state(path) for path in shards] == known:
            return folder, read_table(header, folder / header["table"]["file"])
    index = index_shards(shards)
    if os.access(folder, os.W_OK):
        write_index(index, folder, packed=False, stem=stem)
    return folder, index


def _state(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def checked_index(folder: Path, classes: Sequence[str], weights: np.ndarray | None = None) -> ShardIndex:
    """The index of shards that were just written, with the digest of each and a checksum of each picture."""
    shards = find_shards(str(folder))
    index = index_shards(shards, classes, digests=True)
    checksums: list[int] = []
    for path, shard in zip(shards, index.shards, strict=True):
        file, first = _File(path), len(checksums)
        for row in range(first, first + shard.samples):
            checksums.append(zlib.crc32(file.read(int(index.sizes[row]), int(index.offsets[row]))))
    return replace(index, checksums=np.array(checksums, dtype=np.uint32), weights=weights)


def damaged_shards(folder: Path) -> list[str]:
    """What is wrong with a packed folder, a line for each shard, by reading all of it; empty when it is whole."""
    header = read_header((folder / INDEX).read_bytes(), str(folder / INDEX))
    read_table(header, folder / header["table"]["file"])
    found = []
    for shard in header["shards"]:
        try:
            _require_size(folder, shard)
            if shard.digest and digest_of(folder / shard.file) != shard.digest:
                found.append(f"the shard {folder / shard.file} has other bytes than were packed; copy it again")
        except ValueError as error:
            found.append(str(error))
    return found
