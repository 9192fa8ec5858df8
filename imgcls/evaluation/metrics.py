"""Figures of a classifier: pure functions of scores or predictions (N, K) and targets (N, K), or of indices (N,).

Shares are in 0..1 and float64. A class that no picture of the set has cannot be recalled: its figures that need one
are NaN, and the means over the classes leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Of one class: sum over the distinct scores, falling, of precision times the gain in recall.

    scores: (N,) float. targets: (N,) bool. Pictures with equal scores come in together, whatever their order in the
    set. This is scikit-learn's definition, without interpolation. NaN without a positive.
    """
    positives = int(targets.sum())
    if positives == 0:
        return float("nan")
    true, taken, _ = _cuts(scores, targets)
    gain = torch.diff(true, prepend=true.new_zeros(1))
    return float((true / taken * gain).sum() / positives)


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """(N, K), (N, K) bool -> :func:`average_precision` of each class, (K,)."""
    columns = zip(scores.unbind(1), targets.unbind(1), strict=True)
    return torch.tensor([average_precision(score, target) for score, target in columns], dtype=torch.float64)


def best_threshold(scores: Tensor, targets: Tensor) -> tuple[float, float] | None:
    """The threshold of one class with the highest F1 on these pictures, and that F1; None without a positive.

    Every cut between two neighbouring distinct scores is tried, so no grid misses one. The threshold lies half-way
    between the two (below the lowest score: half-way to 0). Of equally good cuts the highest is taken.
    """
    positives = int(targets.sum())
    if positives == 0:
        return None
    true, taken, cut_scores = _cuts(scores, targets)
    f1 = 2 * true / (taken + positives)
    best = int(f1.argmax())
    below = cut_scores[best + 1] if best + 1 < len(cut_scores) else cut_scores.new_zeros(())
    return float((cut_scores[best] + below) / 2), float(f1[best])


def _cuts(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each distinct score, falling: positives at or above it, pictures at or above it, and the score."""
    scores, order = scores.double().sort(descending=True, stable=True)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    true = targets[order].double().cumsum(0)[last]
    taken = (torch.arange(len(scores)) + 1).double()[last]
    return true, taken, scores[last]


@dataclass(frozen=True)
class Counts:
    """Of each class, (K,) float64: how often it was predicted and there, predicted only, there only."""

    both: Tensor
    predicted_only: Tensor
    there_only: Tensor

    @classmethod
    def of(cls, predicted: Tensor, targets: Tensor) -> Counts:
        """predicted, targets: (N, K) bool."""
        both, either = predicted & targets, (predicted, targets)
        return cls(both.sum(0).double(), *((one & ~both).sum(0).double() for one in either))

    def total(self) -> Counts:
        """All classes taken together, (1,): what the micro figures are made of."""
        return Counts(*(value.sum(0, keepdim=True) for value in (self.both, self.predicted_only, self.there_only)))

    @property
    def present(self) -> Tensor:
        """(K,) bool: whether any picture has the class."""
        return self.both + self.there_only > 0

    @property
    def precision(self) -> Tensor:
        """Share of the predictions that are right; 0 where nothing is predicted."""
        return self.both / (self.both + self.predicted_only).clamp(min=1)

    @property
    def recall(self) -> Tensor:
        """Share of what is there that is predicted; NaN where nothing is there."""
        return self.both / (self.both + self.there_only)

    @property
    def f1(self) -> Tensor:
        """Harmonic mean of both; NaN where nothing is there."""
        f1 = 2 * self.both / (2 * self.both + self.predicted_only + self.there_only)
        return f1.where(self.present, torch.nan)


def subset_accuracy(predicted: Tensor, targets: Tensor) -> float:
    """Share of the pictures whose labels are predicted exactly, none too many and none too few; (N, K) bool."""
    return float((predicted == targets).all(dim=1).double().mean())


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(N,), (N,) int64 -> (K, K) int64: in row ``i`` and column ``j`` the pictures of class i taken for class j."""
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def mean_over_present(values: Tensor) -> float:
    """The mean of what is not NaN; NaN when there is nothing else."""
    return float(values.nanmean())
