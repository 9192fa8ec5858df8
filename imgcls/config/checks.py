"""The collector of checks, and the checks of single keys: tables of what each key may hold.

Every package registers its own checks with `register_check`; before anything is built, `require_sound` runs
them all and reports every problem at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Any

from detectron2.config import CfgNode

from imgcls.structures.problem import Problem

Check = Callable[[CfgNode], list[Problem]]

_checks: dict[str, Check] = {}


def register_check(check: Check) -> Check:
    """Decorator: have ``check(cfg)`` asked for problems before anything is built.

    Known by module and name, so that a module loaded twice does not report twice.
    """
    _checks[f"{check.__module__}.{check.__qualname__}"] = check
    return check


def all_problems(cfg: CfgNode) -> list[Problem]:
    """What every registered check finds wrong with ``cfg``, in the order of registration."""
    return [problem for check in _checks.values() for problem in check(cfg)]


def require_sound(cfg: CfgNode) -> None:
    """Raise one ``ValueError`` that lists every problem of ``cfg``, one a line."""
    problems = all_problems(cfg)
    if problems:
        raise ValueError("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Limit:
    """What a key may hold, in words and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def whole(low: int, high: float = inf) -> Limit:
    """A whole number from ``low`` to ``high``, both included."""
    text = f"a whole number >= {low}" if high == inf else f"a whole number from {low} to {high}"
    return Limit(text, lambda value: type(value) is int and low <= value <= high)


def from_zero(below: float = inf) -> Limit:
    """A finite number that is at least 0 and less than ``below``."""
    text = "a finite number >= 0" if below == inf else f"a number >= 0 and < {below:g}"
    return Limit(text, lambda value: _is_number(value) and 0 <= value < below)


def share() -> Limit:
    """A number from 0 to 1, both included."""
    return Limit("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)


def above_zero() -> Limit:
    """A finite number greater than 0."""
    return Limit("a finite number > 0", lambda value: _is_number(value) and value > 0)


def one_of(*values: object) -> Limit:
    """One of the values; names are spelt exactly so."""
    return Limit(", ".join(map(str, values)), lambda value: value in values)


def either(special: object, limit: Limit) -> Limit:
    """The one value ``special``, which has a meaning of its own, or what holds ``limit``."""
    return Limit(f"{special}, or {limit.allowed}", lambda value: value == special or limit.holds(value))


def each(limit: Limit, count: int | None = None, *, rising: bool = False) -> Limit:
    """A list of ``count`` values (None: any number) that hold ``limit`` each, and rise strictly if asked."""
    number = "a list" if count is None else f"{count} values"
    text = f"{number}{', rising' if rising else ''}, each {limit.allowed}"

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and count in (None, len(value))
            and all(limit.holds(item) for item in value)
            and (not rising or all(a < b for a, b in pairwise(value)))
        )

    return Limit(text, holds)


def _are_size_steps(rows: Any) -> bool:
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        return False
    epochs = [row[0] for row in rows]
    return each(from_zero(), rising=True).holds(epochs) and all(whole(1).holds(side) for _, side in rows)


def _are_views(rows: Any) -> bool:
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) and len(row) == 3 for row in rows):
        return False
    return all(each(whole(1)).holds(row[:2]) and isinstance(row[2], str | list | tuple) for row in rows)


# True of any run that detectron2 can make, a stock detector's included.
ANY_CONFIG: dict[str, Limit] = {
    "SOLVER.IMS_PER_BATCH": whole(1),
    "SOLVER.BASE_LR": from_zero(),  # 0 is allowed: nothing may move then, and tests ask for that
    "SOLVER.MAX_ITER": whole(1),
    "SOLVER.CHECKPOINT_PERIOD": whole(1),
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.STEPS": each(whole(0), rising=True),
    "SOLVER.MOMENTUM": from_zero(below=1),
    "SOLVER.WEIGHT_DECAY": from_zero(),
    "SOLVER.MAX_EPOCHS": from_zero(),
    "SOLVER.WARMUP_EPOCHS": from_zero(),
    "SOLVER.STEPS_EPOCHS": each(above_zero(), rising=True),
    "SOLVER.CHECKPOINT_EPOCHS": from_zero(),
    "SOLVER.CHECKPOINT_KEEP": whole(1),
    "SOLVER.CHECKPOINT_KEEP_EVERY": whole(0),
    "SOLVER.CHECKPOINT_KEEP_EVERY_EPOCHS": from_zero(),
    "SOLVER.LOG_PERIOD": whole(1),
    "TEST.EVAL_PERIOD": whole(0),
    "TEST.EVAL_EPOCHS": from_zero(),
    "DATALOADER.NUM_WORKERS": whole(0),
}

