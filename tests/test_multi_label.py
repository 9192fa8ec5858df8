"""Several labels a picture, from the data to the detector; weights counted from the data; the figure that is best."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import imgcls
from imgcls.checkpoint import read_checkpoint
from imgcls.config import load_config
from imgcls.data import open_source
from imgcls.data.datasets import ArraySource
from imgcls.data.digit_sets import SIZES, TAIL, DigitSets
from imgcls.engine import Run, finalize, labels, train
from imgcls.engine.evaluating import is_better
from imgcls.engine.output.output_dir import release
from imgcls.engine.setup import setup
from imgcls.modeling import build_loss
from imgcls.transfer import convert, load_backbone

DIGITS = ("DATASETS.TRAIN", ("digitsets_train",), "DATASETS.TEST", ("digitsets_val",), "MODEL.LOSS.NAME", "BCE")


# ------------------------------------------------------------------------------------------------ the digits' canvases


def test_the_splits_have_their_sizes_and_a_long_tail():
    for split, size in SIZES.items():
        source = open_source(f"digitsets_{split}")
        assert source.multi_label and len(source) == size and source.labels.shape == (size, 10)
        assert set(np.unique(source.labels)) == {0.0, 1.0}
        counts = source.labels.sum(axis=0)
        assert (counts[:-1] > counts[1:]).all() and counts[0] > 0.5 * size and 0.01 < counts[9] / size < 0.05
        several = source.labels.sum(axis=1)
        assert several.min() == 1 and several.max() == 4


def test_the_labels_are_those_of_the_classes_that_are_drawn():
    """k of 1..4 digits, each of class c with a share TAIL ** c: c is on a canvas with 1 - mean_k (1 - share) ** k."""
    shares = TAIL ** np.arange(10) / (TAIL ** np.arange(10)).sum()
    expected = 1 - np.mean([(1 - shares) ** k for k in (1, 2, 3, 4)], axis=0)
    found = DigitSets("train").labels.mean(axis=0)
    assert found == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(SIZES["train"]))


def test_a_canvas_is_the_same_whenever_it_is_asked_for_and_no_two_are():
    source, again = DigitSets("val"), DigitSets("val")
    for index in (0, 7, 999):
        sample = source[index]
        assert sample["pixels"].shape == (64, 64, 3) and sample["pixels"].dtype == np.uint8
        assert np.array_equal(sample["pixels"], again[index]["pixels"])
        assert sample["image_id"] == index and np.array_equal(sample["label"], source.labels[index])
    assert not np.array_equal(source[0]["pixels"], source[1]["pixels"])
    assert not np.array_equal(source[0]["pixels"], DigitSets("test")[0]["pixels"])


def test_there_are_as_many_digits_on_a_canvas_as_quarters_are_bright():
    source = DigitSets("test")
    for index in range(40):
        bright = source[index]["pixels"].max(axis=2) > 150
        quarters = [bright[y : y + 32, x : x + 32].any() for y in (0, 32) for x in (0, 32)]
        assert sum(quarters) <= (source._classes[index] >= 0).sum()
        assert len(np.unique(source._classes[index][source._classes[index] >= 0])) == source.labels[index].sum()


def test_no_digit_is_in_two_splits():
    pools = {split: {d.tobytes() for digits in DigitSets(split)._digits for d in digits} for split in SIZES}
    assert [len(pool) for pool in pools.values()] == [4000, 500, 500]
    assert not (pools["train"] & pools["val"] or pools["val"] & pools["test"] or pools["train"] & pools["test"])


# ------------------------------------------------------------------------------------------- what the labels decide


@pytest.fixture
def small_set():
    """``small_set(name, labels, multi_label)``: grey pictures under a name of detectron2's catalog."""
    names = []

    def make(name, labels, multi_label):
        classes = [f"class{k}" for k in range(3)]
        labels = np.asarray(labels, dtype=np.float32 if multi_label else np.int64)
        pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32), dtype=np.uint8)
        source = ArraySource(name, pixels, labels, classes, multi_label=multi_label)
        DatasetCatalog.register(name, lambda: source)
        names.append(name)
        return ("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,))

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def test_the_data_say_whether_a_picture_has_several_labels(classifier_cfg, small_set):
    cfg, _ = finalize(classifier_cfg("mobilenet_v1_0.25", *DIGITS))
    assert (cfg.MODEL.HEAD.MULTI_LABEL, cfg.TEST.METRIC, cfg.MODEL.HEAD.NUM_CLASSES) == (True, "mAP", 10)
    assert build_model(cfg).multi_label
    cfg, _ = finalize(classifier_cfg())
    assert (cfg.MODEL.HEAD.MULTI_LABEL, cfg.TEST.METRIC) == (False, "top1")
    assert not build_model(cfg).multi_label
    with pytest.raises(ValueError, match=r"digits_train has one class a picture: got True.*MODEL.HEAD.MULTI_LABEL"):
        finalize(classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.MULTI_LABEL", True))
    one = small_set("one_class", [0, 1, 2], False)
    several = small_set("several", np.eye(3), True)
    with pytest.raises(ValueError, match=r"one_class has one class a picture, several has several.*DATASETS.TEST"):
        finalize(classifier_cfg("mobilenet_v1_0.25", *one, "DATASETS.TEST", several[1]))


@pytest.mark.parametrize("name", ["CrossEntropy", "SoftmaxFocal"])
def test_a_loss_for_one_class_is_refused_with_several_labels(classifier_cfg, name):
    message = rf"digitsets_train has several labels .*got '{name}'; allowed: BCE, SigmoidFocal, Asymm.*MODEL.LOSS.NAME"
    with pytest.raises(ValueError, match=message):
        finalize(classifier_cfg("mobilenet_v1_0.25", *DIGITS, "MODEL.LOSS.NAME", name))


def test_bce_is_allowed_with_one_class(classifier_cfg):
    cfg, _ = finalize(classifier_cfg("mobilenet_v1_0.25", "MODEL.LOSS.NAME", "BCE"))
    losses = build_model(cfg).train()(torch.randint(0, 256, (2, 3, 32, 32)).float(), torch.tensor([1, 2]))
    assert torch.isfinite(losses["loss_cls"])


def test_balanced_class_weights_are_all_by_classes_times_own(classifier_cfg, small_set):
    sets = small_set("uneven", [0] * 20 + [1] * 5 + [2] * 3, False)
    cfg, _ = finalize(classifier_cfg("mobilenet_v1_0.25", *sets, "MODEL.LOSS.CLASS_WEIGHTS", ["balanced"]))
    expected = [28 / (3 * 20), 28 / (3 * 5), 28 / (3 * 3)]
    assert pytest.approx(expected, rel=1e-3) == cfg.MODEL.LOSS.CLASS_WEIGHTS
    assert build_loss(cfg.MODEL.LOSS).class_weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert "CLASS_WEIGHTS:\n    - 0.4667" in cfg.dump()
    again, _ = finalize(cfg)  # as when a run is resumed from its config.yaml
    assert again.MODEL.LOSS.CLASS_WEIGHTS == cfg.MODEL.LOSS.CLASS_WEIGHTS


def test_balanced_positive_weights_are_negatives_by_positives_within_bounds(classifier_cfg, small_set, caplog):
    """60 pictures: the first class on 20 of them, the second on one, the third on all."""
    pictures = np.zeros((60, 3))
    pictures[:20, 0] = pictures[0, 1] = pictures[:, 2] = 1
    sets = small_set("rare", pictures, True)
    overrides = ("MODEL.LOSS.NAME", "BCE", "MODEL.LOSS.POS_WEIGHTS", ["balanced"])
    with caplog.at_level("INFO", "imgcls.engine.labels"):
        cfg, _ = finalize(classifier_cfg("mobilenet_v1_0.25", *sets, *overrides))
    assert cfg.MODEL.LOSS.POS_WEIGHTS == [2.0, 20.0, 0.05]
    said = [record.getMessage() for record in caplog.records if record.name == "imgcls.engine.labels"]
    assert said == [
        "MODEL.LOSS.POS_WEIGHTS: balanced weights beyond 0.05 are cut to it: class2",
        "MODEL.LOSS.POS_WEIGHTS: balanced weights beyond 20 are cut to it: class1",
        "MODEL.LOSS.POS_WEIGHTS: balanced, 0.05 to 20",
    ]


def test_a_class_that_the_training_set_lacks_gets_the_largest_weight():
    assert labels.positive_weights(np.array([0.0, 5.0]), 10).tolist() == [10.0, 1.0]
    assert labels.class_weights(np.array([0.0, 5.0]), 10).tolist() == [5.0, 1.0]


def test_weights_of_another_number_and_sets_that_cannot_be_counted_are_refused(classifier_cfg, small_set):
    sets = small_set("three", [0, 1, 2], False)
    with pytest.raises(ValueError, match=r"not one for each class: got \[1.0, 2.0\]; allowed: 3 num.*CLASS_WEIGHTS"):
        finalize(classifier_cfg("mobilenet_v1_0.25", *sets, "MODEL.LOSS.CLASS_WEIGHTS", [1.0, 2.0]))
    source = open_source("three")
    source.labels = None
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.LOSS.CLASS_WEIGHTS", ["balanced"], "TEST.METRIC", "top1")
    with pytest.raises(ValueError, match=r"cannot be counted: got \['balanced'\].*labels of three.*CLASS_WEIGHTS"):
        labels.decide_labels(cfg, source, None)


def test_a_metric_of_the_other_kind_is_refused(classifier_cfg):
    with pytest.raises(ValueError, match=r"one class a picture has no such figure: got 'mAP'; allowed: auto, top1"):
        finalize(classifier_cfg("mobilenet_v1_0.25", "TEST.METRIC", "mAP"))
    with pytest.raises(ValueError, match=r"several labels a picture has no such.*got 'top1'; allowed: auto, mAP"):
        finalize(classifier_cfg("mobilenet_v1_0.25", *DIGITS, "TEST.METRIC", "top1"))


def test_the_best_is_by_the_metric_and_never_what_is_no_number():
    def best_of(metric, values):
        best = {}
        for iteration, value in enumerate(values):
            if is_better(metric, value, best):
                best = {"metric": metric, "value": value, "iteration": iteration}
        return best.get("iteration")

    assert best_of("top1", [float("nan"), 50.0, 80.0, 70.0, float("nan")]) == 2
    assert best_of("loss", [float("nan"), 0.9, 0.4, 0.6]) == 2
    assert best_of("top1", [float("nan")]) is None
    assert is_better("loss", 3.0, {"metric": "top1", "value": 90.0, "iteration": 4})  # another metric begins anew


# ------------------------------------------------------------------------------------------------- one small run


@pytest.fixture(scope="module")
def few_canvases():
    """The name of a set of the first 150 validation canvases."""
    source = DigitSets("val")
    source.labels = source.labels[:150]
    DatasetCatalog.register("few_canvases", lambda: source)
    yield "few_canvases"
    DatasetCatalog.remove("few_canvases")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_canvases):
    """Canvases of 32 pixels and a small network, six iterations, evaluated twice."""
    folder = tmp_path_factory.mktemp("multi") / "run"
    cfg = imgcls.get_config("quick/digits_multilabel.yaml")
    cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", "build_imgcls_mobilenet_v1_backbone", "MODEL.BACKBONE.ROWS", []),
            *("MODEL.BACKBONE.VARIANT", "mobilenet_v1_0.25", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder)),
            *("INPUT.TRAIN_SIZE", 32, "INPUT.TEST_SIZE", 32, "SOLVER.MAX_EPOCHS", 0.0, "SOLVER.MAX_ITER", 6),
            *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.WARMUP_EPOCHS", 0.0, "SOLVER.CHECKPOINT_EPOCHS", 0.0),
            *(
                "SOLVER.CHECKPOINT_PERIOD",
                3,
                "TEST.EVAL_EPOCHS",
                0.0,
                "TEST.EVAL_PERIOD",
                3,
                "DATASETS.TEST",
                (few_canvases,),
            ),
            *("MODEL.LOSS.POS_WEIGHTS", ["balanced"], "DATASETS.TEST", (few_canvases,), "TEST.EXPECTED_RESULTS", []),
        ]
    )
    torch.set_num_threads(1)
    cfg, data = setup(cfg)
    try:
        return folder, train(Run(cfg, data))
    finally:
        release(cfg.OUTPUT_DIR)


