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

    seconds: 0 for never; then there is no thread. fired: whether ``late`` was called.
    """

    def __init__(self, seconds: float, late: Callable[[], None]) -> None:
        self.seconds, self._late = seconds, late
        self.fired = False
        self._deadline, self._closed = math.inf, threading.Event()
        if seconds:
            threading.Thread(target=self._run, name="watch over data workers", daemon=True).start()

    def __enter__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def __exit__(self, *_: object) -> None:
        self._deadline = math.inf

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self.seconds / 10):
            if time.monotonic() > self._deadline:
                self.fired = True
                self._late()