# Only where the trunk is ours: another builder may give these keys another meaning.
OUR_BACKBONE: dict[str, Limit] = {
    "MODEL.BACKBONE.STEM": one_of("standard", "small"),
    "MODEL.BACKBONE.NORM": one_of("auto", "BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN", "LN", "none"),
    "MODEL.BACKBONE.FREEZE_AT": whole(0),
    "MODEL.BACKBONE.DROP_PATH": from_zero(below=1),
    "MODEL.BACKBONE.OUTPUT_STRIDE": one_of(8, 16, 32),
    "MODEL.BACKBONE.PRETRAIN_SIZE": whole(0),
    "MODEL.BACKBONE.WINDOW_SIZE": whole(0),
    "MODEL.PIXEL_MEAN": each(from_zero()),
    "MODEL.PIXEL_STD": each(above_zero()),
}

# Only in classification; a detector leaves these keys unread, or reads names of its own there.
CLASSIFIER: dict[str, Limit] = {
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupStepLR", "WarmupExponentialLR"),
        *("WarmupPolynomialLR", "WarmupLinearLR", "WarmupCosineRestartsLR", "WarmupConstantLR"),
        *("OneCycleLR", "PlateauLR"),
    ),
    "SOLVER.GAMMA": above_zero(),
    "SOLVER.NUM_DECAYS": whole(0),
    "SOLVER.BASE_LR_END": from_zero(),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WARMUP_FACTOR": from_zero(),
    "SOLVER.DECAY_EPOCHS": from_zero(),
    "SOLVER.DECAY_ITERS": whole(1),
    "SOLVER.POLYNOMIAL_POWER": above_zero(),
    "SOLVER.RESTART_CYCLES": whole(1),
    "SOLVER.RESTART_GROWTH": above_zero(),
    "SOLVER.PLATEAU_PATIENCE": whole(0),
    "SOLVER.OPTIMIZER": one_of(
        *("SGD", "AdamW", "Adam", "NAdam", "RAdam", "Adagrad", "RMSprop", "RMSpropTF", "LAMB", "LARS", "Lion", "Muon")
    ),
    "SOLVER.SQUARE_DECAY": from_zero(below=1),
    "SOLVER.EPS": from_zero(),
    "SOLVER.WEIGHT_DECAY_NORM": either(None, from_zero()),
    "SOLVER.WEIGHT_DECAY_BIAS": either(None, from_zero()),
    "SOLVER.BIAS_LR_FACTOR": from_zero(),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm", "full_model", "adaptive"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above_zero(),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(inf, above_zero()),
    "SOLVER.LAYER_DECAY": Limit("a number > 0 and <= 1", lambda value: _is_number(value) and 0 < value <= 1),
    "SOLVER.LR_FOR_BATCH": whole(0),
    "SOLVER.ACCUMULATE": whole(1),
    "SOLVER.EARLY_STOP.PATIENCE": whole(0),
    "SOLVER.EARLY_STOP.MIN_DELTA": from_zero(),
    "TEST.PRECISE_BN.NUM_ITER": whole(1),
    "SOLVER.EMA.DECAY": from_zero(below=1),
    "SOLVER.SWA.START": from_zero(below=1),
    "SOLVER.SWA.PERIOD_EPOCHS": from_zero(),
    "SOLVER.SWA.PERIOD": whole(1),
    "SOLVER.SWA.LR": from_zero(),
    "SOLVER.SWA.ANNEAL": share(),
    "SOLVER.NON_FINITE": one_of("stop", "skip"),
    "SOLVER.NON_FINITE_MOST": whole(0),
    "SOLVER.LR_SCALING": one_of("linear", "sqrt"),
    "SOLVER.WRITERS": each(one_of("tensorboard", "mlflow", "wandb")),
    "SOLVER.BETAS": each(from_zero(below=1), 2),
    "SOLVER.CPU_SETTINGS": one_of("auto", "off", "decided"),
    "SOLVER.AMP.DTYPE": one_of("float16", "bfloat16"),
    "SOLVER.PARALLEL": one_of("ddp", "fsdp2"),
    "MODEL.COMPILE": one_of("", "default", "reduce-overhead", "max-autotune", "aot_eager"),
    "TEST.IMS_PER_BATCH": whole(1),
    "TEST.METRIC": one_of(
        "auto", "top1", "top5", "balanced_accuracy", "mAP", "micro_f1", "macro_f1", "subset_accuracy", "loss"
    ),
    "DATASETS.HOLD_OUT": Limit("a number > 0 and < 1", lambda value: _is_number(value) and 0 < value < 1),
    "DATASETS.SPLIT_SEED": whole(0),
    "DATALOADER.TIMEOUT": from_zero(),
    "DATALOADER.ON_ERROR": one_of("raise", "skip"),
    "DATALOADER.MAX_BAD_SHARE": share(),
    "DATALOADER.SAMPLING": one_of("shuffle", "balanced", "weighted"),
    "DATALOADER.SHUFFLE_BLOCK": whole(0),
    "DATALOADER.REPEATS": whole(1),
    "DATALOADER.PACKING": one_of("tensors", "dicts"),
    "MODEL.HEAD.NUM_CLASSES": whole(0),
    "MODEL.HEAD.DROPOUT": either(-1.0, from_zero(below=1)),
    "MODEL.HEAD.AUX_WEIGHT": from_zero(),
    "MODEL.LOSS.LABEL_SMOOTHING": from_zero(below=1),
    "MODEL.LOSS.TARGET_THRESHOLD": from_zero(below=1),
    "MODEL.LOSS.CLASS_WEIGHTS": either(["balanced"], each(above_zero())),
    "MODEL.LOSS.POS_WEIGHTS": either(["balanced"], each(above_zero())),
    "MODEL.LOSS.GAMMA": from_zero(),
    "MODEL.LOSS.ALPHA": either(-1.0, from_zero(below=1)),
    "MODEL.LOSS.GAMMA_POS": from_zero(),
    "MODEL.LOSS.GAMMA_NEG": from_zero(),
    "MODEL.LOSS.CLIP": from_zero(below=1),
    "MODEL.DISTILL.SIZE": whole(0),
    "MODEL.DISTILL.KIND": one_of("soft", "hard"),
    "MODEL.DISTILL.ALPHA": share(),
    "MODEL.DISTILL.TEMPERATURE": above_zero(),
    "INPUT.TRAIN_SIZE": whole(1),
    "INPUT.TEST_SIZE": whole(1),
    "INPUT.TEST_RESIZE": whole(0),
    "INPUT.MAX_PIXELS": whole(1, 178_956_970),  # where Pillow itself refuses
    "INPUT.MIXUP_ALPHA": from_zero(),
    "INPUT.CUTMIX_ALPHA": from_zero(),
    "INPUT.MIX_PROB": share(),
    "INPUT.MIX_SWITCH_PROB": share(),
    "INPUT.TRAIN_SIZE_STEPS": Limit("rows [epoch, side], epochs from 0 on and rising, sides > 0", _are_size_steps),
    "INPUT.VIEWS": Limit("rows [count, side, transforms or policy], counts and sides > 0", _are_views),
    "INPUT.TRAIN_DECODE": one_of("fast", "exact"),
    "INPUT.TEST_DECODE": one_of("fast", "exact"),
    "INPUT.INTERPOLATION": one_of("nearest", "bilinear", "bicubic"),
}


