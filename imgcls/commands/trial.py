"""One trial of a sweep: a training in a process of its own, watched from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from imgcls.config.yaml_reading import read_yaml
from imgcls.engine.ranks.launching import end_with

TRAIN = (sys.executable, "-m", "imgcls", "train")
LEAVE_WITHIN = 40.0  # seconds from SIGTERM, in which a training saves, to SIGKILL

_MEMORY = re.compile(r"out of memory|can't allocate memory|MemoryError|bad_alloc", flags=re.IGNORECASE)


class Training:
    """The plain train command with ``words``, what it says going to ``folder/console.txt``.

    folder: its OUTPUT_DIR. environment: over this process's own.
    """

    def __init__(self, folder: Path, words: Sequence[str], environment: dict[str, str]) -> None:
        self.folder = folder
        self._seen: tuple[int, int] = (0, 0)
        self._lines: list[dict[str, float]] = []
        self._told = False
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "console.txt").open("ab") as console:
            self._begin = console.tell()
            self._process = subprocess.Popen(
                [*TRAIN, *words],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the sweep, which then ends its trainings in order
                preexec_fn=_end_with_parent(),
            )

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def evaluations(self) -> list[float]:
        """TEST.METRIC of every evaluation so far, the first one first."""
        file = self.folder / "metrics.json"
        try:
            status = file.stat()
            if (status.st_mtime_ns, status.st_size) != self._seen:
                self._lines = _whole_lines(file)
                self._seen = (status.st_mtime_ns, status.st_size)
            # It is "auto" until the training has seen the labels.
            name = f"classification/{read_yaml(self.folder / 'config.yaml')['TEST']['METRIC']}"
        except (OSError, ValueError, KeyError):
            return []
        by_iteration = {int(line["iteration"]): line[name] for line in self._lines if name in line}
        return [by_iteration[iteration] for iteration in sorted(by_iteration)]

    def stop(self) -> None:
        """Tell it to save and end."""
        if not self._told and self.running():
            self._process.terminate()  # once: a second signal may mean at once
        self._told = True

    def stopped(self) -> None:
        """Wait for the end after :meth:`stop`, and bring it about if it takes too long."""
        try:
            self._process.wait(LEAVE_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def failure(self) -> str:
        """Why it ended, in one line; empty when it came to its end."""
        code = self._process.wait()
        if code == 0:
            return ""
        with (self.folder / "console.txt").open("rb") as console:
            console.seek(self._begin)
            said = [line.strip() for line in console.read().decode("utf-8", errors="replace").splitlines()]
        number = -code if code < 0 else code - 128
        if number in set(signal.Signals):
            memory = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
            return f"ended by {signal.Signals(number).name}{memory}"
        told = [line for line in said if line.startswith("error")] or [line for line in said if line]
        last = told[-1][:300] if told else "it said nothing"
        memory = "out of memory: " if any(map(_MEMORY.search, said)) else ""
        return f"{memory}exit code {code}, {last}"


def _whole_lines(file: Path) -> list[dict[str, float]]:
    """The lines that parse: the last one may be half written as yet."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and "iteration" in content:
            found.append(content)
    return found


def _end_with_parent() -> Callable[[], None] | None:
    """What has the kernel tell a child to save and end when the sweep is killed; None where no kernel does that."""
    return partial(end_with, os.getpid(), signal.SIGTERM) if sys.platform.startswith("linux") else None
