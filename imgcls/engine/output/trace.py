"""``DATALOADER.TRACE``: which samples each iteration was trained on, for people who want to see the order."""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from imgcls.engine.output.output_dir import mend_lines
from imgcls.engine.output.whole_lines import WholeLines
from imgcls.engine.ranks.distributed import first_rank_does
from imgcls.engine.step import sample_ids

logger = logging.getLogger(__name__)

_BEGINS = '{"iteration": '


class Trace:
    """A file with one JSON line an iteration: ``{"iteration": 7, "ids": [[3, 1], [0, 8]]}``, a list for each rank.

    The ids are the samples' indices in their data set, as they were trained on: with DATALOADER.ON_ERROR skip those
    that took the place of files that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._failing = path, False

    def write(self, iteration: int, batch: Any) -> None:
        """Add the line of ``iteration``; the file is whole after each. Collective."""
        ids = comm.gather(sample_ids(batch))
        if comm.is_main_process():
            try:
                self._append(json.dumps({"iteration": iteration, "ids": ids}) + "\n")
            except OSError as error:
                if not self._failing:
                    logger.warning("%s lacks iterations from %d on, training goes on: %s", self.path, iteration, error)
                self._failing = True

    def _append(self, line: str) -> None:
        with closing(WholeLines(self.path)) as file:
            file.write(line)
            # As detectron2 does with metrics.json: nobody writes the lines before a checkpoint again.
            os.fsync(file.fileno())
        self._failing = False


def open_trace(path: str, start: int) -> Trace | None:
    """The trace that goes on at iteration ``start``, its later lines dropped; None for an empty ``path``. Collective.

    Raises ``ValueError`` for a file that is no trace.
    """
    if not path:
        return None
    first_rank_does(lambda: _make_ready(Path(path), start))
    return Trace(Path(path))


def _make_ready(path: Path, start: int) -> None:
    if path.exists() and path.stat().st_size and not _is_trace(path):
        raise ValueError(f"{path} is no trace of samples; name another file with DATALOADER.TRACE")
    path.parent.mkdir(parents=True, exist_ok=True)
    mend_lines(path, start)


def _is_trace(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        # Also one that a kill cut off within its first line.
        return _BEGINS.startswith(file.read(len(_BEGINS)))
