"""The index of a set of WebDataset tar shards: where each picture lies, so that any one can be read by its number.

``index.json`` holds the classes and, for each shard, its size and digest; ``index.npz`` a row for each sample.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgcls.data.datasets.files import PackedPaths
from imgcls.data.fetch import digest_of

INDEX = "index.json"
FORMAT = "imgcls shards, version 1"


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, bytes, samples, digest (empty: not taken) and time of change in ns."""

    file: str
    bytes: int
    samples: int
    digest: str = ""
    changed: int = 0


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in a set of shards, sample by sample in the shards' order.

    offsets, sizes: (N,) int64, bytes, of a picture's file within its shard.
    labels: (N,) int64, or (N, K) float32 with 0 and 1.
    names: the pictures' names within their shards.
    checksums: (N,) uint32, CRC-32 of each picture's bytes; None where they were not taken.
    weights: (N,) float64 sampling weights, or None.
    """

    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: PackedPaths
    checksums: np.ndarray | None = None
    weights: np.ndarray | None = None


def write_index(index: ShardIndex, folder: Path, *, packed: bool, stem: str = "index") -> None:
    """Write ``stem.json`` and ``stem.npz``. packed: whether we wrote the shards, so that any change is a fault."""
    table = _table_bytes(index)
    _replace(folder / f"{stem}.npz", table)
    content = {
        "format": FORMAT,
        "packed": packed,
        "samples": len(index.offsets),
        "multi_label": index.labels.ndim == 2,
        "classes": index.classes,
        "table": {"file": f"{stem}.npz", "digest": digest_of(folder / f"{stem}.npz")},
        "shards": [asdict(shard) for shard in index.shards],
    }
    _replace(folder / f"{stem}.json", json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _table_bytes(index: ShardIndex) -> bytes:
    arrays = {"offsets": index.offsets, "sizes": index.sizes, "labels": index.labels}
    if index.labels.ndim == 2:
        arrays["labels"] = np.packbits(index.labels.astype(bool), axis=1)
    arrays |= {"names": index.names.content, "name_ends": index.names.ends}
    optional = {"checksums": index.checksums, "weights": index.weights}
    stream = io.BytesIO()
    np.savez(stream, **arrays, **{name: array for name, array in optional.items() if array is not None})  # type: ignore[arg-type]
    return stream.getvalue()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(content: bytes, where: str) -> dict[str, Any]:
    """The content of an ``index.json``, which messages call ``where``."""
    try:
        header = json.loads(content)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        header["shards"] = tuple(Shard(**shard) for shard in header["shards"])
        for file in (header["table"]["file"], *(shard.file for shard in header["shards"])):
            if Path(file).name != file:  # somebody else's index must not lead out of its folder
                raise ValueError(f"it names a file {file!r} outside its folder")
        if not {"packed", "samples", "multi_label", "classes"} <= header.keys():
            raise ValueError(f"it has the entries {sorted(header)}")
        return dict(header)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no index of shards: {error}; pack the set again") from error


def read_table(header: dict[str, Any], path: Path) -> ShardIndex:
    """The index that ``header`` and the table at ``path`` make; a damaged table is a ``ValueError``."""
    if digest_of(path) != header["table"]["digest"]:
        raise ValueError(f"{path} is not the file that its index.json was written with; copy the folder again")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            table = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the folder again") from error
    classes, labels = tuple(header["classes"]), table["labels"]
    if header["multi_label"]:
        labels = np.unpackbits(labels, axis=1, count=len(classes)).astype(np.float32)
    return ShardIndex(
        classes=classes,
        shards=header["shards"],
        offsets=table["offsets"],
        sizes=table["sizes"],
        labels=labels,
        names=PackedPaths(table["names"], table["name_ends"]),
        checksums=table.get("checksums"),
        weights=table.get("weights"),
    )
