"""Optimizers, schedules, gradient clipping and the average of the weights."""

from imgcls.solver.clipping import clip_gradients
from imgcls.solver.ema import Ema
from imgcls.solver.optimizers import build_optimizer, scale_learning_rate
from imgcls.solver.schedules import build_schedule

__all__ = ["Ema", "build_optimizer", "build_schedule", "clip_gradients", "scale_learning_rate"]
