"""What the machine has for training: shared memory, open files, room on the disk."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from detectron2.config import CfgNode

from imgcls.data.inspection.findings import NOTE, SERIOUS, WARNING, Finding
from imgcls.data.workers import SHARED_MEMORY

PREFETCHED = 2  # batches that a worker of torch's DataLoader prepares ahead
FILES = 1024  # open files that workers, logs and checkpoints surely find enough


def machine_findings(cfg: CfgNode, parameters: int = 0) -> list[Finding]:
    """parameters: of the network, as far as it is known; its checkpoints must fit on the disk."""
    return [*_shared_memory(cfg), *_open_files(), *_disk(cfg, parameters)]


def _shared_memory(cfg: CfgNode) -> list[Finding]:
    if not os.path.isdir(SHARED_MEMORY) or not cfg.DATALOADER.NUM_WORKERS:
        return []
    pixels = len(cfg.MODEL.PIXEL_MEAN) * cfg.INPUT.TRAIN_SIZE**2
    needed = cfg.DATALOADER.NUM_WORKERS * (PREFETCHED + 1) * cfg.SOLVER.IMS_PER_BATCH * pixels
    free = shutil.disk_usage(SHARED_MEMORY).free
    short = free < needed
    what = f"MiB free in {SHARED_MEMORY}; {_mib(needed)} are needed by {cfg.DATALOADER.NUM_WORKERS} workers"
    remedy = "enlarge it (docker run --shm-size), or lower DATALOADER.NUM_WORKERS" if short else "nothing"
    return [Finding(SERIOUS if short else NOTE, "shared_memory", "machine", _mib(free), what, (), remedy)]


def _open_files() -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return []
    what = "files may be open at a time: many workers need more"
    return [Finding(WARNING, "open_files", "machine", soft, what, (), f"ulimit -n {FILES * 4}")]


def _disk(cfg: CfgNode, parameters: int) -> list[Finding]:
    folder = Path(cfg.OUTPUT_DIR).absolute()
    while not folder.exists():
        folder = folder.parent
    # Weights, gradients' averages of one or two kinds, in 4 bytes each; best, final and one being written beside.
    slots = 3 if cfg.SOLVER.OPTIMIZER == "AdamW" else 2
    needed = (cfg.SOLVER.CHECKPOINT_KEEP + 3) * parameters * 4 * slots
    free = shutil.disk_usage(folder).free
    short = free < needed
    told = f"; the checkpoints of OUTPUT_DIR need {_mib(needed)}" if parameters else ""
    remedy = "make room, or change OUTPUT_DIR or SOLVER.CHECKPOINT_KEEP" if short else "nothing"
    what = f"MiB free on the disk of {folder}{told}"
    return [Finding(SERIOUS if short else NOTE, "disk", "machine", _mib(free), what, (), remedy)]


def _mib(count: int) -> int:
    return round(count / 2**20)
