"""The collector of checks and the tables of what each key may hold."""

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg

from imgcls.config import checks
from imgcls.config.checks import (
    ANY_CONFIG,
    CLASSIFIER,
    OUR_BACKBONE,
    all_problems,
    check_keys,
    check_test_crop,
    register_check,
    require_sound,
)
from imgcls.config.defaults import add_imgcls_config
from imgcls.config.loading import load_config
from imgcls.structures.problem import Problem

ZOO = Path(str(files("detectron2") / "model_zoo" / "configs"))
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def only_these_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks that other packages registered, and without ours left behind."""
    monkeypatch.setattr(checks, "_checks", {})
    for check in (check_keys, check_test_crop):
        register_check(check)


def classifier(**keys: Any) -> CfgNode:
    cfg = add_imgcls_config(get_cfg())
    cfg.MODEL.META_ARCHITECTURE = "ClsNet"
    for key, value in keys.items():
        put(cfg, key.replace("__", "."), value)
    return cfg


def put(cfg: CfgNode, key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    assert leaf in node
    node[leaf] = value


# Key -> values that must be refused, values that must pass (the ends of the range among both).
EPOCHS = ([-0.1, NAN, INF, None], [0, 0.0, 0.5, 90.0])
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "SOLVER.IMS_PER_BATCH": ([0, -1, 1.0, True, None], [1, 4096]),
    "SOLVER.BASE_LR": ([-1e-9, NAN, INF, -INF, None, "0.1", True], [0.0, 0, 1e-8, 10.0]),
    "SOLVER.MAX_ITER": ([0, -5, None], [1, 10**7]),
    "SOLVER.CHECKPOINT_PERIOD": ([0, -1], [1]),
    "SOLVER.WARMUP_ITERS": ([-1, 0.5], [0, 1]),
    "SOLVER.STEPS": ([(2, 1), (1, 1), (-1,), ("1",), 3, (1.5,)], [(), (1,), [1, 2], (0, 5)]),
    "SOLVER.MOMENTUM": ([-0.1, 1.0, NAN], [0.0, 0.9, 0.9999]),
    "SOLVER.WEIGHT_DECAY": ([-1e-9, NAN, INF], [0.0, 1e-4]),
    "SOLVER.MAX_EPOCHS": EPOCHS,
    "SOLVER.WARMUP_EPOCHS": EPOCHS,
    "SOLVER.STEPS_EPOCHS": ([[0], [2, 1], [1, 1], [NAN], [-1], 3.0], [[], [0.5, 30], (1, 2)]),
    "SOLVER.CHECKPOINT_EPOCHS": EPOCHS,
    "SOLVER.CHECKPOINT_KEEP": ([0, -1], [1]),
    "SOLVER.CHECKPOINT_KEEP_EVERY": ([-1, 0.5], [0, 5]),
    "SOLVER.CHECKPOINT_KEEP_EVERY_EPOCHS": ([-0.1], [0.0, 2.5]),
    "SOLVER.LOG_PERIOD": ([0], [1]),
    "TEST.EVAL_PERIOD": ([-1, 0.5], [0, 1]),
    "TEST.EVAL_EPOCHS": EPOCHS,
    "DATALOADER.NUM_WORKERS": ([-1, 1.0], [0, 64]),
    "DATALOADER.ON_ERROR": (["", "ignore", True], ["raise", "skip"]),
    "DATALOADER.MAX_BAD_SHARE": ([-0.1, 1.1, NAN, None], [0, 0.0, 0.5, 1, 1.0]),
    "DATALOADER.SAMPLING": (["", "random"], ["shuffle", "balanced", "weighted"]),
    "DATALOADER.SHUFFLE_BLOCK": ([-1, 0.5], [0, 4]),
    "DATALOADER.REPEATS": ([0, 1.5], [1, 3]),
    "INPUT.MAX_PIXELS": ([0, 1e6, 10**9], [1, 64_000_000]),
    "INPUT.TRAIN_SIZE_STEPS": ([3, [3], [[0]], [[1, 96], [1, 128]], [[-1, 96]], [[0, 0]]], [[], [[0, 96], [2.5, 128]]]),
    "INPUT.VIEWS": (
        [2, [2], [[2, 32]], [[0, 32, "a"]], [[2, 0, "a"]], [[2, 32, 3]], [[1.5, 32, []]], {"a": 1}],
        [[], [[2, 224, "simclr"]], [[2, 224, [["resize"]]], [6, 96, "a"]], ((1, 32, ()),)],
    ),
    "MODEL.BACKBONE.STEM": (["", "Standard", "tiny"], ["standard", "small"]),
    "MODEL.BACKBONE.NORM": (
        ["", "bn", "ln", "frozen"],
        ["auto", "BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN", "LN", "none"],
    ),
    "MODEL.BACKBONE.FREEZE_AT": ([-1, 2.0, None], [0, 5]),
    "MODEL.PIXEL_MEAN": ([[NAN], [-1.0], 3.0, ["0"]], [[0.0], [103.5, 116.3, 123.7]]),
    "MODEL.PIXEL_STD": ([[0.0, 1.0, 1.0], [NAN], [-1.0], [INF]], [[1.0], [58.4, 57.1, 57.4]]),
    "SOLVER.GAMMA": ([0.0, -1.0, NAN], [0.1, 0.97]),
    "SOLVER.NUM_DECAYS": ([-1, 1.5], [0, 3]),
    "SOLVER.BASE_LR_END": ([-1e-6, NAN], [0.0, 1e-5]),
    "SOLVER.WARMUP_METHOD": (["", "Linear", "linearr"], ["linear", "constant"]),
    "SOLVER.WARMUP_FACTOR": ([-0.1, INF], [0.0, 0.001, 1]),
    "SOLVER.WEIGHT_DECAY_NORM": ([-1e-4, NAN, "no"], [0.0, 1e-4, None]),
    "SOLVER.WEIGHT_DECAY_BIAS": ([-1e-4, INF], [0.0, 1e-4, None]),
    "SOLVER.BIAS_LR_FACTOR": ([-1.0, NAN], [0.0, 1.0, 2]),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (["", "l1", "Norm"], ["value", "norm", "full_model", "adaptive"]),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ([0.0, -1.0, INF], [0.01, 5]),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ([0.0, -2.0, NAN, -INF], [1, 2.0, INF]),
    "SOLVER.DECAY_EPOCHS": EPOCHS,
    "SOLVER.DECAY_ITERS": ([0, 1.5], [1, 100]),
    "SOLVER.POLYNOMIAL_POWER": ([0, -1.0, NAN], [0.5, 1, 2.0]),
    "SOLVER.RESTART_CYCLES": ([0, 1.5], [1, 10]),
    "SOLVER.RESTART_GROWTH": ([0, -1.0, INF], [0.5, 1.0, 2]),
    "SOLVER.PLATEAU_PATIENCE": ([-1, 0.5], [0, 5]),
    "SOLVER.LR_SCHEDULER_NAME": (
        ["", "WarmupPolyLR", "warmupcosinelr"],
        ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"],
    ),
    "SOLVER.OPTIMIZER": (["sgd", "Lamb", ""], ["SGD", "AdamW", "LAMB"]),
    "SOLVER.SQUARE_DECAY": ([1.0, -0.1, NAN], [0.0, 0.99]),
    "SOLVER.EPS": ([-1e-8, NAN], [0.0, 1e-3]),
    "SOLVER.LAYER_DECAY": ([0.0, 1.1, NAN], [0.65, 1, 1.0]),
    "SOLVER.ACCUMULATE": ([0, 1.5], [1, 8]),
    "SOLVER.EARLY_STOP.PATIENCE": ([-1, 2.0], [0, 5]),
    "SOLVER.EARLY_STOP.MIN_DELTA": ([-0.1, NAN, INF], [0, 0.05]),
    "TEST.PRECISE_BN.NUM_ITER": ([0, 1.5], [1, 200]),
    "SOLVER.EMA.DECAY": ([1.0, -0.1, NAN], [0.0, 0.9999]),
    "SOLVER.SWA.START": ([1.0, -0.1, NAN], [0, 0.75]),
    "SOLVER.SWA.PERIOD_EPOCHS": EPOCHS,
    "SOLVER.SWA.PERIOD": ([0, 1.5], [1, 500]),
    "SOLVER.SWA.LR": ([-0.1, INF], [0.0, 0.05]),
    "SOLVER.SWA.ANNEAL": ([-0.1, 1.1], [0.0, 0.05, 1]),
    "SOLVER.NON_FINITE": (["", "ignore"], ["stop", "skip"]),
    "SOLVER.NON_FINITE_MOST": ([-1, 0.5], [0, 10]),
    "SOLVER.LR_FOR_BATCH": ([-1, 0.5], [0, 256]),
    "SOLVER.LR_SCALING": (["", "cubic"], ["linear", "sqrt"]),
    "SOLVER.WRITERS": (["mlflow", ["tensorbord"], [""]], [[], ["tensorboard"], ("mlflow", "wandb")]),
    "SOLVER.BETAS": (
        [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, NAN], 0.9, [0.9] * 3],
        [[0.0, 0.999], (0.9, 0.95)],
    ),
    "SOLVER.CPU_SETTINGS": (["on", "", True], ["auto", "off", "decided"]),
    "SOLVER.AMP.DTYPE": (["fp16", "float32", ""], ["float16", "bfloat16"]),
    "SOLVER.PARALLEL": (["FSDP2", "fsdp", ""], ["ddp", "fsdp2"]),
    "MODEL.COMPILE": (
        ["inductor", "max-autotune-no-cudagraphs", True],
        ["", "default", "reduce-overhead", "aot_eager"],
    ),
    "TEST.IMS_PER_BATCH": ([0, -1, 1.5], [1, 512]),
    "DATASETS.HOLD_OUT": ([0, 0.0, 1, 1.0, -0.1, NAN, None], [0.1, 0.5, 0.999]),
    "DATASETS.SPLIT_SEED": ([-1, 0.5, None], [0, 7]),
    "DATALOADER.TIMEOUT": ([-1, NAN], [0, 120]),
    "DATALOADER.PACKING": (["", "list"], ["tensors", "dicts"]),
    "MODEL.HEAD.NUM_CLASSES": ([-1, 10.0], [0, 1, 1000]),
    "MODEL.HEAD.AUX_WEIGHT": ([-0.1, NAN], [0.0, 0.3]),
    "MODEL.BACKBONE.DROP_PATH": ([-0.1, 1.0, NAN], [0.0, 0.2]),
    "MODEL.BACKBONE.OUTPUT_STRIDE": ([0, 4, 64], [8, 16, 32]),
    "MODEL.BACKBONE.PRETRAIN_SIZE": ([-1, 2.5], [0, 384]),
    "MODEL.BACKBONE.WINDOW_SIZE": ([-1, 2.5], [0, 14]),
    "MODEL.HEAD.DROPOUT": ([-0.1, 1.0, NAN], [0.0, 0.999, -1.0]),
    "MODEL.LOSS.LABEL_SMOOTHING": ([-0.1, 1.0, NAN], [0.0, 0.1]),
    "MODEL.LOSS.TARGET_THRESHOLD": ([-0.1, 1.0, NAN], [0.0, 0.2]),
    "MODEL.LOSS.CLASS_WEIGHTS": ([["even"], [1.0, 0.0], [NAN], "balanced"], [[], ["balanced"], [0.5, 2.0]]),
    "MODEL.LOSS.POS_WEIGHTS": ([["even"], [1.0, -1.0], [INF], 3.0], [[], ["balanced"], (0.5, 20)]),
    "MODEL.LOSS.GAMMA": ([-0.5, INF, None], [0.0, 2.0, 5]),
    "MODEL.LOSS.ALPHA": ([-0.5, 1.0, NAN], [-1.0, 0.0, 0.25]),
    "MODEL.LOSS.GAMMA_POS": ([-1.0, NAN], [0.0, 1.0]),
    "MODEL.LOSS.GAMMA_NEG": ([-1.0, NAN], [0.0, 4.0]),
    "MODEL.LOSS.CLIP": ([-0.05, 1.0, NAN], [0.0, 0.05]),
    "MODEL.DISTILL.SIZE": ([-1, 224.0], [0, 224]),
    "MODEL.DISTILL.KIND": (["", "Soft"], ["soft", "hard"]),
    "MODEL.DISTILL.ALPHA": ([-0.1, 1.1, NAN], [0.0, 0.5, 1]),
    "MODEL.DISTILL.TEMPERATURE": ([0.0, -1.0, INF], [0.5, 1, 4.0]),
    "TEST.METRIC": (["", "accuracy", "map"], ["auto", "top1", "mAP", "loss"]),
    "INPUT.TRAIN_SIZE": ([0, -1, 224.0], [1, 224]),
    "INPUT.TEST_SIZE": ([0, -1], [1, 224]),
    "INPUT.TEST_RESIZE": ([-1, 256.0], [0, 256]),
    "INPUT.MIXUP_ALPHA": ([-0.1, NAN, INF, None], [0, 0.0, 0.2, 1.0]),
    "INPUT.CUTMIX_ALPHA": ([-0.1, NAN, "1"], [0.0, 1.0, 5]),
    "INPUT.MIX_PROB": ([-0.1, 1.1, NAN, True], [0, 0.0, 0.5, 1.0]),
    "INPUT.MIX_SWITCH_PROB": ([-0.1, 1.1, None], [0.0, 0.5, 1]),
    "INPUT.TRAIN_DECODE": (["", "Fast", "pillow"], ["fast", "exact"]),
    "INPUT.TEST_DECODE": (["", "Exact", "pillow"], ["fast", "exact"]),
    "INPUT.INTERPOLATION": (["", "Bilinear", "lanczos"], ["nearest", "bilinear", "bicubic"]),
}
WRONG = [(key, value) for key, (wrong, _) in VALUES.items() for value in wrong]
RIGHT = [(key, value) for key, (_, right) in VALUES.items() for value in right]


def test_the_values_here_cover_the_tables() -> None:
    assert set(VALUES) == set(ANY_CONFIG) | set(OUR_BACKBONE) | set(CLASSIFIER)
    assert sum(map(len, (ANY_CONFIG, OUR_BACKBONE, CLASSIFIER))) == len(VALUES)  # no key in two tables


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    cfg = classifier()
    put(cfg, key, value)
    (problem,) = all_problems(cfg)
    assert problem.key == key and problem.allowed
    assert problem.value is value


@pytest.mark.parametrize(("key", "value"), RIGHT, ids=str)
def test_a_value_in_range_passes(key: str, value: Any) -> None:
    cfg = classifier()
    put(cfg, key, value)
    assert all_problems(cfg) == []


def test_the_allowed_values_are_told_in_words() -> None:
    cfg = classifier(SOLVER__LR_SCALING="log", SOLVER__MOMENTUM=1.5, MODEL__BACKBONE__FREEZE_AT=-9)
    assert sorted(map(str, all_problems(cfg))) == [
        "the value is out of range: got 'log'; allowed: linear, sqrt; change SOLVER.LR_SCALING",
        "the value is out of range: got -9; allowed: a whole number >= 0; change MODEL.BACKBONE.FREEZE_AT",
        "the value is out of range: got 1.5; allowed: a number >= 0 and < 1; change SOLVER.MOMENTUM",
    ]


@pytest.mark.parametrize(("resize", "size", "sound"), [(0, 224, True), (224, 224, True), (223, 224, False)])
def test_the_crop_fits_into_the_resized_image(resize: int, size: int, sound: bool) -> None:
    problems = all_problems(classifier(INPUT__TEST_RESIZE=resize, INPUT__TEST_SIZE=size))
    assert [str(problem) for problem in problems] == (
        []
        if sound
        else [
            "the centre crop is larger than the image: got 223; "
            "allowed: 0 (no crop), or at least INPUT.TEST_SIZE 224; change INPUT.TEST_RESIZE"
        ]
    )


def test_no_stock_config_is_complained_about() -> None:
    paths = sorted(ZOO.rglob("*.yaml"))
    assert len(paths) == 92
    for path in paths:
        assert all_problems(load_config(path)) == [], path
    assert all_problems(get_cfg()) == [] and all_problems(add_imgcls_config(get_cfg())) == []


def test_classification_keys_are_checked_in_classification_only() -> None:
    detector = add_imgcls_config(get_cfg())
    detector.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"  # a project's own
    detector.INPUT.TEST_RESIZE = -1
    detector.MODEL.BACKBONE.FREEZE_AT = -9
    assert all_problems(detector) == []
    detector.MODEL.BACKBONE.NAME = "build_imgcls_fpn_backbone"
    assert [problem.key for problem in all_problems(detector)] == ["MODEL.BACKBONE.FREEZE_AT"]
    detector.MODEL.META_ARCHITECTURE = "ClsNet"
    assert {problem.key for problem in all_problems(detector)} == {
        "MODEL.BACKBONE.FREEZE_AT",
        "SOLVER.LR_SCHEDULER_NAME",
        "INPUT.TEST_RESIZE",
    }


def test_a_detector_is_checked_where_every_run_is() -> None:
    detector = get_cfg()
    detector.SOLVER.BASE_LR = NAN
    assert [problem.key for problem in all_problems(detector)] == ["SOLVER.BASE_LR"]


# ---------------------------------------------------------------------------------------------- the collector


def test_all_problems_come_in_one_error_one_a_line() -> None:
    cfg = classifier(SOLVER__MAX_ITER=-5, SOLVER__CHECKPOINT_PERIOD=0, DATALOADER__NUM_WORKERS=-1)
    with pytest.raises(ValueError, match=r"MAX_ITER\n.*CHECKPOINT_PERIOD\n.*NUM_WORKERS") as caught:
        require_sound(cfg)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all("; allowed: " in line and "; change " in line for line in lines)
    require_sound(classifier())  # the twin


def test_a_registered_check_is_asked_once_and_in_order() -> None:
    asked: list[int] = []

    @register_check
    def check_of_a_test(cfg: CfgNode) -> list[Problem]:
        asked.append(cfg.SEED)
        return [Problem("the seed is dull", cfg.SEED, "42", "SEED")] if cfg.SEED != 42 else []

    assert register_check(check_of_a_test) is check_of_a_test  # as when a module is loaded twice
    cfg = classifier(SOLVER__MAX_ITER=0)
    assert [problem.key for problem in all_problems(cfg)] == ["SOLVER.MAX_ITER", "SEED"]
    assert asked == [-1]
    with pytest.raises(ValueError, match="seed is dull: got -1; allowed: 42; change SEED"):
        require_sound(cfg)
    assert all_problems(classifier(SEED=42)) == []


def test_twin_a_check_that_is_not_registered_is_not_asked() -> None:
    def silent(cfg: CfgNode) -> list[Problem]:
        raise AssertionError("asked")

    require_sound(classifier())
    register_check(silent)
    with pytest.raises(AssertionError, match="asked"):
        require_sound(classifier())


def test_a_missing_key_is_nobodys_problem_but_a_wrong_one_is() -> None:
    cfg = classifier()
    del cfg.MODEL["HEAD"]
    assert all_problems(cfg) == []
