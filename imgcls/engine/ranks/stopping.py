"""Signals that ask a training to save and to end; ``--resume`` goes on."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

# signal -> exit code. SIGUSR1 is what schedulers send some time before the end.
CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
URGENT = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process at once
TOGETHER = 1.0  # seconds; what comes within them is one request, sent to a group of processes and handed on besides
PATIENCE = 20.0  # seconds from a signal that a wait may go on for; save and end take some more


class Stopped(SystemExit):
    """The training has ended because a signal asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(CODES[number])


class _Requests:
    """What this process was asked; signal handlers belong to a process, and so does this."""

    asked = 0  # the first signal
    urgent_since = 0.0  # when the first of URGENT came; 0: not yet
    deferring = 0  # how many times over signals are kept for later
    waiting = False


def asked() -> int:
    """The signal that has asked this process to stop; 0: none."""
    return _Requests.asked


def name_of(number: int) -> str:
    """As kill(1) has it, with SIG before it."""
    return signal.Signals(number).name


@contextmanager
def listening() -> Iterator[None]:
    """Within, SIGTERM, SIGINT and SIGUSR1 raise :class:`Stopped`, inside :func:`deferred` they wait to be asked for.

    A second SIGTERM or SIGINT ends the process as if there were no handler. Afterwards all is as before. Threads other
    than the main one cannot have handlers: nothing changes there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _take) for number in CODES}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _end_waiting)
    # Whoever has started this process may have blocked them, which is inherited.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _Requests.asked, _Requests.urgent_since = 0, 0.0


@contextmanager
def deferred() -> Iterator[None]:
    """Within, there is something to save: a signal is only taken note of."""
    _Requests.deferring += 1
    try:
        yield
    finally:
        _Requests.deferring -= 1


def patient(items: Iterable[Item]) -> Iterator[Item]:
    """``items``; a wait for one that goes on PATIENCE seconds after a signal is a ``TimeoutError``."""
    iterator = iter(items)
    while True:
        _Requests.waiting = True
        if _Requests.asked:
            _set_alarm()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            _Requests.waiting = False
            if _Requests.asked:
                signal.setitimer(signal.ITIMER_REAL, 0)
        yield item


def _take(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number in URGENT and _Requests.urgent_since and now - _Requests.urgent_since > TOGETHER:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    if number in URGENT and not _Requests.urgent_since:
        _Requests.urgent_since = now
    first, _Requests.asked = not _Requests.asked, _Requests.asked or number
    if not _Requests.deferring:
        logger.warning("stopped by %s; there is nothing to save", name_of(number))
        raise Stopped(number)
    if first:
        logger.info("%s came: the run saves and ends; once more ends it at once", name_of(number))
        if _Requests.waiting:
            _set_alarm()


def _set_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)


def _end_waiting(number: int, frame: FrameType | None) -> None:
    if _Requests.waiting:
        raise TimeoutError(f"no batch came in the {PATIENCE:g} seconds after the signal to stop")
