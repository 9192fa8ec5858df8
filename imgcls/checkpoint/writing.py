"""Writing a checkpoint: temporary file, fsync, rename, then the manifest, then the pointer."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from imgcls.checkpoint.manifest import content_digest, floats_in, manifest_path, read_manifest

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
POINTER = "last_checkpoint"  # detectron2's name for the file that names the newest checkpoint


def write_checkpoint(
    path: Path, content: Mapping[str, Any], *, iteration: int = -1, newest: bool = False, kept: bool = False
) -> None:
    """Write ``content`` to ``path`` and a manifest beside it.

    Whatever happens on the way (a kill, a full disk), ``path`` is what it was before, or the new file whole.
    newest: also point ``last_checkpoint`` at it. kept: :func:`prune` is to leave it for good.
    """
    write_manifest(path, write_tensors(path, content), iteration=iteration, kept=kept)
    if newest:
        point_at(path)


def write_manifest(path: Path, digest: str, *, iteration: int, kept: bool = False) -> None:
    """Write the manifest of the checkpoint ``path``; digest: its SHA-256. The rest: :func:`write_checkpoint`."""
    manifest = {"sha256": digest, "bytes": path.stat().st_size, "iteration": iteration}
    if kept:
        manifest["kept"] = True
    write_whole(manifest_path(path), json.dumps(manifest))


def point_at(path: Path) -> None:
    """Have ``last_checkpoint`` name the checkpoint ``path``, which lies beside it."""
    write_whole(path.with_name(POINTER), path.name)


def write_tensors(path: Path, content: Mapping[str, Any]) -> str:
    """Write one file of tensors whole or not at all, with a digest of the content inside; returns its SHA-256.

    A tensor that is not finite is a ``ValueError``: a file with such a tensor must never be the newest.
    """
    _require_finite(path, content)
    content = {**content, "digest": content_digest(content)}
    # An old manifest goes before the old file does: a kill between the two must not leave it beside a file that is
    # not its own. Without a manifest the digest inside decides.
    with whole_file(path, goes_first=manifest_path(path)) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(content, cast(IO[bytes], hashing))
        except RuntimeError as error:
            # torch's zip writer makes an error of its own of what went wrong with the disk.
            raise hashing.failure or error from error
    return hashing.hexdigest()


@contextmanager
def whole_file(path: Path, *, goes_first: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when all of it lies on the disk, and leaves no trace otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if goes_first is not None:
            goes_first.unlink(missing_ok=True)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error}); make room or choose another folder") from error
    finally:
        # A file system that became read-only has its own way of saying that there is no such file.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """``text``, in UTF-8, as a :func:`whole_file` in the place of ``path``."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


class _HashingFile(io.RawIOBase):
    """Digests what ``torch.save`` writes; sequential because it offers no seeking."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._digest.update(data)
        return written

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_finite(path: Path, content: Mapping[str, Any]) -> None:
    for name, tensor in floats_in(content):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"refusing to write {path}: the tensor {name} is not finite. Lower SOLVER.BASE_LR, lengthen "
                "SOLVER.WARMUP_EPOCHS or set SOLVER.CLIP_GRADIENTS.ENABLED True, and go on with --resume from the "
                "last checkpoint"
            )


def sweep(folder: Path) -> None:
    """Remove the temporary files (``.NAME.PID.tmp``) that a killed writer left: of checkpoints, manifests, tables."""
    for leftover in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)


def prunable(folder: Path) -> list[Path]:
    """The periodic checkpoints of ``folder`` that are not kept for good, the oldest first."""
    numbers = {path: path.stem.removeprefix("model_") for path in folder.glob("model_*.pth")}
    periodic = sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda p: int(numbers[p]))
    return [path for path in periodic if not (read_manifest(path) or {}).get("kept")]


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest periodic checkpoints (``model_0000499.pth``), with their manifests.

    Those whose manifest says that they are kept stay, and do not count.
    """
    for path in prunable(folder)[: -keep or None]:
        manifest_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
