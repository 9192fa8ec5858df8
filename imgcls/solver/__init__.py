"""Optimizers, schedules and gradient clipping."""

from imgcls.solver.optimizers import build_optimizer, clip_gradients
from imgcls.solver.schedules import build_schedule

__all__ = ["build_optimizer", "build_schedule", "clip_gradients"]
