"""The only place that turns epochs into iterations.

Epochs are counted in images: iteration i covers the images [i x batch, (i + 1) x batch) of an endless stream,
batches cross the ends of epochs, and nothing is dropped or filled up. Every length is rounded up to whole
iterations: a run of E epochs shows every image at least floor(E) times, what happens "after E epochs" never
comes early, and no period becomes 0.
"""

import logging
from fractions import Fraction
from math import ceil, isfinite

from detectron2.config import CfgNode

from imgcls.structures.problem import Problem

logger = logging.getLogger(__name__)

_MULTISTEP = "WarmupMultiStepLR"

# (group, key in iterations, key in epochs) of the single numbers; STEPS is a list and stands apart.
_LENGTHS = (
    ("SOLVER", "MAX_ITER", "MAX_EPOCHS"),
    ("SOLVER", "WARMUP_ITERS", "WARMUP_EPOCHS"),
    ("SOLVER", "CHECKPOINT_PERIOD", "CHECKPOINT_EPOCHS"),
    ("SOLVER", "CHECKPOINT_KEEP_EVERY", "CHECKPOINT_KEEP_EVERY_EPOCHS"),
    ("SOLVER", "DECAY_ITERS", "DECAY_EPOCHS"),
    ("SOLVER.SWA", "PERIOD", "PERIOD_EPOCHS"),
    ("TEST", "EVAL_PERIOD", "EVAL_EPOCHS"),
)


def iterations_for(epochs: float, num_images: int, batch: int, *, key: str = "the length in epochs") -> int:
    """The iterations that ``epochs`` epochs of ``num_images`` images take at ``batch`` images, rounded up.

    ``epochs`` counts as the decimal it is written as: 0.1 epochs of 30 images at batch 3 are 1 iteration,
    although the binary number behind 0.1 is a little larger than a tenth. key: whom to blame in an error.
    """
    is_length = isinstance(epochs, int | float) and isfinite(epochs) and epochs >= 0
    _require(is_length, "a length in epochs is out of range", epochs, "a finite number >= 0", key)
    _require(num_images >= 1, "there are no images to train on", num_images, "1 or more", "DATASETS.TRAIN")
    _require(batch >= 1, "the batch is empty", batch, "1 or more", "SOLVER.IMS_PER_BATCH")
    return ceil(Fraction(str(float(epochs))) * num_images / batch)


def resolve_durations(cfg: CfgNode, num_images: int) -> None:
    """Write every length of the schedule in iterations, in place; a second call changes nothing.

    A key in epochs that is 0 (or empty), or that is of something not enabled, leaves its key in iterations alone. A
    warm-up that does not fit is cut and steps after the end are dropped, and the log says so: ``SOLVER.MAX_EPOCHS 1``
    is how people look at a long recipe.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    for group, in_iterations, in_epochs in _LENGTHS:
        node = node_at(cfg, group)
        epochs = node.get(in_epochs, 0)
        if epochs and node.get("ENABLED", True):
            node[in_iterations] = iterations_for(epochs, num_images, batch, key=f"{group}.{in_epochs}")
    steps = cfg.SOLVER.get("STEPS_EPOCHS", ())
    if steps:
        key = "SOLVER.STEPS_EPOCHS"
        cfg.SOLVER.STEPS = tuple(iterations_for(step, num_images, batch, key=key) for step in steps)
    _fit_warmup(cfg)
    if cfg.SOLVER.LR_SCHEDULER_NAME == _MULTISTEP:
        _fit_steps(cfg)


def node_at(cfg: CfgNode, group: str) -> CfgNode:
    """The node of a dotted name; an empty one where the config lacks it, as a stock one lacks ours."""
    for part in group.split("."):
        cfg = cfg.get(part, CfgNode())
    return cfg


def _fit_warmup(cfg: CfgNode) -> None:
    warmup, total = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if warmup < total:
        return
    cfg.SOLVER.WARMUP_ITERS = max(total - 1, 0)
    logger.warning("warm-up cut from %d to %d iterations: the run has %d", warmup, cfg.SOLVER.WARMUP_ITERS, total)


def _fit_steps(cfg: CfgNode) -> None:
    total = cfg.SOLVER.MAX_ITER
    late = [step for step in cfg.SOLVER.STEPS if step > total]
    if not late:
        return
    cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step <= total)
    logger.warning("steps %s dropped: the run has %d iterations", late, total)


def _require(holds: bool, what: str, value: object, allowed: str, key: str) -> None:
    if not holds:
        raise Problem(what, value, allowed, key).error()
