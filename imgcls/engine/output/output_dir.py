"""The output directory: never overwritten, never shared by two running jobs."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import IO

import portalocker

from imgcls.checkpoint import whole_file

logger = logging.getLogger(__name__)

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as Lustre says it, NFS, and FUSE
_RESULTS = ("model_*.pth", "last_checkpoint", "metrics.json")
_locks: dict[Path, IO[str]] = {}


def claim(folder: str | Path, *, resume: bool) -> None:
    """Make ``folder`` this job's: create it and lock it until the process ends (even by SIGKILL).

    Raises ``ValueError`` when another job holds it, or when it has a job's results and ``resume`` is False; nothing in
    it is touched then. Where the file system has no locks, as many clusters' have not, that is a warning.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUTPUT_DIR {folder} is a file; choose another OUTPUT_DIR")
    if not resume and any(next(folder.glob(pattern), None) for pattern in _RESULTS):
        raise ValueError(
            f"OUTPUT_DIR {folder} holds the results of an earlier job; add --resume to go on with it, or choose "
            "another OUTPUT_DIR (--output)"
        )
    if folder.resolve() in _locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR {folder} takes no files ({error}); choose another OUTPUT_DIR") from error
    try:
        portalocker.lock(lock, portalocker.LOCK_EX | portalocker.LOCK_NB)
    except portalocker.exceptions.LockException as error:
        lock.close()
        if getattr(error.__context__, "errno", None) in _NO_LOCKS:
            logger.warning("OUTPUT_DIR %s cannot be locked: see to it that no other job writes there", folder)
            return
        raise ValueError(
            f"OUTPUT_DIR {folder} belongs to a job that is running; wait for it or choose another OUTPUT_DIR"
        ) from error
    _locks[folder.resolve()] = lock


def release(folder: str | Path) -> None:
    """Give up the lock; a process that trains several times in a row calls this between the jobs."""
    lock = _locks.pop(Path(folder).resolve(), None)
    if lock is not None:
        lock.close()


def _forget_locks() -> None:
    # A forked data worker would hold the lock on for some seconds after its parent was killed.
    for lock in _locks.values():
        lock.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def mend_metrics(folder: str | Path, start_iter: int) -> None:
    """:func:`mend_lines` for ``metrics.json``."""
    mend_lines(Path(folder) / "metrics.json", start_iter)


def mend_lines(path: Path, start_iter: int) -> None:
    """Drop from a file of JSON lines one torn by a kill and those of iterations that will be run again."""
    if not path.exists():
        return
    data = path.read_bytes()
    kept = b"".join(line.rstrip(b"\r\n") + b"\n" for line in data.splitlines(True) if _before(line, start_iter))
    if data.startswith(kept):
        # Nearly always: what goes is the end, and a full disk has room for that.
        os.truncate(path, len(kept))
        return
    with whole_file(path) as file:
        file.write(kept)


def _before(line: bytes, start_iter: int) -> bool:
    try:
        return bool(json.loads(line)["iteration"] < start_iter)
    except (ValueError, KeyError, TypeError):
        return False
