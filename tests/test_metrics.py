"""Metrics against scikit-learn and against slow references, one picture after another."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from detectron2.utils import comm

from imgcls.evaluation import (
    ClassificationEvaluator,
    MultiLabelEvaluator,
    ThresholdTuner,
    evaluate,
    per_class_text,
    tune,
    write_tables,
)
from imgcls.evaluation.metrics import (
    Counts,
    average_precision,
    average_precisions,
    best_threshold,
    confusion_matrix,
    mean_over_present,
    subset_accuracy,
)
from imgcls.structures import Batch

NAN = float("nan")


def examples(seed, count=60, classes=4, levels=0):
    """Scores (of ``levels`` different values if said, so that many are equal) and targets that follow them a little."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, classes, generator=generator, dtype=torch.float64)
    targets = torch.rand(count, classes, generator=generator) < 0.1 + 0.5 * scores
    return (scores * levels).floor() / levels if levels else scores, targets


def slow_average_precision(scores, targets):
    """At each distinct score: the precision of everything at or above it, times the gain in recall."""
    pairs = list(zip(scores.tolist(), targets.tolist(), strict=True))
    positives, found, last_recall = sum(target for _, target in pairs), 0.0, 0.0
    if not positives:
        return NAN
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        above = [target for score, target in pairs if score >= threshold]
        recall = sum(above) / positives
        found += (recall - last_recall) * sum(above) / len(above)
        last_recall = recall
    return found


@pytest.mark.parametrize("levels", [0, 3, 10, 1])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_against_sklearn_and_the_slow_reference(seed, levels):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = examples(seed, levels=levels)
    ours = average_precisions(scores, targets)
    for k in range(4):
        assert ours[k].item() == pytest.approx(slow_average_precision(scores[:, k], targets[:, k]), rel=1e-12)
        theirs = sklearn.average_precision_score(targets[:, k].numpy(), scores[:, k].numpy())
        assert ours[k].item() == pytest.approx(theirs, rel=1e-12)


def test_the_order_of_pictures_with_equal_scores_does_not_count():
    scores, targets = examples(5, levels=3)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    assert torch.equal(average_precisions(scores, targets), average_precisions(scores[order], targets[order]))
    assert average_precision(torch.zeros(4), torch.tensor([True, False, False, False])) == 0.25
    assert average_precision(torch.tensor([1.0, 0, 0, 0]), torch.tensor([True, False, False, False])) == 1.0


def test_a_class_without_positives_has_no_average_precision_and_is_left_out_of_the_mean():
    scores, targets = examples(0)
    whole = mean_over_present(average_precisions(scores, targets))
    targets[:, 2] = False
    found = average_precisions(scores, targets)
    assert found.isnan().tolist() == [False, False, True, False]
    assert mean_over_present(found) == pytest.approx((found[0] + found[1] + found[3]).item() / 3)
    assert mean_over_present(found) != pytest.approx(whole)


@pytest.mark.parametrize("seed", range(3))
def test_precision_recall_and_f1_against_sklearn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = examples(seed, count=30)
    predicted = scores > 0.6
    predicted[:, 1] = False
    counts = Counts.of(predicted, targets)
    for name in ("precision", "recall", "f1"):
        score = getattr(sklearn, f"{name}_score")
        theirs = score(targets.numpy(), predicted.numpy(), average=None, zero_division=0)
        assert getattr(counts, name).tolist() == pytest.approx(theirs.tolist(), rel=1e-12)
        micro = score(targets.numpy(), predicted.numpy(), average="micro")
        assert getattr(counts.total(), name).item() == pytest.approx(micro, rel=1e-12)
    theirs = sklearn.accuracy_score(targets.numpy(), predicted.numpy())
    assert subset_accuracy(predicted, targets) == pytest.approx(theirs)


def test_what_is_nowhere_has_no_recall_and_what_is_never_predicted_no_precision():
    targets = torch.tensor([[True, False], [True, False]])
    counts = Counts.of(torch.tensor([[False, True], [False, False]]), targets)
    assert counts.precision.tolist() == [0.0, 0.0]
    assert counts.recall[0] == 0.0 and counts.recall[1].isnan()
    assert counts.f1[0] == 0.0 and counts.f1[1].isnan()
    assert counts.present.tolist() == [True, False]


def test_subset_accuracy_by_hand():
    targets = torch.tensor([[True, False], [True, True], [False, False]])
    assert subset_accuracy(targets, targets) == 1.0
    assert subset_accuracy(torch.tensor([[True, False], [True, False], [False, True]]), targets) == pytest.approx(1 / 3)


def test_the_confusion_matrix_has_a_row_for_each_true_class():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 3, 1, 0, 0, 2])
    found = confusion_matrix(predicted, labels, 4)
    assert found.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    theirs = sklearn.confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(4))
    assert found.tolist() == theirs.tolist()