@register_check
def check_keys(cfg: CfgNode) -> list[Problem]:
    """Every key of the tables that apply to this config."""
    classifies = cfg.MODEL.META_ARCHITECTURE == "ClsNet"
    ours = classifies or cfg.MODEL.BACKBONE.NAME.startswith("build_imgcls_")
    applying = [ANY_CONFIG, OUR_BACKBONE if ours else {}, CLASSIFIER if classifies else {}]
    return [problem for table in applying for problem in _outside(cfg, table)]


@register_check
def check_test_crop(cfg: CfgNode) -> list[Problem]:
    """The centre crop of an evaluation must fit into the resized image."""
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet" or _outside(cfg, CLASSIFIER):
        return []
    resize, size = cfg.INPUT.TEST_RESIZE, cfg.INPUT.TEST_SIZE
    if resize == 0 or resize >= size:
        return []
    allowed = f"0 (no crop), or at least INPUT.TEST_SIZE {size}"
    return [Problem("the centre crop is larger than the image", resize, allowed, "INPUT.TEST_RESIZE")]


def _outside(cfg: CfgNode, table: Mapping[str, Limit]) -> list[Problem]:
    return [
        Problem("the value is out of range", value, limit.allowed, key)
        for key, limit in table.items()
        for value in _values(cfg, key)
        if not limit.holds(value)
    ]


def _values(cfg: CfgNode, key: str) -> list[Any]:
    """The value of a dotted key as a list of one; none if the config lacks it, as a stock one lacks ours."""
    node: Any = cfg
    for part in key.split("."):
        if part not in node:
            return []
        node = node[part]
    return [node]
