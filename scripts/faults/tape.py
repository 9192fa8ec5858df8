"""Every file operation of a trainer, in order: to know what was safe on the disk, and to end or fail at one of them.

A :class:`Tape` is put into a forked trainer before the command begins. From then on what Python writes, syncs, renames
and unlinks below the folder passes through it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import pathlib
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Place = tuple[int, str, str]  # iteration, operation, and the file it is about: (4, "fsync", "model_0000004.pth")

_TEMPORARY = re.compile(r"^\.(?P<name>.+?)\.(\d+\.)?tmp$")


def target(path: str | os.PathLike[str]) -> str:
    """The name that a file will have when its writer is done with it: without what marks it as temporary."""
    name = os.path.basename(os.fspath(path))
    found = _TEMPORARY.match(name)
    return found["name"] if found else name


def of_checkpoint(name: str) -> bool:
    """Whether a file is a part of saving: a checkpoint, a manifest or the pointer."""
    return name.startswith(("model_", "last_checkpoint"))


class Tape:
    """Watches the files below ``folder``, an absolute path.

    journal: file that gets a JSON line an operation. gone: folder that keeps what is replaced or unlinked.
    dies_at: the place, and which of the operations there (from 0) this process does not live to finish.
    full: called with a file's name before a write; True: there is no room on the disk.
    synced: whether the operating system does what fsync asks for; False: a disk that lies.
    """

    def __init__(
        self,
        folder: Path,
        journal: Path,
        gone: Path,
        *,
        dies_at: tuple[Place, int] | None = None,
        full: Callable[[str], bool] = lambda name: False,
        synced: bool = True,
    ) -> None:
        self.folder, self.gone, self.dies_at, self.full, self.synced = str(folder), gone, dies_at, full, synced
        gone.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.iteration = -1  # whoever trains says so
        self._seen = 0
        self._latest = ""  # what a sync of the folder is for
        self._kept = 0
        self._pid = os.getpid()

    def note(self, operation: str, path: Any, **more: Any) -> None:
        """An operation that is about to happen, or half of one; may be this process's end."""
        if os.getpid() != self._pid:  # a data worker
            return
        name = self._latest if operation == "sync folder" else target(path)
        self._latest = name
        place = {"iteration": self.iteration, "operation": operation, "name": name}
        self._write({**place, "path": os.fspath(path), **more})
        if self._is_the_end(operation, name):
            self.die()

    def _is_the_end(self, operation: str, name: str) -> bool:
        if self.dies_at is None or self.dies_at[0] != (self.iteration, operation, name):
            return False
        self._seen += 1
        return self._seen > self.dies_at[1]

    def dies_half(self, name: str) -> bool:
        """Whether the next write to ``name`` is to be the last and to come half as far."""
        return os.getpid() == self._pid and self._is_the_end("half a write", name)

    def die(self) -> NoReturn:
        """As if the power of this process were cut: no handler runs, no buffer is flushed."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def safe(self, descriptor: int) -> None:
        """The file's bytes so far would outlive a power failure."""
        state = os.fstat(descriptor)
        self._write({"operation": "safe", "inode": state.st_ino, "bytes": state.st_size})

    def folder_safe(self, path: str) -> None:
        """The folder's renames and unlinks so far would outlive a power failure."""
        self._write({"operation": "folder is safe", "path": path})

    def watches(self, path: Any) -> bool:
        """Whether ``path`` lies below the folder; a descriptor does not."""
        if not isinstance(path, (str, os.PathLike)):
            return False
        return os.path.abspath(os.fspath(path)).startswith(self.folder)

    def keep(self, path: Any) -> str:
        """Another name for what ``path`` is now, outside the folder; empty where there is no such file."""
        self._kept += 1
        kept = self.gone / f"{self._pid}-{self._kept}-{os.path.basename(os.fspath(path))}"
        try:
            _link(path, kept)
        except OSError:
            return ""
        return str(kept)

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._journal, (json.dumps(line) + "\n").encode())


_link, _open, _fsync, _replace, _unlink = os.link, io.open, os.fsync, os.replace, os.unlink


class _Watched(io.FileIO):
    """The lowest layer of a file that is written: each call is a write of the operating system's."""

    def __init__(self, path: str, mode: str, tape: Tape) -> None:
        self._tape, self._target = tape, target(path)
        tape.note("open", path)
        super().__init__(path, mode)
        if mode == "w":
            tape.safe(self.fileno())  # nothing is: what was there is gone

    def write(self, data: Any) -> int:
        if self._tape.full(self._target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
        self._tape.note("write", str(self.name))
        if self._tape.dies_half(self._target):
            view = memoryview(data).cast("B")
            super().write(view[: len(view) // 2])
            self._tape.die()
        return super().write(data) or 0


def put_in(tape: Tape) -> None:
    """Let everything that this process does to files below the tape's folder pass through ``tape``, for good."""
    open_watched, replace, unlink = _opening(tape), _replacing(tape), _unlinking(tape)

    def path_unlink(path: Path, missing_ok: bool = False) -> None:
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
            unlink(path)

    def path_replace(path: Path, new: Any) -> Path:
        replace(path, new)
        return type(path)(new)

    builtins.open = io.open = open_watched
    os.fsync = os.fdatasync = _syncing(tape)
    os.replace = os.rename = replace
    os.unlink = os.remove = unlink
    # Python 3.10's paths remember the functions that they found when pathlib was imported.
    pathlib.Path.open = lambda path, *args, **options: open_watched(path, *args, **options)  # type: ignore[assignment]
    pathlib.Path.unlink = path_unlink  # type: ignore[assignment]
    pathlib.Path.replace = pathlib.Path.rename = path_replace  # type: ignore[assignment]


def _opening(tape: Tape) -> Callable[..., Any]:
    """``open``, whose files below the folder tell the tape of each write."""

    def open_watched(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        if "+" in mode or not set(mode) & set("wax") or not tape.watches(file):
            return _open(file, mode, buffering, encoding, errors, newline, *rest, **more)
        raw = _Watched(os.fspath(file), mode.replace("b", "").replace("t", ""), tape)
        binary: Any = raw if buffering == 0 else io.BufferedWriter(raw, max(buffering, io.DEFAULT_BUFFER_SIZE))
        if "b" in mode:
            return binary
        # Python flushes after each line where buffering is 1.
        return io.TextIOWrapper(binary, encoding, errors, newline, line_buffering=buffering == 1)

    return open_watched


def _syncing(tape: Tape) -> Callable[[Any], None]:
    """``os.fsync``, which tells the tape what is safe now, and leaves the disk alone."""

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not tape.watches(path):
            return _fsync(descriptor)
        folder = os.path.isdir(path)
        tape.note("sync folder" if folder else "fsync", path)
        if not tape.synced:
            return None
        if folder:
            tape.folder_safe(path)
        else:
            tape.safe(descriptor)
        return None

    return fsync


def _replacing(tape: Tape) -> Callable[..., None]:
    """``os.replace``; what was there before is kept."""

    def replace(old: Any, new: Any, **options: Any) -> None:
        if not tape.watches(new):
            return _replace(old, new, **options)
        tape.note("rename", new, old=os.fspath(old), inode=os.stat(old).st_ino, kept=tape.keep(new))
        return _replace(old, new, **options)

    return replace


def _unlinking(tape: Tape) -> Callable[..., None]:
    """``os.unlink``; what was there is kept."""

    def unlink(path: Any, **options: Any) -> None:
        if not tape.watches(path) or not os.path.lexists(path):
            return _unlink(path, **options)
        tape.note("unlink", path, kept=tape.keep(path))
        return _unlink(path, **options)

    return unlink


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
