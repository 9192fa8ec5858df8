"""Evaluators that count every image once, at any number of ranks: for one class a picture, and for several."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.evaluation.metrics import (
    Counts,
    average_precisions,
    confusion_matrix,
    mean_over_present,
    subset_accuracy,
)
from imgcls.structures import Batch

# A matrix of more classes is no longer looked at, and takes more memory than the images did.
MOST_CONFUSED_CLASSES = 2000


class LogitsEvaluator(DatasetEvaluator):
    """Keeps logits and targets of each image on its rank, joins the ranks' once, and counts there.

    expected: how many images there are; another count is a ``RuntimeError``, for the figure would be of another set.
    missing: how many of this rank's images could not be read; :func:`evaluate` sets it. They are told apart from lost
        ones, and the figures are of the others.
    per_class: after :meth:`evaluate`, columns of a table with a row for each class, by name: (K,) tensors.
    """

    def __init__(self, expected: int, num_classes: int) -> None:
        self.expected, self.num_classes = expected, num_classes
        self.reset()

    def reset(self) -> None:
        self.missing = 0
        self.per_class: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, ...]] = []

    def process(self, inputs: Batch | list[dict[str, Any]], outputs: Tensor | list[dict[str, Any]]) -> None:
        """Take one batch: inputs with labels, outputs as ClsNet gives them for that form of input."""
        logits = outputs if isinstance(outputs, Tensor) else torch.stack([row["logits"] for row in outputs])
        # In float32 on the CPU, where every precision that follows exists.
        self._kept.append(self.keep(logits.detach().float().cpu(), _targets(inputs).cpu()))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """``{"classification": figures}``, on every rank: shares in %, and with images missing their number."""
        columns = [torch.cat(column) for column in zip(*self._kept, strict=True)]
        shares = comm.all_gather((columns, self.missing))
        missing = sum(share[1] for share in shares)
        filled = [share[0] for share in shares if share[0]]
        whole = [torch.cat(parts) for parts in zip(*filled, strict=True)]
        seen = len(whole[0]) if whole else 0
        if seen + missing != self.expected:
            raise RuntimeError(f"evaluated {seen} images of {self.expected}; the loaders lost or doubled some")
        if not seen:
            raise ValueError(f"none of the {missing} images of DATASETS.TEST could be read; change DATASETS.TEST")
        figures = self.figures(*whole)
        return OrderedDict(classification={**figures, "missing": float(missing)} if missing else figures)

    def keep(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What is kept of a batch: tensors of its length."""
        raise NotImplementedError

    def figures(self, *kept: Tensor) -> dict[str, float]:
        """The figures, from what was kept of all images of all ranks; fills :attr:`per_class`."""
        raise NotImplementedError


class ClassificationEvaluator(LogitsEvaluator):
    """One class a picture: top-1, top-5, balanced accuracy (the mean over classes of top-1) and cross-entropy.

    confusion: after :meth:`evaluate`, (K, K) int64, a row for each true class; None with too many classes.
    """

    def reset(self) -> None:
        super().reset()
        self.confusion: Tensor | None = None

    def keep(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        loss = F.cross_entropy(logits.double(), labels, reduction="none")
        return labels, best[:, 0], (best == labels[:, None]).any(dim=1), loss

    def figures(self, *kept: Tensor) -> dict[str, float]:
        labels, predicted, in_top5, loss = kept
        right = predicted == labels
        images = labels.bincount(minlength=self.num_classes)
        accuracy = 100 * labels[right].bincount(minlength=self.num_classes) / images.double()
        self.per_class = {"images": images, "top1": accuracy}
        if self.num_classes <= MOST_CONFUSED_CLASSES:
            self.confusion = confusion_matrix(predicted, labels, self.num_classes)
        return {
            "top1": 100 * _mean(right),
            "top5": 100 * _mean(in_top5),
            "balanced_accuracy": mean_over_present(accuracy),
            "loss": _mean(loss),
        }


class MultiLabelEvaluator(LogitsEvaluator):
    """Any number of classes a picture: mAP, precision, recall and F1 (micro and macro), subset accuracy, BCE.

    thresholds: from which score on a class is predicted, one for each class or one for all; mAP needs none.
    """

    def __init__(self, expected: int, num_classes: int, thresholds: Sequence[float]) -> None:
        super().__init__(expected, num_classes)
        self.thresholds = torch.tensor(thresholds, dtype=torch.float64).expand(num_classes)

    def keep(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        if targets.shape != logits.shape:
            raise ValueError(
                f"labels of the shape {tuple(targets.shape)} for logits {tuple(logits.shape)}; evaluation with several "
                "labels a picture needs one 0 or 1 for each class"
            )
        return logits, targets > 0.5

    def figures(self, *kept: Tensor) -> dict[str, float]:
        logits, targets = kept
        scores = logits.double().sigmoid()
        predicted = scores >= self.thresholds
        counts = Counts.of(predicted, targets)
        micro = counts.total()
        absent = ~counts.present
        precisions = average_precisions(scores, targets)
        self.per_class = {
            "images": targets.sum(0),
            "AP": 100 * precisions,
            **{name: 100 * getattr(counts, name) for name in ("precision", "recall", "f1")},
            "threshold": self.thresholds,
        }
        return {
            "mAP": 100 * mean_over_present(precisions),
            **{f"micro_{name}": 100 * float(getattr(micro, name)) for name in ("precision", "recall", "f1")},
            **{
                f"macro_{name}": 100 * mean_over_present(getattr(counts, name).where(~absent, torch.nan))
                for name in ("precision", "recall", "f1")
            },
            "subset_accuracy": 100 * subset_accuracy(predicted, targets),
            "absent_classes": float(absent.sum()),
            "loss": float(F.binary_cross_entropy_with_logits(logits.double(), targets.double())),
        }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _targets(inputs: Batch | list[dict[str, Any]]) -> Tensor:
    if isinstance(inputs, Batch):
        targets = inputs.targets
    else:
        targets = torch.stack([torch.as_tensor(sample["label"]) for sample in inputs])
    if targets is None:
        raise ValueError("evaluation needs labels")
    return targets


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    evaluator: DatasetEvaluator,
    leave: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run ``model`` in eval mode over ``loader``; the mode it was in comes back. Collective.

    leave: asked after each batch; where it says yes the rest is left out, and on any rank it makes the result empty.

    detectron2's ``inference_on_dataset`` does the same with a progress log; this one does not need ``len(loader)`` and
    leaves the result on every rank, so that all of them agree on the best checkpoint.
    """
    was_training = model.training
    model.eval()
    try:
        evaluator.reset()
        left = False
        for batch in loader:
            evaluator.process(batch, model(batch))
            left = leave is not None and bool(leave())
            if left:
                break
        if leave is not None and any(comm.all_gather(left)):
            return {}
        # Images that a loader passed over because they cannot be read are not lost ones.
        evaluator.missing = getattr(loader, "left_out", 0)
        return evaluator.evaluate()
    finally:
        model.train(was_training)
