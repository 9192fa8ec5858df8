"""Learning-rate schedules: pure functions of progress, by the names of detectron2's ``SOLVER.LR_SCHEDULER_NAME``.

fvcore's schedulers do the work where it has them; a schedule gives the factor on the base rate for ``where``, the share
of the run that is done (0 at the first iteration, 1 behind the last).
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau

from imgcls.config import register_check
from imgcls.structures import Problem

PLATEAU = "PlateauLR"
ONE_CYCLE = "OneCycleLR"
CONSTANT = LinearParamScheduler(1.0, 1.0)  # fvcore's own constant refuses the end of the run


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """``SOLVER.LR_SCHEDULER_NAME``, stepped per iteration, over every parameter group of ``optimizer``."""
    multiplier = schedule_of(cfg)
    if cfg.SOLVER.LR_SCHEDULER_NAME == PLATEAU:
        return PlateauMultiplier(optimizer, multiplier, cfg)
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.SOLVER.MAX_ITER)


def schedule_of(cfg: CfgNode) -> ParamScheduler:
    """The factor on ``SOLVER.BASE_LR`` as a function of progress, warm-up included, of a config in iterations.

    As in detectron2 the warm-up covers the beginning of the schedule, which goes on as if there had been none; with
    ``SOLVER.RESCALE_INTERVAL True`` the schedule begins after it. :data:`ONE_CYCLE` warms up by itself.
    """
    node = cfg.SOLVER
    scheduler = SCHEDULES[node.LR_SCHEDULER_NAME](node)
    warmup = min(node.WARMUP_ITERS / node.MAX_ITER, 1.0)
    if node.LR_SCHEDULER_NAME != ONE_CYCLE:
        scheduler = WarmupParamScheduler(
            scheduler, node.WARMUP_FACTOR, warmup, node.WARMUP_METHOD, node.RESCALE_INTERVAL
        )
    if node.SWA.ENABLED and node.SWA.LR and node.BASE_LR:
        scheduler = GoesOver(scheduler, node.SWA.START, node.SWA.LR / node.BASE_LR, node.SWA.ANNEAL)
    return scheduler


class StepDecay(ParamScheduler):
    """``gamma`` to the number of decay periods done: whole ones (steps), or with fractions (exponential)."""

    def __init__(self, gamma: float, periods: float, *, staircase: bool) -> None:
        self.gamma, self.periods, self.staircase = gamma, periods, staircase

    def __call__(self, where: float) -> float:
        # The share of a run that ends a period is no binary fraction: a hair before it the period counts as done.
        done = where * self.periods
        return self.gamma ** (int(done + self.WHERE_EPSILON) if self.staircase else done)


class PolynomialDecay(ParamScheduler):
    """From 1 to ``end`` as ``(1 - where) ** power``; power 1 is linear."""

    def __init__(self, power: float, end: float) -> None:
        self.power, self.end = power, end

    def __call__(self, where: float) -> float:
        return self.end + (1.0 - self.end) * (1.0 - min(where, 1.0)) ** self.power


class CosineRestarts(ParamScheduler):
    """Cosine with warm restarts (Loshchilov & Hutter 2017, SGDR): each cycle ``growth`` times as long as the last."""

    def __init__(self, cycles: int, growth: float, end: float) -> None:
        lengths = [growth**cycle for cycle in range(cycles)]
        self.lengths, self.end = [length / sum(lengths) for length in lengths], end

    def __call__(self, where: float) -> float:
        start = 0.0
        for length in self.lengths[:-1]:
            if where + self.WHERE_EPSILON < start + length:
                break
            start += length
        else:
            length = self.lengths[-1]
        inside = min(max((where - start) / length, 0.0), 1.0)
        return self.end + (1.0 - self.end) * (1.0 + cos(pi * inside)) / 2


class GoesOver(ParamScheduler):
    """Another schedule up to ``start``, then from what it gives there to ``end`` within ``over``, as a cosine.

    All shares of the run. What torch's ``SWALR`` does by epochs.
    """

    def __init__(self, before: ParamScheduler, start: float, end: float, over: float) -> None:
        self.before, self.start, self.end, self.over = before, start, end, over

    def __call__(self, where: float) -> float:
        if where + self.WHERE_EPSILON < self.start:
            return self.before(where)
        done = min((where - self.start) / self.over, 1.0) if self.over else 1.0
        share = (1.0 - cos(pi * max(done, 0.0))) / 2
        return self.end * share + self.before(self.start) * (1.0 - share)


def _end(node: CfgNode) -> float:
    # With a base rate of 0 any factor does.
    return float(node.BASE_LR_END / node.BASE_LR) if node.BASE_LR else 0.0


def _multi_step(node: CfgNode) -> ParamScheduler:
    values = [node.GAMMA**k for k in range(len(node.STEPS) + 1)]
    return MultiStepParamScheduler(values, milestones=list(node.STEPS), num_updates=node.MAX_ITER)


def _decay(node: CfgNode, *, staircase: bool) -> ParamScheduler:
    return StepDecay(node.GAMMA, node.MAX_ITER / node.DECAY_ITERS, staircase=staircase)


def _one_cycle(node: CfgNode) -> ParamScheduler:
    """Smith & Topin 2018, as torch's OneCycleLR: up to the base rate and down to almost nothing, both as cosines."""
    up = min(max(node.WARMUP_ITERS / node.MAX_ITER, 1e-9), 1.0 - 1e-9)
    phases = [CosineParamScheduler(node.WARMUP_FACTOR, 1.0), CosineParamScheduler(1.0, _end(node))]
    return CompositeParamScheduler(phases, [up, 1.0 - up], ["rescaled", "rescaled"])


