"""What a run prints and writes: a line of progress, ``metrics.json``, and what ``SOLVER.WRITERS`` names.

All are detectron2's EventWriters. What goes wrong while one writes is a warning: a full disk or a lost network does
not end a training.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

from imgcls.engine.machine.memory import peak_memory
from imgcls.engine.output.trackers import TRACKERS
from imgcls.engine.output.whole_lines import WaitingLines

logger = logging.getLogger(__name__)

_LEAST_ROOM = 1 << 20  # bytes that a disk has free before another file for TensorBoard is begun on it
_WINDOW = 20  # iterations that the rates on the line of progress speak of


class ProgressLine(EventWriter):
    """``iter 120/1250 epoch 1.92 loss 0.531 lr 0.0498 812 images/s data 3 % eta 0:01:23 memory 512 MB``.

    data: share of the time that was spent waiting for the loader. memory: see ``peak_memory``.
    """

    def __init__(self, max_iter: int, global_batch: int, num_images: int) -> None:
        self.max_iter, self.global_batch, self.num_images = max_iter, global_batch, num_images

    def write(self) -> None:
        storage = get_event_storage()
        done = storage.iter + 1
        latest = {name: value for name, (value, _) in storage.latest().items()}
        parts = [f"iter {done}/{self.max_iter}", f"epoch {done * self.global_batch / self.num_images:.2f}"]
        parts += [
            f"{name.removeprefix('total_')} {latest[name]:.4g}" for name in ("total_loss", "lr") if name in latest
        ]
        if latest.get("time"):
            seconds, waiting = storage.history("time"), storage.history("data_time")
            eta = timedelta(seconds=int(seconds.median(_WINDOW) * (self.max_iter - done)))
            parts.append(f"{self.global_batch / seconds.median(_WINDOW):.0f} images/s")
            parts.append(f"data {100 * waiting.avg(_WINDOW) / seconds.avg(_WINDOW):.0f} %")
            parts.append(f"eta {eta}")
        parts.append(f"memory {peak_memory():.0f} MB")
        logger.info("  ".join(parts))

    def close(self) -> None:
        pass


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Since the last lap, or since it was made."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


class Tolerant(EventWriter):
    """Another writer, whose failures do not end the run: the first of a row is a warning, the next write tries again.

    make: builds the writer; called at the first write, and again where it failed.
    """

    def __init__(self, name: str, make: Callable[[], EventWriter]) -> None:
        self._name, self._make = name, make
        self._writer: EventWriter | None = None
        self._failing = False

    def write(self) -> None:
        try:
            if self._writer is None:
                self._writer = self._make()
            self._writer.write()
        except Exception as error:
            if not self._failing:
                logger.warning("%s is not written, training goes on: %s", self._name, error or type(error).__name__)
            self._failing = True
            return
        if self._failing:
            logger.info("%s is written again", self._name)
        self._failing = False

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            if not self._failing:
                logger.warning("the end of %s is missing: %s", self._name, error or type(error).__name__)


class Metrics(JSONWriter):
    """``metrics.json``, of which every line can be parsed at any moment, on a full disk too."""

    _file_handle: Any

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._file_handle.close()
        self._file_handle = WaitingLines(path)


class EventFiles(TensorboardXWriter):
    """TensorBoard's files; after a failure another one is begun, for what writes one ends with its first error."""

    def write(self) -> None:
        try:
            if "_writer" not in self.__dict__ and shutil.disk_usage(self._writer_args["log_dir"]).free < _LEAST_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write()
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        writer = self.__dict__.pop("_writer", None)
        with suppress(Exception):
            if writer is not None:
                writer.close()


def _without_tensorboards(tell: Callable[[Any], Any]) -> Callable[[Any], None]:
    """``tell``, a hook for errors in threads, without those of TensorBoard's, which :class:`Tolerant` tells."""

    def hook(fault: Any) -> None:
        if not type(fault.thread).__module__.startswith("tensorboard."):
            tell(fault)

    return hook


def scalars_at(iteration: int) -> dict[str, list[float | bool]]:
    """What the event storage has of ``iteration``: value and whether writers are to smooth it, by name."""
    storage = get_event_storage()
    hints = storage.smoothing_hints()
    return {name: [float(value), hints[name]] for name, (value, at) in storage.latest().items() if at == iteration}


def build_writers(cfg: CfgNode, num_images: int) -> list[EventWriter]:
    """Progress on the console, ``metrics.json`` (a JSON object a line) and what ``SOLVER.WRITERS`` names."""
    folder = Path(cfg.OUTPUT_DIR)
    if threading.excepthook.__module__ != __name__:
        threading.excepthook = _without_tensorboards(threading.excepthook)
    makers: dict[str, Callable[[], EventWriter]] = {
        "tensorboard": lambda: EventFiles(str(folder)),
        **{name: tracker.of_run(cfg) for name, tracker in TRACKERS.items()},
    }
    return [
        ProgressLine(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, num_images),
        Tolerant("metrics.json", lambda: Metrics(folder / "metrics.json")),
        *(Tolerant(name, makers[name]) for name in cfg.SOLVER.WRITERS),
    ]