# ---------------------------------------------------------------------------------------------------- thresholds


def slow_f1(scores, targets, threshold):
    both = sum(s >= threshold and t for s, t in zip(scores, targets, strict=True))
    wrong = sum((s >= threshold) != t for s, t in zip(scores, targets, strict=True))
    return 2 * both / (2 * both + wrong) if both + wrong else 0.0


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_has_a_higher_f1_than_the_one_that_is_found(seed, levels):
    scores, targets = examples(seed, levels=levels)
    for score, target in zip(scores.T, targets.T, strict=True):
        threshold, f1 = best_threshold(score, target)
        values, truth = score.tolist(), target.tolist()
        assert f1 == pytest.approx(slow_f1(values, truth, threshold), rel=1e-12)
        everywhere = [slow_f1(values, truth, cut) for cut in [*values, 2.0]]
        assert f1 == pytest.approx(max(everywhere), rel=1e-12)
        assert f1 > min(everywhere)
        assert threshold not in values or levels  # between two scores, so that rounding cannot move a picture across


def test_thresholds_by_hand():
    assert best_threshold(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, True, False])) == (
        pytest.approx(0.55),
        1.0,
    )
    assert best_threshold(torch.tensor([0.4, 0.2]), torch.tensor([True, True])) == (pytest.approx(0.1), 1.0)
    assert best_threshold(torch.tensor([0.4, 0.2]), torch.tensor([False, False])) is None
    both = tune(torch.tensor([[0.9, 0.1], [0.3, 0.2]]), torch.tensor([[True, False], [False, False]]))
    assert both.tolist() == [pytest.approx(0.6), 0.5]  # a class that no picture has keeps 0.5


# ----------------------------------------------------------------------------------------------------- evaluators


