"""Every picture of a set decoded once, in processes that may crash, hang or run out of memory without harm."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from imgcls.data.datasets.source import Source
from imgcls.data.inspection.fingerprint import COLOUR, THUMB, Fingerprint, fingerprint

Examine = Callable[[dict[str, Any], int], Fingerprint]

AHEAD = 8  # samples that wait in a process' pipe, so that it never waits itself
TIME_LIMIT = 30.0  # seconds for one picture
MEMORY_LIMIT = 2 << 30  # bytes that a process may take beyond what it starts with


@dataclass
class Survey:
    """The pictures of one set. Arrays have a row for each sample looked at, in the order of ``indices``.

    role: "train" or "val". indices: (N,) int64, which samples of ``source``.
    labels: (N,) int64, or (N, K) float32 for several labels a picture; -1 where a sample cannot be had.
    errors: row -> why that picture cannot be read; ``good`` (N,) bool is False there and the other arrays hold zeros.
    contents, pixels: N digests. thumbs, colours, sizes, kinds, moments: see :class:`Fingerprint`.
    """

    role: str
    source: Source
    indices: np.ndarray
    labels: np.ndarray
    contents: list[bytes] = field(init=False)
    pixels: list[bytes] = field(init=False)
    errors: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        number = len(self.indices)
        self.contents, self.pixels = [b""] * number, [b""] * number
        self.good = np.zeros(number, dtype=bool)
        self.thumbs = np.zeros((number, THUMB, THUMB), dtype=np.uint8)
        self.colours = np.zeros((number, COLOUR, COLOUR, 3), dtype=np.uint8)
        self.sizes = np.zeros((number, 2), dtype=np.int64)
        self.kinds = np.zeros(number, dtype=np.int64)
        self.moments = np.zeros((number, 2, 3), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.indices)

    def put(self, row: int, seen: Fingerprint) -> None:
        """Take in what was seen of sample ``indices[row]``."""
        if self.source.labels is None and np.ndim(seen.label) == self.labels.ndim - 1:
            self.labels[row] = seen.label
        if seen.error:
            self.errors[row] = seen.error
            return
        self.good[row] = True
        self.contents[row], self.pixels[row] = seen.content, seen.pixels
        assert seen.thumb is not None and seen.colour is not None and seen.moments is not None
        self.thumbs[row], self.colours[row], self.moments[row] = seen.thumb, seen.colour, seen.moments
        self.sizes[row], self.kinds[row] = seen.size, seen.kinds

    def readable(self) -> Source:
        """The pictures that could be read, as a set of their own."""
        return Chosen(self.source, self.indices[self.good])

    def name(self, row: int) -> str:
        """What to call a picture: its path, or its number in the set."""
        index = int(self.indices[row])
        try:
            sample = self.source[index]
        except (ValueError, OSError):
            sample = {}
        return str(sample.get("file_name") or sample.get("name") or f"{self.source.name}[{index}]")

    def label_names(self, row: int) -> str:
        """The class of a picture, or its classes, as a word."""
        label = self.labels[row]
        chosen = [int(label)] if label.ndim == 0 else np.flatnonzero(label > 0)
        return "|".join(self.source.classes[index] for index in chosen if index >= 0) or "(none)"


class Chosen(Source):
    """Some samples of another source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.name, self.classes, self.multi_label = source.name, source.classes, source.multi_label
        self.labels = None if source.labels is None else source.labels[indices]
        self.weights = None if source.weights is None else source.weights[indices]
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[int(self._indices[index])], "image_id": index}


def survey(
    source: Source,
    role: str,
    *,
    sample: int = 0,
    workers: int = 1,
    max_pixels: int,
    seconds: float = TIME_LIMIT,
    examine: Examine = fingerprint,
) -> Survey:
    """Look at each picture of ``source``.

    sample: that many at most, drawn with a fixed seed; 0: all.
    workers: processes. seconds: for one picture; then its process is killed and the picture counts as unreadable, as
    it does when its process dies.
    """
    indices = np.arange(len(source))
    if 0 < sample < len(source):
        indices = np.sort(np.random.default_rng(0).choice(len(source), sample, replace=False))
    result = Survey(role, source, indices, _labels_at(source, indices))
    rows_of = {int(index): row for row, index in enumerate(indices)}
    for index, seen in _examined(source, indices.tolist(), max(1, workers), max_pixels, seconds, examine):
        result.put(rows_of[index], seen)
    return result


