"""Thresholds of a network for several labels a picture: from which score on each class is predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from imgcls.evaluation.evaluator import MultiLabelEvaluator
from imgcls.evaluation.metrics import best_threshold

UNTUNED = 0.5


class ThresholdTuner(MultiLabelEvaluator):
    """Sees what the evaluator sees, and finds for each class the threshold with the highest F1 on these images.

    thresholds: after :meth:`evaluate`, one for each class; :data:`UNTUNED` for a class that no image has.
    The figures are then those with these thresholds, on the images that they were chosen on.
    """

    def __init__(self, expected: int, num_classes: int) -> None:
        super().__init__(expected, num_classes, [UNTUNED])

    def figures(self, *kept: Tensor) -> dict[str, float]:
        logits, targets = kept
        self.thresholds = tune(logits.double().sigmoid(), targets)
        return super().figures(*kept)


def tune(scores: Tensor, targets: Tensor) -> Tensor:
    """(N, K) scores in 0..1 and (N, K) bool -> (K,) thresholds; each class by itself."""
    found = [best_threshold(score, target) for score, target in zip(scores.unbind(1), targets.unbind(1), strict=True)]
    return torch.tensor([UNTUNED if best is None else best[0] for best in found], dtype=torch.float64)
