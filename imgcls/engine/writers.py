"""What a run prints and writes: detectron2's writers, with a line of progress made for classification."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

logger = logging.getLogger(__name__)


class ProgressLine(EventWriter):
    """``iter 120/1250 epoch 1.92 loss 0.531 lr 0.0498 812 images/s data 3 % eta 0:01:23 memory 512 MB``."""

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
            seconds = storage.history("time").median(20)
            eta = timedelta(seconds=int(seconds * (self.max_iter - done)))
            parts.append(f"{self.global_batch / seconds:.0f} images/s")
            parts.append(f"data {100 * latest.get('data_time', 0.0) / latest['time']:.0f} %")
            parts.append(f"eta {eta}")
        if torch.cuda.is_available():
            parts.append(f"memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
        logger.info("  ".join(parts))

    def close(self) -> None:
        pass


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


def build_writers(cfg: CfgNode, num_images: int) -> list[EventWriter]:
    """Progress on the console, ``metrics.json`` (a JSON object a line) and TensorBoard in OUTPUT_DIR."""
    folder = Path(cfg.OUTPUT_DIR)
    return [
        ProgressLine(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, num_images),
        JSONWriter(str(folder / "metrics.json")),
        TensorboardXWriter(str(folder)),
    ]
