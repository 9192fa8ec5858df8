"""Optimizers, schedules, gradient clipping and averages of the weights."""

from imgcls.solver.averages import Average, Ema, Swa, build_average
from imgcls.solver.clipping import clip_gradients
from imgcls.solver.groups import parameter_groups
from imgcls.solver.optimizers import build_optimizer, scale_learning_rate
from imgcls.solver.schedules import build_schedule

__all__ = [
    "Average",
    "Ema",
    "Swa",
    "build_average",
    "build_optimizer",
    "build_schedule",
    "clip_gradients",
    "parameter_groups",
    "scale_learning_rate",
]