# name -> function(cfg.SOLVER, lengths in iterations) that gives the factor without the warm-up.
SCHEDULES: dict[str, Callable[[CfgNode], ParamScheduler]] = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineLR": lambda node: CosineParamScheduler(1.0, _end(node)),
    # fvcore's own fails behind the last iteration, where a scheduler looks too.
    "WarmupStepWithFixedGammaLR": lambda node: StepDecay(node.GAMMA, node.NUM_DECAYS + 1, staircase=True),
    "WarmupStepLR": lambda node: _decay(node, staircase=True),
    "WarmupExponentialLR": lambda node: _decay(node, staircase=False),
    "WarmupPolynomialLR": lambda node: PolynomialDecay(node.POLYNOMIAL_POWER, _end(node)),
    "WarmupLinearLR": lambda node: LinearParamScheduler(1.0, _end(node)),
    "WarmupCosineRestartsLR": lambda node: CosineRestarts(node.RESTART_CYCLES, node.RESTART_GROWTH, _end(node)),
    "WarmupConstantLR": lambda node: CONSTANT,
    ONE_CYCLE: _one_cycle,
    PLATEAU: lambda node: CONSTANT,
}


class PlateauMultiplier(LRMultiplier):
    """Constant after the warm-up, times ``GAMMA`` whenever the metric has not improved for some evaluations.

    torch's ``ReduceLROnPlateau`` decides; its rate of 1 is the factor. What it remembers travels in the checkpoint.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, cfg: CfgNode) -> None:
        node = cfg.SOLVER
        factor = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        least = _end(node)
        self._watch = ReduceLROnPlateau(
            factor, "max", factor=node.GAMMA, patience=node.PLATEAU_PATIENCE, threshold=0.0, min_lr=least, eps=0.0
        )
        super().__init__(optimizer, multiplier, cfg.SOLVER.MAX_ITER)

    @property
    def factor(self) -> float:
        """What the plateaus so far have left of the rate."""
        return float(self._watch.optimizer.param_groups[0]["lr"])

    def evaluated(self, value: float) -> None:
        """Take the metric of an evaluation; larger is better."""
        self._watch.step(value)

    def get_lr(self) -> list[float]:
        return [rate * self.factor for rate in super().get_lr()]

    def state_dict(self) -> dict[str, Any]:
        remembered = {"best": self._watch.best, "bad": self._watch.num_bad_epochs, "factor": self.factor}
        return {**super().state_dict(), "plateau": {key: float(value) for key, value in remembered.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        remembered = state.pop("plateau", None)
        super().load_state_dict(state)
        if remembered is None:  # the run began with another schedule
            return
        self._watch.best, self._watch.num_bad_epochs = remembered["best"], int(remembered["bad"])
        self._watch.optimizer.param_groups[0]["lr"] = remembered["factor"]


def apply_current(schedule: LRMultiplier) -> None:
    """Set every group's LR to what the schedule says for its position; after a resume the old file's would linger."""
    for group, lr in zip(schedule.optimizer.param_groups, schedule.get_lr(), strict=True):
        group["lr"] = lr


@register_check
def check_schedule(cfg: CfgNode) -> list[Problem]:
    """An end above the base rate, which no schedule here climbs to; and what ``PlateauLR`` needs to ever lower it."""
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet":
        return []
    node, problems = cfg.SOLVER, []
    if node.BASE_LR and node.BASE_LR_END > node.BASE_LR:
        what, allowed = "the schedule ends above its base rate", f"at most SOLVER.BASE_LR {node.BASE_LR:g}"
        problems.append(Problem(what, node.BASE_LR_END, allowed, "SOLVER.BASE_LR_END"))
    if node.LR_SCHEDULER_NAME == PLATEAU:
        if node.GAMMA >= 1:
            what = "a plateau would not lower the rate"
            problems.append(Problem(what, node.GAMMA, f"a number > 0 and < 1 with {PLATEAU}", "SOLVER.GAMMA"))
        if not (cfg.DATASETS.TEST and (cfg.TEST.EVAL_PERIOD or cfg.TEST.EVAL_EPOCHS)):
            what, allowed = "the schedule has no evaluations to look at", "DATASETS.TEST with TEST.EVAL_EPOCHS above 0"
            problems.append(Problem(what, PLATEAU, f"another one, or {allowed}", "SOLVER.LR_SCHEDULER_NAME"))
    return problems
