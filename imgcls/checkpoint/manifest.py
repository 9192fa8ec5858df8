"""The manifest beside a checkpoint, and finding the newest whole one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgcls.checkpoint.safe_load import read_torch

logger = logging.getLogger(__name__)

FINAL, BEST = "model_final.pth", "model_best.pth"
_CHUNK = 1 << 22


def manifest_path(path: Path) -> Path:
    """``model.pth`` -> ``model.pth.json``."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint (sha256, bytes, iteration); None when it is absent or no manifest."""
    try:
        manifest = json.loads(manifest_path(path).read_text())
        kinds = {key: type(manifest[key]) for key in ("sha256", "bytes", "iteration")}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if kinds == {"sha256": str, "bytes": int, "iteration": int} else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over all that a checkpoint holds but its entry "digest": the same for any copy of the file.

    It serves where the manifest did not travel with the file. Names, dtypes, shapes, bytes and plain values count.
    """
    digest = hashlib.sha256()
    _digest_into(digest, {key: value for key, value in content.items() if key != "digest"})
    return digest.hexdigest()


def _digest_into(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(f"dict{len(value)}".encode())
        for key, item in value.items():
            digest.update(repr(key).encode())
            _digest_into(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list{len(value)}".encode())
        for item in value:
            _digest_into(digest, item)
    else:
        digest.update(repr(value).encode())


def floats_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in nested dicts and lists, with its dotted name."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        yield from floats_in(item, f"{name}.{key}" if name else str(key))


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint of the highest iteration in ``folder`` whose bytes are intact; None if there is no checkpoint.

    The pointer file is not asked: it may be lost, empty or wrong. Damaged files are named in the log and passed
    over; where all are damaged it is a ``ValueError``: starting again at 0 must be the user's decision.
    """
    candidates = sorted(
        (path for path in folder.glob("model_*.pth") if path.name != BEST),
        key=lambda path: (iteration_of(path), path.name),
        reverse=True,
    )
    for path in candidates:
        if is_whole(path):
            return path
        logger.warning("checkpoint %s is damaged; looking for an older one", path)
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise ValueError(
            f"none of the checkpoints in {folder} is whole ({names}); restore one, or start over in another OUTPUT_DIR"
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is what was written: by its manifest, or by the digest inside if it has none."""
    if not path.is_file():
        return False
    manifest = read_manifest(path)
    if manifest is not None:
        try:
            return path.stat().st_size == manifest["bytes"] and file_digest(path) == manifest["sha256"]
        except OSError:  # a disk that cannot read it, or a job that has just deleted it
            return False
    content = _content(path)
    if content is None:
        return False
    # Stock detectron2's files have no digest; that they can be read to the end is all there is to go by.
    return "digest" not in content or content["digest"] == content_digest(content)


def iteration_of(path: Path) -> int:
    """The iteration after which a checkpoint was written, by its manifest, its name or its content; -1: unknown."""
    manifest = read_manifest(path)
    if manifest is not None:
        return int(manifest["iteration"])
    number = path.stem.removeprefix("model_")
    if number.isdecimal():
        return int(number)
    stated = (_content(path) or {}).get("iteration")
    return stated if isinstance(stated, int) else -1


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = read_torch(path)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
