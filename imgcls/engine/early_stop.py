"""Ending a run whose figure does not get better any more."""

from __future__ import annotations

from math import isnan
from typing import Any

from detectron2.config import CfgNode

from imgcls.config import register_check
from imgcls.modeling import is_classifier
from imgcls.structures import Problem

# Of TEST.METRIC: the smaller the better.
COSTS = ("loss",)


class EarlyStop:
    """Patience (Goodfellow, Bengio & Courville 2016, algorithm 7.1).

    metric: name of the figure. smaller: whether a smaller one is better.
    patience: evaluations in a row without a better figure, after which the run ends; 0: it never does.
    min_delta: a figure is better when it beats the best one by more than this, in the figure's own unit.
    """

    def __init__(self, metric: str, *, smaller: bool, patience: int, min_delta: float = 0.0) -> None:
        self.metric, self.smaller, self.patience, self.min_delta = metric, smaller, patience, min_delta
        self.waited = 0
        self.best: float | None = None
        self.best_iteration = -1

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> EarlyStop:
        """What ``SOLVER.EARLY_STOP`` says of ``TEST.METRIC``."""
        metric, node = cfg.TEST.METRIC, cfg.SOLVER.EARLY_STOP
        return cls(metric, smaller=metric in COSTS, patience=node.PATIENCE, min_delta=node.MIN_DELTA)

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return 0 < self.patience <= self.waited

    def evaluated(self, value: float, iteration: int) -> None:
        """Take the figure of the evaluation after ``iteration``; what is no number is not better."""
        if not isnan(value) and (self.best is None or self._gain(value, self.best) > self.min_delta):
            self.best, self.best_iteration, self.waited = value, iteration, 0
        else:
            self.waited += 1

    def _gain(self, value: float, best: float) -> float:
        return best - value if self.smaller else value - best

    def told(self) -> str:
        """Why the run ends."""
        best = "no number" if self.best is None else f"{self.best:.4f} of iteration {self.best_iteration}"
        margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"early stopping: {self.waited} evaluations in a row did not beat {self.metric} {best}{margin}"

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {"metric": self.metric, "best": self.best, "iteration": self.best_iteration, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; with another metric it begins anew."""
        if state.get("metric") == self.metric:
            self.best, self.best_iteration, self.waited = state["best"], state["iteration"], state["waited"]


@register_check
def check_early_stop(cfg: CfgNode) -> list[Problem]:
    """Patience is counted in evaluations, so there must be some before the end."""
    if not is_classifier(cfg) or not cfg.SOLVER.EARLY_STOP.PATIENCE:
        return []
    if cfg.DATASETS.TEST and (cfg.TEST.EVAL_PERIOD or cfg.TEST.EVAL_EPOCHS):
        return []
    what, allowed = "early stopping has no evaluations to look at", "0, or DATASETS.TEST with TEST.EVAL_EPOCHS above 0"
    return [Problem(what, cfg.SOLVER.EARLY_STOP.PATIENCE, allowed, "SOLVER.EARLY_STOP.PATIENCE")]
