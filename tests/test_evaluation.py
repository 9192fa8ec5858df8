"""Figures against a count by hand, for every way to share the images."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.utils import comm

from imgcls.evaluation import ClassificationEvaluator, evaluate
from imgcls.structures import Batch


def slow_figures(logits, labels):
    """One image after another, in Python floats."""
    top1 = top5 = loss = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda k: -row[k])
        top1 += order[0] == label
        top5 += label in order[:5]
        loss -= row[label] - math.log(sum(math.exp(v) for v in row))
    n = len(labels)
    by_class: dict[int, list[bool]] = {}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        by_class.setdefault(label, []).append(max(range(len(row)), key=row.__getitem__) == label)
    balanced = sum(sum(right) / len(right) for right in by_class.values()) / len(by_class)
    figures = {"top1": top1 / n, "top5": top5 / n, "balanced_accuracy": balanced}
    return {**{name: 100 * share for name, share in figures.items()}, "loss": loss / n}


@pytest.mark.parametrize("count", [1, 2, 3, 10, 21, 97])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_count_by_hand(count, world, monkeypatch):
    torch.manual_seed(count)
    logits, labels = torch.randn(count, 8), torch.randint(0, 8, (count,))
    shares = []
    for rank in range(world):
        mine = slice(count * rank // world, count * (rank + 1) // world)
        evaluator = ClassificationEvaluator(count, 8)
        for first in range(mine.start, mine.stop, 4):
            part = slice(first, min(first + 4, mine.stop))
            evaluator.process(Batch(torch.zeros(part.stop - part.start, 3, 1, 1), labels[part]), logits[part])
        monkeypatch.setattr(comm, "all_gather", lambda counts: shares.append(counts) or [counts])
        if world > 1:
            with pytest.raises(RuntimeError) if mine.stop - mine.start < count else monkeypatch.context():
                evaluator.evaluate()
        else:
            evaluator.evaluate()
    monkeypatch.setattr(comm, "all_gather", lambda counts: shares)
    found = evaluator.evaluate()["classification"]
    assert found == pytest.approx(slow_figures(logits, labels), rel=1e-6)
    assert all(type(value) is float for value in found.values())


def test_a_lost_or_doubled_image_is_an_error():
    evaluator = ClassificationEvaluator(3, 4)
    evaluator.process(Batch(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1])), torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="evaluated 2 images of 3"):
        evaluator.evaluate()


def test_fewer_than_five_classes_and_lists_of_dicts():
    logits, labels = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), [1, 1]
    evaluator = ClassificationEvaluator(2, 2)
    evaluator.process([{"label": label} for label in labels], [{"logits": row} for row in logits])
    assert evaluator.evaluate()["classification"]["top1"] == 50.0
    assert evaluator.evaluate()["classification"]["top5"] == 100.0


def test_soft_labels_count_by_their_largest_weight():
    evaluator = ClassificationEvaluator(1, 3)
    evaluator.process(Batch(torch.zeros(1, 3, 1, 1), torch.tensor([[0.2, 0.7, 0.1]])), torch.tensor([[0.0, 2.0, 1.0]]))
    assert evaluator.evaluate()["classification"]["top1"] == 100.0


def test_the_mode_comes_back_even_after_an_error():
    net = torch.nn.Dropout().train()

    def broken():
        yield torch.zeros(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        evaluate(net, broken(), _Ignore())
    assert net.training


class _Ignore:
    def reset(self):
        pass

    def process(self, inputs, outputs):
        assert torch.equal(inputs, outputs), "dropout was on"
