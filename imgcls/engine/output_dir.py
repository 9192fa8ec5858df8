"""The output directory: never overwritten, never shared by two running jobs."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import IO

import portalocker

logger = logging.getLogger(__name__)

LOCK = ".lock"
_RESULTS = ("model_*.pth", "last_checkpoint", "metrics.json")
_locks: dict[Path, IO[str]] = {}


def claim(folder: str | Path, *, resume: bool) -> None:
    """Make ``folder`` this job's: create it and lock it until the process ends (even by SIGKILL).

    Raises ``ValueError`` when another job holds it, or when it has a job's results and ``resume`` is False; nothing in
    it is touched then.
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
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a")
    try:
        portalocker.lock(lock, portalocker.LOCK_EX | portalocker.LOCK_NB)
    except portalocker.exceptions.LockException as error:
        lock.close()
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
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in lines if _before(line, start_iter)), encoding="utf-8")
    temporary.replace(path)


def _before(line: str, start_iter: int) -> bool:
    try:
        return json.loads(line)["iteration"] < start_iter
    except (ValueError, KeyError, TypeError):
        return False
