"""The command lines: their options, their order of precedence, and mistakes in one line."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_image_folder
from detectron2.config import CfgNode

import imgcls.__main__ as package
from imgcls.commands import convert, train, train_detector, verify
from imgcls.commands.arguments import one_line_errors, parse, training_parser
from imgcls.commands.recipe import training_config

TRAINING = ["--config-file", "--resume", "--eval-only", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url"]
TRAINING += ["--dist-timeout"]
OPTIONS = {
    "train_net": [*TRAINING, "--data", "--variant", "--output", "--replay", "--tune", "--find-batch-size"],
    "train_net_builtin": [*TRAINING, "--data", "--variant", "--output", "--replay", "--tune", "--find-batch-size"],
    "train_detector": TRAINING,
    "convert_to_detection": ["--weights", "--output", "--fold-normalization", "--overwrite"],
    "verify_transfer": ["--weights", "--config-file", "--classifier"],
    "import_weights": ["--from", "--variant", "--tag", "--in-channels", "--mean", "--std", "--output", "--overwrite"],
    "make_detector_config": ["--detector", "--weights", "--variant", "--output", "--overwrite"],
    "show_data": ["--config-file", "--data", "--output", "--count", "--epoch", "--split"],
    "analyze_model": ["--variant", "--size", "--classes"],
    "pack_dataset": ["--data", "--output", "--short-side", "--quality", "--shard-size", "--workers", "--check"],
    "benchmark_data": ["--data", "--with", "--shards", "--repeats", "--images", "--workers", "--dali-python", "--json"],
    "benchmark_train": ["--variant", "--size", "--batch", "--steps", "--pairs", "--threads", "--part", "--out"],
    "doctor": ["--config-file", "--data", "--train", "--val", "--sample", "--workers", "--no-speed", "--json"],
    "plot_run": ["--output", "--metrics", "--x"],
    "sweep": ["--space", "--config-file", "--output", "--trials", "--jobs", "--pruner", "--seed", "--keep-weights"],
    "plot_schedule": ["--config-file", "--schedules", "--images", "--output"],
    "average_checkpoints": ["--output", "--shares", "--recompute-statistics", "--config-file", "--overwrite"],
    "tune_thresholds": ["--weights", "--output", "--config-file", "--overwrite"],
}
TAKING_KEYS = (
    "train_net",
    "train_net_builtin",
    "train_detector",
    "verify_transfer",
    "tune_thresholds",
    "show_data",
    "sweep",
    "plot_schedule",
    "doctor",
)
COMMANDS = {
    "train": OPTIONS["train_net"],
    "train-builtin": OPTIONS["train_net"],
    "convert": OPTIONS["convert_to_detection"],
    "verify": OPTIONS["verify_transfer"],
    "import-weights": OPTIONS["import_weights"],
    "make-detector-config": OPTIONS["make_detector_config"],
    "show-data": OPTIONS["show_data"],
    "benchmark-data": OPTIONS["benchmark_data"],
    "benchmark-train": OPTIONS["benchmark_train"],
    "doctor": OPTIONS["doctor"],
    "analyze": OPTIONS["analyze_model"],
    "plot-schedule": OPTIONS["plot_schedule"],
    "plot-run": OPTIONS["plot_run"],
    "sweep": OPTIONS["sweep"],
    "average-checkpoints": OPTIONS["average_checkpoints"],
    "tune-thresholds": OPTIONS["tune_thresholds"],
    "train-detector": TRAINING,
    "pack-dataset": OPTIONS["pack_dataset"],
    "prepare-data": ["--root", "--from", "--splits", "--keep"],
    "prepare-imagenet": ["--archives", "--output", "--counts", "--check-digests"],
    "prepare-voc": ["--root", "--output", "--splits"],
    "prepare-digits": ["--output"],
}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``run("train_net", "--help")``: the script of tools/ as ``python`` would run it; code, stdout, stderr.

    ``run("imgcls", "train", "--help")`` is ``python -m imgcls train --help``. In this process: a new one would import
    torch and detectron2 each time, for seconds.
    """

    def call(script: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        code: Any = 0
        try:
            if script == "imgcls":
                package.main()
            else:
                runpy.run_path(str(ROOT / "tools" / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    yield call
    for name in ("fvcore", "detectron2", "imgcls"):  # their handlers hold on to this test's stdout
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


# -------------------------------------------------------------------------------------------------------------- help


def test_the_tools_are_these() -> None:
    assert sorted(path.stem for path in (ROOT / "tools").glob("*.py")) == sorted(OPTIONS)
    assert sorted(package.COMMANDS) == sorted(COMMANDS)


@pytest.mark.parametrize("tool", OPTIONS)
def test_the_help_of_a_tool_names_its_options(tool: str, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(tool, "--help")
    assert (code, err) == (0, "")
    for option in OPTIONS[tool]:
        assert f"\n  {option}" in out or f", {option}" in out, option
    assert ("[KEY VALUE ...]" in out) == (tool in TAKING_KEYS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_its_options(command: str, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("imgcls", command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: imgcls {command} ")
    assert all(option in out for option in COMMANDS[command])


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_the_package_lists_its_commands(words: tuple[str, ...], run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("imgcls", *words)
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.splitlines()[1:]]
    assert sorted(listed) == sorted(COMMANDS)


# -------------------------------------------------------------------------------------------------- options and pairs


@pytest.mark.parametrize(
    "words",
    [
        "--config-file a.yaml --resume --num-gpus 2 SOLVER.BASE_LR 0.1 MODEL.WEIGHTS w.pth",
        "SOLVER.BASE_LR 0.1 MODEL.WEIGHTS w.pth --config-file a.yaml --resume --num-gpus 2",
        "--config-file a.yaml SOLVER.BASE_LR 0.1 --resume MODEL.WEIGHTS w.pth --num-gpus=2",
        "--resume SOLVER.BASE_LR 0.1 --config-file=a.yaml MODEL.WEIGHTS w.pth --num-gpus 2",
    ],
)
def test_options_may_stand_anywhere(words: str) -> None:
    args = parse(training_parser(""), words.split())
    assert (args.config_file, args.resume, args.eval_only, args.num_gpus) == (["a.yaml"], True, False, 2)
    assert args.opts == ["SOLVER.BASE_LR", "0.1", "MODEL.WEIGHTS", "w.pth"]


@pytest.mark.parametrize("value", ["-0.1", "-1e-3", "-1", "", "('a', 'b')", "- x"])
def test_values_may_begin_with_one_dash(value: str) -> None:
    args = parse(training_parser(""), ["SOLVER.BASE_LR", value, "--resume"])
    assert args.opts == ["SOLVER.BASE_LR", value] and args.resume


def test_no_words_at_all_parse_to_nothing() -> None:
    args = parse(training_parser(""), [])
    assert (args.config_file, args.resume, args.opts) == ([], False, [])


def test_every_command_with_pairs_takes_options_behind_them() -> None:
    for parser, words in (
        (train.parser(), "A.B 1 --data d --variant v --output o"),
        (train_detector.parser(), "A.B 1 --config-file c"),
        (verify.parser(), "A.B 1 --weights w --config-file c"),
    ):
        assert parse(parser, words.split()).opts == ["A.B", "1"]


# ----------------------------------------------------------------------------------------------------- one line, code 2

QUICK = "quick/digits_mobilenet_v1.yaml"
# Two YAMLs with a mistake, which lie beside the folder that a mistake is tried in.
TYPO, TYPE = "../typo.yaml", "../type.yaml"
BAD = {TYPO: "VERSION: 2\nSOLVER: {MAX_ITR: 3}\n", TYPE: "VERSION: 2\nSOLVER: {MAX_ITER: a few}\n"}
MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown option": (["train_net", "--resum3"], "there is no option --resum3; did you mean --resume?"),
    "unknown option behind pairs": (
        ["train_net", "--config-file", QUICK, "SOLVER.MAX_ITER", "3", "--evalonly"],
        "there is no option --evalonly; did you mean --eval-only?",
    ),
    "nothing like any option": (
        ["verify_transfer", "--weights", "w", "--config-file", "c", "--zzz"],
        "no option --zzz",
    ),
    "an option without its value": (["train_net", "--config-file"], "--config-file: expected at least one argument"),
    "no number": (["train_net", "--num-gpus", "two"], "--num-gpus: 'two' is no whole number above 0"),
    "no process": (["train_net", "--num-gpus", "0"], "--num-gpus: '0' is no whole number above 0"),
    "a machine too many": (
        ["train_net", "--config-file", QUICK, "--num-machines", "2", "--machine-rank", "2"],
        "--machine-rank 2, but the 2 machines (--num-machines) are counted from 0",
    ),
    "a missing option": (["convert_to_detection", "--weights", "w.pth"], "required: --output"),
    "an unknown option of convert": (
        ["convert_to_detection", "--weights", "w", "--output", "o.pth", "--overwrit3"],
        "unrecognized arguments: --overwrit3",
    ),
    "nothing to train": (["train_net"], "give --config-file FILE, or --data DIR"),
    "nothing to train, built in": (["train_net_builtin", "--resume"], "give --config-file FILE, or --data DIR"),
    "no detector": (["train_detector"], "give the detector's YAML: --config-file"),
    "an odd list": (
        ["train_net", "--config-file", QUICK, "SOLVER.BASE_LR", "0.1", "SOLVER.MAX_ITER"],
        "the last override has no value: got 'SOLVER.MAX_ITER'",
    ),
    "an odd list, detector": (["train_detector", "--config-file", QUICK, "MODEL.WEIGHTS"], "the last override has no"),
    "an odd list, verify": (
        ["verify_transfer", "--weights", "w.pth", "--config-file", QUICK, "MODEL.DEVICE"],
        "the last override has no value",
    ),
    "an unknown key": (["train_net", "--config-file", QUICK, "SOLVER.MAX_ITR", "3"], "SOLVER.MAX_ITER"),
    "no such config": (["train_net", "--config-file", "quick/digits_mobilenet.yaml"], QUICK),
    "no such folder": (["train_net", "--data", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
    "no such network": (["train_net", "--config-file", QUICK, "--variant", "mobilenet_v1_1.1"], "mobilenet_v1_1.0"),
    "evaluating nothing": (["train_net", "--config-file", QUICK, "--eval-only"], "add MODEL.WEIGHTS"),
    "no such weights": (["convert_to_detection", "--weights", "gone.pth", "--output", "o.pth"], "no file gone.pth"),
    "unknown command": (["imgcls", "trian"], "there is no command 'trian'; did you mean train? All: train, train-bui"),
    "nothing like any command": (["imgcls", "zzz"], "there is no command 'zzz'; allowed: train, train-builtin, conv"),
    "an option before the command": (["imgcls", "--resume"], "there is no command '--resume'"),
    "unknown option of a command": (["imgcls", "train", "--dat", "d", "--resum3"], "there is no option --resum3"),
    "an option that might be either": (["train_net", "--num", "2"], "no option --num; did you mean --num-gpus?"),
    "a config before --config-file": (
        ["train_net", "b.yaml", "--config-file", QUICK],
        "configs come right behind --config-file FILE: b.yaml stands where a KEY should",
    ),
    "a config behind the pairs": (
        ["train_net", "--config-file", QUICK, "SEED", "1", "b.yml"],
        "b.yml stands where a KEY should",
    ),
    "configs in two places": (["train_net", "--config-file", QUICK, "--config-file", "b.yaml"], "is given twice"),
    "no such second config": (["train_net", "--config-file", QUICK, "quick/digit.yaml"], "got 'quick/digit.yaml'"),
    "an unknown key in the second config": (["train_net", "--config-file", QUICK, TYPO], f"SOLVER.MAX_ITR in {TYPO}"),
    "a wrong type in the first config": (["train_net", "--config-file", TYPE, QUICK], f"SOLVER.MAX_ITER in {TYPE}"),
    "a missing checkpoint": (
        ["train_net", "--config-file", QUICK, "--resume", "gone.pth"],
        "--resume gone.pth does not exist; name a checkpoint (there is none), or say --resume alone",
    ),
    "a folder for a checkpoint": (["train_net", "--config-file", QUICK, "--resume", "/"], "--resume / is a folder"),
    "one process for several GPUs": (
        ["train_net", "--config-file", QUICK, "--data-parallel", "OUTPUT_DIR", "my run"],
        f"tools/train_net.py --config-file {QUICK} OUTPUT_DIR 'my run'\n",
    ),
    "the same, with a number": (
        ["imgcls", "train", "--num-gpus", "4", "--resume", "--data-parallel", "SOLVER.BASE_LR", "-1e-3"],
        "torchrun --standalone --nproc_per_node=4 -m imgcls train --resume SOLVER.BASE_LR -1e-3\n",
    ),
    "the same, in the package": (
        ["imgcls", "train", "--data", "d", "--data-parallel"],
        "torchrun --standalone --nproc_per_node=2 -m imgcls train --data d\n",
    ),
    "no such option where there are no ranks": (["show_data", "--data-parallel"], "there is no option --data-parallel"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = MISTAKES[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, text in BAD.items():
        Path(name).write_text(text)
    code, out, err = run(*words)
    assert code == 2 and "Traceback" not in out  # what is logged before goes to stdout
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert list((tmp_path / "here").iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "imgcls", "trian"), "there is no command 'trian'"),
        (("tools/train_net.py", "--config-file", QUICK, "SOLVER.BASE_LR"), "the last override has no value"),
    ],
)
def test_a_mistake_in_a_process_of_its_own(words: tuple[str, ...], message: str, command: Callable[..., Any]) -> None:
    told = command(*words)
    assert (told.returncode, told.stdout) == (2, "")
    assert message in told.stderr and told.stderr.count("\n") == 1


def test_what_one_line_is_for() -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error, code in ((ValueError("bad"), 2), (FileNotFoundError("gone"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as end:
            one_line_errors(fail)(error)
        assert end.value.code == code
    with pytest.raises(KeyError, match="a mistake of ours"):  # which deserves its traceback
        one_line_errors(fail)(KeyError("a mistake of ours"))
    assert one_line_errors(lambda: 3)() == 3


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCLS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nothing says what to train"):
        train.main([])
    with pytest.raises(ValueError, match=r"there is no file gone\.pth"):
        convert.main(["--weights", "gone.pth", "--output", "o.pth"])


# ------------------------------------------------------------------------------------------------------------ recipes


def config(*words: object) -> CfgNode:
    return training_config(parse(train.parser(), list(map(str, words))))


def sets_of(cfg: CfgNode) -> list[str]:
    return [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]


def test_a_folder_of_small_images(tmp_path: Path) -> None:
    cfg = config("--data", write_image_folder(tmp_path, {"ant": 10, "bee": 10}, side=32))
    assert sets_of(cfg) == [f"folder:{tmp_path}#train", f"folder:{tmp_path}#val"]
    assert (cfg.INPUT.TRAIN_SIZE, cfg.INPUT.TEST_SIZE, cfg.INPUT.TEST_RESIZE) == (32, 32, 0)
    assert cfg.INPUT.TRAIN_TRANSFORMS == [["resize"], ["random_crop", 4], ["horizontal_flip", 0.5]]
    assert (cfg.MODEL.BACKBONE.STEM, cfg.MODEL.BACKBONE.VARIANT) == ("small", "mobilenet_v1_1.0")
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.MAX_EPOCHS, cfg.MODEL.WEIGHTS) == ("ClsNet", 60.0, "")


def test_a_folder_of_large_images(tmp_path: Path) -> None:
    cfg = config("--data", write_image_folder(tmp_path, {"train/ant": 2, "val/ant": 1}, side=100))
    assert sets_of(cfg) == [f"folder:{tmp_path}/train", f"folder:{tmp_path}/val"]
    assert (cfg.INPUT.TRAIN_SIZE, cfg.INPUT.TEST_SIZE, cfg.INPUT.TEST_RESIZE) == (224, 224, 256)
    assert cfg.INPUT.TRAIN_TRANSFORMS == [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]]
    assert cfg.MODEL.BACKBONE.STEM == "standard"


@pytest.mark.parametrize(("side", "size"), [(28, 28), (64, 64), (65, 224)])
def test_where_small_ends(side: int, size: int, tmp_path: Path) -> None:
    cfg = config("--data", write_image_folder(tmp_path, {"ant": 4}, side=side))
    assert {cfg.INPUT.TRAIN_SIZE, cfg.INPUT.TEST_SIZE} == {size}


def test_the_median_image_decides(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "ant", {"large": 3}, side=90)
    write_image_folder(tmp_path / "ant", {"small": 9}, side=40)
    assert config("--data", tmp_path).INPUT.TRAIN_SIZE == 40


def test_data_beside_a_config_is_the_root_of_its_sets(tmp_path: Path) -> None:
    for name in ("imagenet/resnet50_sgd_90ep.yaml", "cifar10/resnet18_sgd_30ep.yaml", "mnist/mobilenet_v1.yaml"):
        alone, rooted = config("--config-file", f"configs/{name}"), config("--config-file", name, "--data", tmp_path)
        assert ["", str(tmp_path)] == [alone.DATASETS.ROOT, rooted.DATASETS.ROOT]
        assert rooted.DATASETS.TRAIN == alone.DATASETS.TRAIN and rooted.INPUT == alone.INPUT


@pytest.mark.parametrize("name", ["quick/digits_mobilenet_v1.yaml", "folder/from_scratch.yaml", "Base-ClsNet.yaml"])
def test_data_beside_a_config_whose_sets_have_no_root_is_a_folder(name: str, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"ant": 4}, side=32)
    cfg = config("--config-file", name, "--data", tmp_path)
    assert sets_of(cfg) == [f"folder:{tmp_path}#train", f"folder:{tmp_path}#val"]
    assert cfg.DATASETS.ROOT == ""
    assert cfg.INPUT.TRAIN_SIZE == config("--config-file", name).INPUT.TRAIN_SIZE  # the file's own size stays


def test_the_order_of_precedence(tmp_path: Path) -> None:
    """KEY VALUE pairs, then options, then what the images suggest, then the YAML."""
    write_image_folder(tmp_path, {"ant": 4}, side=32)
    recipe = config("--config-file", "folder/from_scratch.yaml")
    assert (recipe.INPUT.TRAIN_SIZE, recipe.MODEL.BACKBONE.STEM) == (224, "standard")
    options = ["--data", tmp_path, "--variant", "resnet18", "--output", "there"]
    cfg = config(*options)
    assert (cfg.INPUT.TRAIN_SIZE, cfg.MODEL.BACKBONE.STEM) == (32, "small")  # the images over the YAML
    assert cfg.MODEL.BACKBONE.VARIANT == "resnet18"  # an option over the YAML
    assert cfg.MODEL.BACKBONE.NAME == "build_imgcls_resnet_backbone"
    assert cfg.OUTPUT_DIR == "there"
    pairs = ["INPUT.TRAIN_SIZE", 48, "MODEL.BACKBONE.VARIANT", "resnet34", "OUTPUT_DIR", "elsewhere"]
    for words in ([*options, *pairs], [*pairs, *options]):
        cfg = config(*words)
        assert cfg.INPUT.TRAIN_SIZE == 48  # over the images
        assert (cfg.MODEL.BACKBONE.VARIANT, cfg.OUTPUT_DIR) == ("resnet34", "elsewhere")  # over the options
        assert cfg.INPUT.TEST_SIZE == 32


def test_names_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    cfg = config("--config-file", "imagenet/resnet50_sgd_90ep.yaml", "--data", "2012", "--output", "1")
    assert (cfg.DATASETS.ROOT, cfg.OUTPUT_DIR) == ("2012", "1")
    odd = write_image_folder(tmp_path / 'it\'s (mine), "really"', {"ant": 4})
    assert sets_of(config("--data", odd)) == [f"folder:{odd}#train", f"folder:{odd}#val"]


def test_parsers_are_plain_argparse() -> None:
    assert isinstance(train.parser(builtin=True), argparse.ArgumentParser)
    assert parse(train.parser(builtin=True), []).builtin and not parse(train.parser(), []).builtin