def spread(evaluator_of, logits, targets, world, monkeypatch, batch=7):
    """What ``world`` ranks report of contiguous shares; the last evaluator, and each rank's figures."""
    shares, evaluators, count = [], [], len(logits)
    for rank in range(world):
        evaluator = evaluator_of(count)
        mine = range(count * rank // world, count * (rank + 1) // world)
        for first in range(mine.start, mine.stop, batch):
            part = slice(first, min(first + batch, mine.stop))
            evaluator.process(Batch(torch.zeros(part.stop - part.start, 3, 1, 1), targets[part]), logits[part])
        evaluators.append(evaluator)
    with monkeypatch.context() as patch:
        patch.setattr(comm, "all_gather", lambda own: shares.append(own) or [own])
        for evaluator in evaluators:
            try:
                evaluator.evaluate()
            except RuntimeError:
                assert world > 1  # a share alone is not the whole set
    monkeypatch.setattr(comm, "all_gather", lambda own: shares)
    return evaluators[-1], [evaluator.evaluate()["classification"] for evaluator in evaluators]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_multi_label_figures_are_those_by_hand_on_any_number_of_ranks(world, monkeypatch):
    scores, targets = examples(2, count=41)
    targets[:, 3] = False
    logits, thresholds = scores.logit().float(), [0.3, 0.5, 0.7, 0.5]
    evaluator, found = spread(
        lambda count: MultiLabelEvaluator(count, 4, thresholds), logits, targets.float(), world, monkeypatch
    )
    assert found[1:] == found[:-1]
    chances = logits.double().sigmoid()
    precisions = [slow_average_precision(chances[:, k], targets[:, k]) for k in range(3)]
    f1 = [slow_f1(chances[:, k].tolist(), targets[:, k].tolist(), thresholds[k]) for k in range(3)]
    right = sum(
        all((s >= h) == t for s, h, t in zip(row, thresholds, truth, strict=True))
        for row, truth in zip(chances.tolist(), targets.tolist(), strict=True)
    )
    loss = -sum(
        math.log(s if t else 1 - s)
        for row, truth in zip(chances.tolist(), targets.tolist(), strict=True)
        for s, t in zip(row, truth, strict=True)
    )
    figures = found[0]
    assert figures["mAP"] == pytest.approx(100 * sum(precisions) / 3)
    assert figures["macro_f1"] == pytest.approx(100 * sum(f1) / 3)
    assert figures["subset_accuracy"] == pytest.approx(100 * right / 41)
    assert figures["loss"] == pytest.approx(loss / (41 * 4), rel=1e-6)
    assert figures["absent_classes"] == 1.0
    assert evaluator.per_class["images"].tolist() == targets.sum(0).tolist()
    assert evaluator.per_class["f1"].tolist()[:3] == pytest.approx([100 * value for value in f1])
    assert all(type(value) is float for value in figures.values())


@pytest.mark.parametrize("world", [1, 2])
def test_accuracy_by_class_and_the_confusion_matrix(world, monkeypatch):
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(3)
    logits, labels = torch.randn(50, 6), torch.randint(0, 5, (50,))
    evaluator, found = spread(lambda count: ClassificationEvaluator(count, 6), logits, labels, world, monkeypatch)
    predicted = logits.argmax(dim=1)
    kept = predicted < 5  # scikit-learn counts a class that is only predicted among the classes
    balanced = sklearn.balanced_accuracy_score(labels.numpy(), predicted.where(kept, (labels + 1) % 5).numpy())
    assert found[0]["balanced_accuracy"] == pytest.approx(100 * balanced)
    assert torch.equal(evaluator.confusion, confusion_matrix(predicted, labels, 6))
    assert evaluator.per_class["images"].tolist() == [int((labels == k).sum()) for k in range(6)]
    assert evaluator.per_class["top1"][5].isnan()


def test_the_tuner_finds_thresholds_and_the_figures_with_them():
    scores, targets = examples(4)
    logits = scores.logit().float() - 2  # so that 0.5 is far too high
    batches = [Batch(logits[:33], targets[:33].float()), Batch(logits[33:], targets[33:].float())]
    tuner, plain = ThresholdTuner(60, 4), MultiLabelEvaluator(60, 4, [0.5])
    tuned = evaluate(_Echo(), batches, tuner)["classification"]
    before = evaluate(_Echo(), batches, plain)["classification"]
    assert torch.equal(tuner.thresholds, tune(logits.double().sigmoid(), targets))
    assert tuned["macro_f1"] > before["macro_f1"] + 10 and tuned["mAP"] == before["mAP"]
    again = MultiLabelEvaluator(60, 4, tuner.thresholds.tolist())
    assert evaluate(_Echo(), batches, again)["classification"] == tuned


class _Echo(torch.nn.Module):
    """Takes batches whose images are the logits."""

    def forward(self, batch):
        return batch.images


class _Loader(list):
    left_out = 0


@pytest.mark.parametrize(("left_out", "expected"), [(0, 3), (2, 5)])
def test_images_that_cannot_be_read_are_counted_as_missing(left_out, expected):
    loader = _Loader([Batch(torch.eye(3), torch.tensor([0, 1, 1]))])
    loader.left_out = left_out
    figures = evaluate(_Echo(), loader, ClassificationEvaluator(expected, 3))["classification"]
    assert figures["top1"] == pytest.approx(200 / 3)
    assert figures.get("missing") == (left_out or None)
    with pytest.raises(RuntimeError, match=f"evaluated 3 images of {expected + 1}; the loaders lost or doubled some"):
        evaluate(_Echo(), loader, ClassificationEvaluator(expected + 1, 3))


def test_a_set_of_which_nothing_can_be_read_has_no_figures():
    loader = _Loader()
    loader.left_out = 4
    with pytest.raises(ValueError, match=r"none of the 4 images of DATASETS.TEST could be read"):
        evaluate(_Echo(), loader, MultiLabelEvaluator(4, 3, [0.5]))


def test_several_labels_need_a_vector_for_each_image():
    with pytest.raises(ValueError, match=r"labels of the shape \(2,\) for logits \(2, 3\)"):
        evaluate(_Echo(), [Batch(torch.zeros(2, 3), torch.tensor([0, 1]))], MultiLabelEvaluator(2, 3, [0.5]))


# --------------------------------------------------------------------------------------------------------- tables


def test_the_table_has_a_row_for_each_class_or_the_worst_of_many():
    columns = {"images": torch.tensor([3, 2, 0]), "top1": torch.tensor([100.0, 25.04, NAN])}
    lines = per_class_text(["1", "b", "c"], columns).splitlines()
    assert [line.split() for line in lines] == [
        ["class", "images", "top1"],
        ["-------", "--------", "------"],
        ["1", "3", "100.0"],
        ["b", "2", "25.0"],
        ["c", "0", "nan"],
    ]
    lines = per_class_text(["1", "b", "c"], columns, most=1).splitlines()
    assert lines[2].split()[0] == "b"
    assert lines[3:] == ["(the 1 classes of 3 with the lowest top1; per_class.csv has all)"]


def test_the_files_hold_what_the_table_and_the_matrix_do(tmp_path):
    columns = {"images": torch.tensor([3, 2]), "top1": torch.tensor([100.0, 50.0])}
    for _ in range(2):  # the second time over the first
        write_tables(tmp_path, ["a, b", "c"], columns, torch.tensor([[3, 0], [1, 1]]))
    with (tmp_path / "per_class.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["class", "images", "top1"], ["a, b", "3", "100.0"], ["c", "2", "50.0"]]
    with (tmp_path / "confusion_matrix.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["true class", "a, b", "c"], ["a, b", "3", "0"], ["c", "1", "1"]]
    assert len(list(tmp_path.iterdir())) == 2
