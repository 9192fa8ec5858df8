"""The commands as people type them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_tool, write_image_folder

from imgcls.checkpoint import content_digest
from imgcls.commands.prepare_digits import main as prepare_digits

TINY = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0)
DIGITS = ("--config-file", "configs/quick/digits_mobilenet_v1.yaml", "INPUT.TRAIN_SIZE", 32)


def one_line(done):
    """The single line of a refusal."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder of images trained on, converted; and a small detection set."""
    out = tmp_path_factory.mktemp("workshop")
    write_image_folder(out / "images" / "train", {"ant": 6, "bee": 5, "cat": 4})
    write_image_folder(out / "images" / "val", {"ant": 2, "cat": 2}, seed=1)

    def run(*words):
        done = run_tool(*words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    words = ("--data", out / "images", "--variant", "mobilenet_v1_0.25", "--output", out / "run")
    out_text = run("tools/train_net.py", *words, *TINY)
    (out / "train.txt").write_text(out_text.stdout + out_text.stderr)
    run("tools/convert_to_detection.py", "--weights", out / "run/model_final.pth", "--output", out / "backbone.pth")
    assert prepare_digits(["--output", str(out / "digits"), "--train", "6", "--val", "3", "--canvas", "96"]) in (
        0,
        None,
    )
    return out


def detector_words(workshop, output):
    digits = workshop / "digits"
    return [
        *("--config-file", "configs/quick/digits_retinanet_fpn.yaml", "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 2),
        *("SOLVER.IMS_PER_BATCH", 2, "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.STEM", "small", "SOLVER.STEPS", "(1,)"),
        *("MODEL.RETINANET.IN_FEATURES", "['p2','p3','p4']", "SOLVER.WARMUP_ITERS", 0),
        *("DATASETS.TRAIN", f"('coco:{digits}/train.json@{digits}/train',)"),
        *("DATASETS.TEST", f"('coco:{digits}/val.json@{digits}/val',)"),
    ]


def test_a_folder_of_images_needs_no_yaml_and_leaves_one(workshop, tool):
    run = workshop / "run"
    content = torch.load(run / "model_final.pth", weights_only=True)
    assert content["classes"] == ["ant", "bee", "cat"]
    assert {key.split(".")[0] for key in content["model"]} == {"backbone", "head"}
    text = (workshop / "train.txt").read_text()
    assert "input 32, small stem" in text and "bee" in text.partition("has no pictures of")[2].splitlines()[0]
    assert {"config.yaml", "environment.txt", "log.txt", "metrics.json", "model_best.pth"} <= set(os.listdir(run))
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 2 and lines[-1]["images_per_second"] > 0
    again = tool("tools/train_net.py", "--config-file", run / "config.yaml", "--output", run, "--resume")
    assert again.returncode == 0 and "nothing is left to train" in again.stdout


def test_a_finished_output_directory_is_not_overwritten(workshop, tool):
    run = workshop / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    done = tool("tools/train_net.py", "--data", workshop / "images", "--output", run, *TINY)
    assert "holds the results of an earlier job; add --resume" in one_line(done)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert before == after


def test_mistakes_are_told_before_anything_is_made(workshop, tool, tmp_path):
    images, out = workshop / "images", tmp_path / "out"
    base = ("tools/train_net.py", "--output", out)
    assert "give --config-file FILE, or --data DIR" in one_line(tool(*base))
    assert "there is no folder" in one_line(tool(*base, "--data", tmp_path / "none"))
    wrong = tool(*base, "--data", images, "--variant", "mobilenet_v1_1.1")
    assert "did you mean mobilenet_v1_1.0" in one_line(wrong)
    wrong = tool(*base, "--data", images, *TINY, "MODEL.HEAD.NUM_CLASSES", 7, "SOLVER.BASE_LR", -1)
    assert "SOLVER.BASE_LR" in one_line(wrong)
    assert not out.exists()


def test_evaluating_finds_what_training_reported(workshop, tool):
    run = workshop / "run"
    reported = json.loads((run / "metrics.json").read_text().splitlines()[-1])
    words = ("--eval-only", "--config-file", run / "config.yaml", "MODEL.WEIGHTS", run / "model_final.pth")
    for script in ("tools/train_net.py", "tools/train_net_builtin.py"):
        done = tool(script, *words)
        assert done.returncode == 0, done.stderr
        assert f"classification/top1 {reported['classification/top1']:.4f}" in done.stdout.splitlines()
    assert "needs the weights" in one_line(tool("tools/train_net.py", *words[:3]))


def test_weights_of_other_classes_need_a_new_head(workshop, tool, tmp_path):
    words = ("tools/train_net.py", *DIGITS, *TINY, "MODEL.BACKBONE.STEM", "small", "OUTPUT_DIR", tmp_path / "out")
    weights = ("MODEL.WEIGHTS", workshop / "run/model_final.pth")
    assert "knows 3 classes (ant, bee, cat" in one_line(tool(*words, *weights))
    done = tool(*words, *weights, "MODEL.HEAD.RESET", True, "OUTPUT_DIR", tmp_path / "reset")
    assert done.returncode == 0 and "2 new: head.fc.weight, head.fc.bias" in done.stdout


def test_another_network_or_a_wrong_prefix_says_how_many_tensors(workshop, tool, tmp_path):
    words = ("tools/train_net.py", *DIGITS, *TINY, "OUTPUT_DIR", tmp_path / "out", "MODEL.HEAD.RESET", True)
    weights = ("MODEL.WEIGHTS", workshop / "run/model_final.pth", "MODEL.BACKBONE.STEM", "small")
    other = tool(*words, *weights, "MODEL.BACKBONE.VARIANT", "mobilenet_v1_0.5")
    assert "of 135 tensors loaded" in one_line(other) and "MODEL.BACKBONE.VARIANT" in one_line(other)
    torch.save({"model": {"net.weight": torch.zeros(1)}}, tmp_path / "prefix.pth")
    assert "0 of 135 tensors loaded" in one_line(tool(*words, "MODEL.WEIGHTS", tmp_path / "prefix.pth"))


def test_an_expected_result_that_is_missed_ends_with_1(tool, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"_BASE_: {Path(__file__).resolve().parents[1]}/configs/quick/digits_mobilenet_v1.yaml\n"
        "SOLVER: {MAX_EPOCHS: 0.0, MAX_ITER: 2, IMS_PER_BATCH: 4, WARMUP_EPOCHS: 0.0}\n"
        "INPUT: {TRAIN_SIZE: 32}\nTEST: {EXPECTED_RESULTS: [['classification', 'top1', 99.0, 1.0]]}\n"
    )
    words = ("tools/train_net.py", "--config-file", recipe, "MODEL.DEVICE", "cpu")
    done = tool(*words, "--output", tmp_path / "missed")
    assert done.returncode == 1 and "classification/top1" in done.stdout
    done = tool(*words, "--output", tmp_path / "other", "SOLVER.MAX_ITER", 1)
    assert done.returncode == 0 and "not judged" in done.stdout


@pytest.mark.parametrize("case", ["good", "prefix", "channels", "tensor"])
def test_verify_passes_once_and_fails_three_times(workshop, tool, tmp_path, case):
    content = torch.load(workshop / "backbone.pth", weights_only=True)
    model = content["model"]
    if case == "prefix":
        content["model"] = {f"backbone.{key}": value for key, value in model.items()}
    elif case == "channels":
        model["stem.conv1.weight"] = model["stem.conv1.weight"].flip(1)
    elif case == "tensor":
        del model["res4.block3.pointwise.norm.running_mean"]
    content["digest"] = content_digest(content)
    torch.save(content, tmp_path / "file.pth")
    words = ("--weights", tmp_path / "file.pth", "--classifier", workshop / "run/model_final.pth")
    config = ("--config-file", "configs/quick/digits_retinanet_fpn.yaml", "MODEL.BACKBONE.STEM", "small")
    done = tool("tools/verify_transfer.py", *words, *config, "MODEL.RETINANET.IN_FEATURES", "['p2','p3','p4']")
    said = {
        "good": "OK: 135 of 135 tensors arrived bit for bit",
        "prefix": "0 of 135 tensors loaded",
        "channels": "(RGB, BGR) are swapped",
        "tensor": "134 of 135 tensors loaded; 1 missing: res4.block3.pointwise.norm.running_mean",
    }
    assert said[case] in done.stdout, done.stdout + done.stderr
    assert done.returncode == (0 if case == "good" else 1)


def test_a_detector_trains_from_it_resumes_and_evaluates(workshop, tool, tmp_path):
    words = detector_words(workshop, tmp_path / "detector")
    weights = ("MODEL.WEIGHTS", workshop / "backbone.pth")
    done = tool("tools/train_detector.py", *words, *weights)
    assert done.returncode == 0 and "bbox/AP " in done.stdout, done.stderr[-2000:]
    saved = torch.load(tmp_path / "detector/model_final.pth", weights_only=True)
    assert any(key.startswith("backbone.bottom_up.stem.") for key in saved["model"])
    assert "add --resume" in one_line(tool("tools/train_detector.py", *words, *weights))
    done = tool("tools/train_detector.py", "--resume", *words, *weights, "SOLVER.MAX_ITER", 3)
    assert done.returncode == 0 and "Starting training from iteration 2" in done.stdout
    final = ("MODEL.WEIGHTS", tmp_path / "detector/model_final.pth")
    done = tool("tools/train_detector.py", "--eval-only", *words, *final)
    assert done.returncode == 0 and "bbox/AP " in done.stdout
    done = tool("tools/train_detector.py", "--eval-only", *words, *weights)
    assert "135 of" in one_line(done) and "missing: backbone.fpn_lateral" in one_line(done)


def test_a_detector_refuses_what_would_start_it_at_random(workshop, tool, tmp_path):
    words = ("tools/train_detector.py", *detector_words(workshop, tmp_path / "out"))
    classifier = ("MODEL.WEIGHTS", workshop / "run/model_final.pth")
    assert "is a classifier's checkpoint" in one_line(tool(*words, *classifier))
    torch.save({}, tmp_path / "empty.pth")
    done = tool(*words, "MODEL.WEIGHTS", tmp_path / "empty.pth", "OUTPUT_DIR", tmp_path / "empty")
    assert "0 of 135 tensors of the backbone" in one_line(done)
    assert "FREEZE_AT" in one_line(tool(*words, "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 2))
    assert "coco_2017_train" in one_line(tool(*words, "DATASETS.TRAIN", "('coco_2017_trian',)"))
    assert "NUM_CLASSES" in one_line(tool(*words, "MODEL.WEIGHTS", "", "MODEL.RETINANET.NUM_CLASSES", 3))


def test_torchrun_runs_two_ranks(command, tmp_path):
    words = (*DIGITS, *TINY, "OUTPUT_DIR", tmp_path / "run", "TEST.IMS_PER_BATCH", 500)
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tools/train_net.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ranks on cpu" in (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "run/model_final.pth").exists()