def _labels_at(source: Source, indices: np.ndarray) -> np.ndarray:
    if source.labels is not None:
        return np.asarray(source.labels)[indices]
    if source.multi_label:
        return np.zeros((len(indices), len(source.classes)), dtype=np.float32)
    return np.full(len(indices), -1, dtype=np.int64)


def _examined(
    source: Source, indices: Sequence[int], workers: int, max_pixels: int, seconds: float, examine: Examine
) -> Iterator[tuple[int, Fingerprint]]:
    """(index, fingerprint) of every index once, in any order."""
    todo = deque(indices)
    examiners = [
        Examiner(source, max_pixels, seconds, examine) for _ in range(min(workers, 1 + len(todo) // (2 * AHEAD)))
    ]
    try:
        while todo or any(examiner.pending for examiner in examiners):
            for examiner in examiners:
                examiner.take(todo)
            ready = wait([examiner.pipe for examiner in examiners if examiner.pending], timeout=0.2)
            for examiner in examiners:
                if examiner.pipe in ready:
                    yield examiner.answer(todo)
                elif examiner.is_late():
                    yield examiner.give_up(todo, f"decoding it took longer than {seconds:g} seconds")
    finally:
        for examiner in examiners:
            examiner.stop()


class Examiner:
    """One process that looks at pictures, and what to do when one of them is its end."""

    def __init__(self, source: Source, max_pixels: int, seconds: float, examine: Examine) -> None:
        self._work = (source, max_pixels, examine)
        self.seconds = seconds
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_look, args=(theirs, *self._work), daemon=True)
        self.process.start()
        theirs.close()
        self.pending: deque[int] = deque()
        self._since = time.monotonic()

    def take(self, todo: deque[int]) -> None:
        """Hand over samples until :data:`AHEAD` wait there."""
        if not self.pending:
            self._since = time.monotonic()
        while todo and len(self.pending) < AHEAD:
            try:
                self.pipe.send(todo[0])
            except OSError:  # it has died; the pipe tells so at the next answer
                if not self.pending:
                    self._start()
                return
            self.pending.append(todo.popleft())

    def answer(self, todo: deque[int]) -> tuple[int, Fingerprint]:
        """What it says of its next sample; if it has died, that sample was the reason."""
        try:
            seen: Fingerprint = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return self.give_up(todo, f"decoding it ended the process ({how})")
        self._since = time.monotonic()
        return self.pending.popleft(), seen

    def is_late(self) -> bool:
        return bool(self.pending) and time.monotonic() - self._since > self.seconds

    def give_up(self, todo: deque[int], reason: str) -> tuple[int, Fingerprint]:
        """Blame the sample in hand, give the others back and go on with a new process."""
        self.stop()
        index = self.pending.popleft()
        todo.extendleft(reversed(self.pending))
        self._start()
        return index, Fingerprint(f"{reason}; replace the file or remove it")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _look(pipe: Connection, source: Source, max_pixels: int, examine: Examine) -> None:
    """The process: index in, fingerprint out, until the pipe closes or the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends this one
    warnings.simplefilter("ignore")  # what a decoder has to say comes back as an error, or is none
    cv2.setNumThreads(1)
    _limit_memory()
    parent = os.getppid()
    while True:
        while not pipe.poll(5):
            if os.getppid() != parent:  # it was killed, and nobody will ask any more
                return
        try:
            index = pipe.recv()
        except EOFError:
            return
        try:
            seen = examine(source[index], max_pixels)
        except Exception as error:  # the sample itself cannot be had; a source of the user's may raise anything
            seen = Fingerprint(" ".join(str(error).split()) or type(error).__name__)
        pipe.send(seen)


def _limit_memory() -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = pages * resource.getpagesize() + MEMORY_LIMIT
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
