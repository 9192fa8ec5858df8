"""Writing a run's checkpoints: the periodic ones, the best and the last."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgcls.checkpoint import BEST, FINAL, prune, sweep, write_checkpoint

logger = logging.getLogger(__name__)


class Saving:
    """The checkpoints of ``folder``; only rank 0 calls it.

    keep: how many of the newest periodic checkpoints stay, beside the best and the last one.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, content: Mapping[str, Any], *, saving: bool, last: bool, best: bool) -> None:
        """Write ``content``, a checkpoint's.

        saving: as the newest checkpoint; with ``last`` as the run's last one. best: as the best one.
        """
        iteration = content["iteration"]
        sweep(self.folder)
        if saving:
            path = self.folder / (FINAL if last else f"model_{iteration:07d}.pth")
            write_checkpoint(path, content, iteration=iteration, newest=True)
            prune(self.folder, self.keep)
            logger.info("saved %s", path)
        if best:
            write_checkpoint(self.folder / BEST, content, iteration=iteration)