def test_training_reports_the_figures_and_keeps_the_best_by_map(trained):
    folder, results = trained
    figures = results["classification"]
    assert list(figures) == [
        *("mAP", "micro_precision", "micro_recall", "micro_f1", "macro_precision", "macro_recall", "macro_f1"),
        *("subset_accuracy", "absent_classes", "loss"),
    ]
    content = read_checkpoint(folder / "model_best.pth")
    assert content["best"]["metric"] == "mAP" and "thresholds" not in content
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    values = {line["iteration"]: line["classification/mAP"] for line in lines if "classification/mAP" in line}
    assert sorted(values) == [2, 5]
    assert content["best"]["value"] == pytest.approx(max(values.values()))
    assert not [name for name in content["model"] if "weight" in name and "loss" in name]


def test_the_tables_lie_beside_the_results(trained):
    folder, results = trained
    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list("0123456789")
    assert [int(row["images"]) for row in rows] == DigitSets("val").labels[:150].sum(axis=0).tolist()
    mean = np.nanmean([float(row["AP"]) for row in rows])
    assert mean == pytest.approx(results["classification"]["mAP"])
    assert not (folder / "confusion_matrix.csv").exists()  # of several labels there is none


def test_thresholds_are_tuned_stored_and_used(trained, tool, tmp_path):
    folder, results = trained
    tuned = tmp_path / "tuned.pth"
    done = tool("tools/tune_thresholds.py", "--weights", folder / "model_final.pth", "--output", tuned)
    assert done.returncode == 0, done.stderr
    assert f"{tuned}: thresholds of 10 classes, tuned on few_canvases" in done.stdout
    content = torch.load(tuned, weights_only=True)
    thresholds = content["thresholds"]
    assert len(thresholds) == 10 and all(type(value) is float and 0 < value < 1 for value in thresholds)
    assert set(content) - set(read_checkpoint(folder / "model_final.pth")) == {"thresholds"}

    words = ["--config-file", folder / "config.yaml", "--eval-only", "--output", tmp_path / "eval"]
    again = tool("tools/train_net.py", *words, "MODEL.WEIGHTS", tuned)
    said = dict(line.split() for line in again.stdout.splitlines() if line.startswith("classification/"))
    assert all(line in again.stdout for line in done.stdout.splitlines() if line.startswith("classification/"))
    assert float(said["classification/macro_f1"]) > results["classification"]["macro_f1"] + 5
    assert float(said["classification/mAP"]) == pytest.approx(results["classification"]["mAP"], abs=1e-3)
    with (tmp_path / "eval" / "per_class.csv").open(newline="") as file:
        assert [float(row["threshold"]) for row in csv.DictReader(file)] == thresholds


