"""What a power failure leaves of a folder: nothing that was not synced can be relied on.

The bytes of a file that were written behind its last fsync are cut off at a random place, or are zeros from there on.
Renames and unlinks in a folder that was not synced after them may be undone: the latest ones first, as a journalling
file system has it, or any of them, which is all that POSIX promises.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any


def sizes_of(folder: Path) -> dict[int, int]:
    """Bytes of each file, by inode: all of them safe, when the job begins long after the one before it."""
    return {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def cut(folder: Path, journal: list[dict[str, Any]], safe: dict[int, int], chance: Random) -> dict[str, int]:
    """Make ``folder`` what a power failure at the end of ``journal`` may leave; how much was undone and damaged."""
    pending: list[dict[str, Any]] = []
    safe = dict(safe)
    for line in journal:
        if line["operation"] in ("rename", "unlink"):
            pending.append(line)
        elif line["operation"] == "folder is safe":
            pending = []
        elif line["operation"] == "safe":
            safe[line["inode"]] = line["bytes"]
    kept = chance.randint(0, len(pending))
    in_order = chance.random() < 0.5
    undone = pending[kept:] if in_order else chance.sample(pending, len(pending) - kept)
    for line in sorted(undone, key=pending.index, reverse=True):
        _undo(folder, line)
    damaged = [path for path in sorted(folder.rglob("*")) if path.is_file() and _damage(path, safe, chance)]
    return {"undone": len(undone), "damaged": len(damaged)}


def _undo(folder: Path, line: dict[str, Any]) -> None:
    path = folder.parent / line["path"]
    if line["operation"] == "rename":
        if not path.exists() or path.stat().st_ino != line["inode"]:
            return  # it did not happen, or something else has taken that place since
        path.replace(folder.parent / line["old"])
    if line["kept"] and not path.exists():
        os.link(line["kept"], path)


def _damage(path: Path, safe: dict[int, int], chance: Random) -> bool:
    state = path.stat()
    at_least = min(safe.get(state.st_ino, 0), state.st_size)
    if at_least == state.st_size:
        return False
    lost_from = chance.randint(at_least, state.st_size - 1)
    os.truncate(path, lost_from)
    if chance.random() < 0.5:
        os.truncate(path, state.st_size)  # zeros
    return True
