"""Top-1, top-5 and validation loss that count every image once, at any number of ranks."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.structures import Batch

logger = logging.getLogger(__name__)


class ClassificationEvaluator(DatasetEvaluator):
    """Counts on each rank as integers, adds the ranks' counts, divides once.

    expected: how many images there are; another count is a ``RuntimeError``, for the figure would be of another set.
    """

    def __init__(self, expected: int, num_classes: int) -> None:
        self.expected, self.num_classes = expected, num_classes
        self.reset()

    def reset(self) -> None:
        self._seen = self._top1 = self._top5 = 0
        self._loss = 0.0

    def process(self, inputs: Batch | list[dict[str, Any]], outputs: Tensor | list[dict[str, Any]]) -> None:
        """Take one batch: inputs with labels, outputs as ClsNet gives them for that form of input."""
        logits = outputs if isinstance(outputs, Tensor) else torch.stack([row["logits"] for row in outputs])
        labels = _labels(inputs).to(logits.device)
        logits = logits.float()
        k = min(5, logits.shape[1])
        best = logits.topk(k, dim=1).indices
        hits = best == labels[:, None]
        self._seen += len(labels)
        self._top1 += int(hits[:, 0].sum())
        self._top5 += int(hits.sum())
        self._loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """``{"classification": {"top1": %, "top5": %, "loss": mean}}``, on every rank."""
        shares = comm.all_gather((self._seen, self._top1, self._top5, self._loss))
        seen, top1, top5 = (sum(share[i] for share in shares) for i in range(3))
        loss = sum(share[3] for share in shares)
        if seen != self.expected:
            raise RuntimeError(f"evaluated {seen} images of {self.expected}; the loaders lost or doubled some")
        return OrderedDict(
            classification={"top1": 100.0 * top1 / seen, "top5": 100.0 * top5 / seen, "loss": loss / seen}
        )


def _labels(inputs: Batch | list[dict[str, Any]]) -> Tensor:
    if isinstance(inputs, Batch):
        targets = inputs.targets
    else:
        targets = torch.stack([torch.as_tensor(sample["label"]) for sample in inputs])
    if targets is None:
        raise ValueError("evaluation needs labels")
    return targets if targets.dim() == 1 else targets.argmax(dim=1)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], evaluator: DatasetEvaluator) -> dict[str, Any]:
    """Run ``model`` in eval mode over ``loader``; the mode it was in comes back. Collective.

    detectron2's ``inference_on_dataset`` does the same with a progress log; this one does not need ``len(loader)`` and
    leaves the result on every rank, so that all of them agree on the best checkpoint.
    """
    was_training = model.training
    model.eval()
    try:
        evaluator.reset()
        for batch in loader:
            evaluator.process(batch, model(batch))
        return evaluator.evaluate()
    finally:
        model.train(was_training)