def test_the_tools_errors_are_one_line(trained, tool, tmp_path):
    folder, _ = trained
    words = ["tools/tune_thresholds.py", "--weights", folder / "model_final.pth", "--output"]
    for more, message in {
        (folder / "model_final.pth",): "model_final.pth exists; choose another --output, or add --overwrite",
        (tmp_path / "a.pth", "DATASETS.TEST", "('digits_val',)"): "digits_val has one class a picture: got True",
        (tmp_path / "a.pth", "--config-file", "quick/digits_mobilenet_v1.yaml"): "nothing to tune: got ('digits_val',)",
    }.items():
        done = tool(*words, *more)
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1) and message in done.stderr
    done = tool("tools/tune_thresholds.py", "--weights", tmp_path / "no.pth", "--output", tmp_path / "a.pth")
    assert done.returncode == 2 and f"there is no {tmp_path}/config.yaml; give the run's config" in done.stderr
    assert not (tmp_path / "a.pth").exists()


def test_a_list_of_dicts_gets_the_classes_that_reach_their_thresholds(trained):
    folder, _ = trained
    cfg = load_config(folder / "config.yaml")
    model = build_model(cfg).eval()
    pixels = [torch.from_numpy(DigitSets("test")[i]["pixels"]).permute(2, 0, 1) for i in range(4)]
    with torch.no_grad():
        rows = model([{"image": image} for image in pixels])
    for row in rows:
        assert set(row) == {"logits", "scores", "pred_classes"}
        assert torch.equal(row["scores"], row["logits"].sigmoid())
        assert row["pred_classes"] == [k for k in range(10) if row["scores"][k] >= 0.5]
    model.thresholds = tuple(rows[0]["scores"].double().tolist()[:5]) + (1.1,) * 5
    with torch.no_grad():
        chosen = [row["pred_classes"] for row in model([{"image": image} for image in pixels])]
    assert set(chosen[0]) <= set(range(5)) and chosen != [row["pred_classes"] for row in rows]
    model.thresholds = (0.0,)
    assert model([{"image": pixels[0]}])[0]["pred_classes"] == list(range(10))


def test_the_trunk_is_handed_over_as_any_other(trained, detector_cfg, tmp_path):
    folder, _ = trained
    handover = convert(folder / "model_final.pth", tmp_path / "backbone.pth")
    assert handover.classes == tuple("0123456789") and "mAP" in handover.metrics
    cfg = detector_cfg("retinanet", "mobilenet_v1_0.25")
    detector = build_model(cfg)
    report = load_backbone(detector, tmp_path / "backbone.pth", cfg)
    assert report.complete
    classifier = read_checkpoint(folder / "model_final.pth")["model"]
    theirs = detector.backbone.bottom_up.state_dict()
    assert all(torch.equal(theirs[name], classifier[f"backbone.{name}"]) for name in report.loaded)


def test_stock_configs_are_as_they_were():
    assert "METRIC" not in get_cfg().TEST
