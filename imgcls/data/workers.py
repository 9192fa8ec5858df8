"""The processes that read data: how they begin and end, and what to tell the user when they fail."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import threading
from typing import Any

SHARED_MEMORY = "/dev/shm"
# How it begins, as RuntimeError, that a worker has died; from a signal handler, so wherever the process just is.
_WORKER_ENDED = "DataLoader worker"


def start_worker(worker: int) -> None:
    """What a data worker does first, a DataLoader's ``worker_init_fn``."""
    # What a worker was born with is no garbage. Looking through it again and again, as Python's collector does, takes
    # a sixth of the time of a worker that reads photographs, and writes on pages that processes would share.
    gc.freeze()
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        # The process that trains decides what a signal means, also one to its whole group: it may yet need batches.
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        threading.Thread(target=_end_for, args=(_parent(),), name="watch over parent", daemon=True).start()


def _parent() -> int:
    """The process that has started this one, which may be gone by now: its own word for its parent would be another."""
    started_by = multiprocessing.parent_process()
    if started_by is None or started_by.pid is None or multiprocessing.get_start_method() == "forkserver":
        return os.getppid()
    return started_by.pid


def _end_for(parent: int) -> None:
    """End this process when ``parent`` says so or is gone; SIGTERM of others counts for nothing."""
    while os.getppid() == parent:
        told = signal.sigtimedwait((signal.SIGTERM,), 1.0)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)


def kill(processes: list[Any]) -> None:
    """End ``processes`` by force, without waiting for them."""
    # SIGTERM does not end a stopped process, and whoever waits for one waits for ever.
    for process in processes:
        process.kill()


def end(processes: list[Any]) -> None:
    """:func:`kill`, and wait until they are gone."""
    # torch's signal handler would complain of the very deaths that are wanted here; only the main thread has it.
    in_main = threading.current_thread() is threading.main_thread()
    # Not SIG_DFL: Python complains of a signal that came before and finds no function now.
    usual = signal.signal(signal.SIGCHLD, lambda *_: None) if in_main else None
    try:
        kill(processes)
        for process in processes:
            process.join()
    finally:
        if in_main:
            signal.signal(signal.SIGCHLD, usual or signal.SIG_DFL)


def is_worker_end(error: BaseException) -> bool:
    """Whether ``error`` is torch's word that a data worker has died, which may come in the middle of a step."""
    return isinstance(error, RuntimeError) and str(error).startswith(_WORKER_ENDED)


def is_of_a_transform(error: Exception) -> bool:
    """Whether it was raised by the code that runs in the workers, whose traceback torch has put into the message."""
    return str(error).startswith("Caught ") and "shared memory" not in str(error)


def worker_error(error: Exception, reason: str = "") -> ValueError:
    """What to tell the user of workers that died, hang or cannot send; ``reason`` where it is not in ``error``."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = reason or lines[-1 if lines[0].startswith("Caught ") else 0].rstrip(".")
    return ValueError(
        f"the data workers failed: {reason}. They ran out of memory or open files (ulimit -n), or {SHARED_MEMORY} is "
        f"full ({free_shared_memory() / 2**20:.0f} MiB free), or a batch took longer than DATALOADER.TIMEOUT; change "
        "that key, SOLVER.IMS_PER_BATCH or DATALOADER.NUM_WORKERS (0: no workers)"
    )


def free_shared_memory() -> float:
    """Bytes; infinite where there is no such limit."""
    return float(shutil.disk_usage(SHARED_MEMORY).free) if os.path.isdir(SHARED_MEMORY) else float("inf")
