"""Learning-rate schedules: detectron2's, which are pure functions of progress."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, build_lr_scheduler


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """``SOLVER.LR_SCHEDULER_NAME``, stepped per iteration: WarmupCosineLR, WarmupMultiStepLR or
    WarmupStepWithFixedGammaLR.
    """
    if cfg.SOLVER.BASE_LR == 0:
        # detectron2 divides by the base rate to get its factors; with a rate of 0 any factors do.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.BASE_LR = 1.0
    return build_lr_scheduler(cfg, optimizer)


def apply_current(schedule: LRMultiplier) -> None:
    """Set every group's LR to what the schedule says for its position; after a resume the old file's would linger."""
    for group, lr in zip(schedule.optimizer.param_groups, schedule.get_lr(), strict=True):
        group["lr"] = lr
