"""A watch over waits that nothing else ends."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable


class Watch:
    """Calls ``late``, from a thread, when what is done inside ``with watch:`` takes longer than ``seconds``.

    torch's own timeout is about waiting for a worker's message. When the worker has sent one and stops before its
    pixels are fetched, from the worker itself, the wait has no end but the worker's.

    Time in which this process itself stood still (Ctrl-Z, a job that the cluster suspended) does not count.

    seconds: 0 for never; then there is no thread. fired: whether ``late`` was called.
    """

    def __init__(self, seconds: float, late: Callable[[], None]) -> None:
        self.seconds, self._late = seconds, late
        self.fired = False
        self._deadline, self._closed = math.inf, threading.Event()
        self._looked, self._stood_still = time.monotonic(), False
        if seconds:
            threading.Thread(target=self._run, name="watch over data workers", daemon=True).start()

    def __enter__(self) -> None:
        self._deadline, self._stood_still = time.monotonic() + self.seconds, False

    def __exit__(self, *_: object) -> None:
        self._deadline = math.inf

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def stood_still(self) -> bool:
        """Whether this process did, since what is watched began."""
        return self._stood_still or self._lost() > 0

    def _lost(self) -> float:
        """Seconds since the latest look in which the thread should have looked again; 0 for a few."""
        lost = time.monotonic() - self._looked - self.seconds / 10
        return lost if lost > self.seconds / 2 else 0.0

    def _run(self) -> None:
        while not self._closed.wait(self.seconds / 10):
            lost = self._lost()
            if lost:
                self._stood_still = True
                self._deadline += lost
            elif time.monotonic() > self._deadline:
                self.fired = True
                self._late()
            self._looked = time.monotonic()
