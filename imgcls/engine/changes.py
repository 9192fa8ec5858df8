"""What changed between a run's checkpoint and its ``--resume``: what may, what is told, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from imgcls.config import add_imgcls_config
from imgcls.config.yaml_reading import parse_yaml, walk

logger = logging.getLogger(__name__)

# FREE: no number of the training depends on it. TOLD: the new value counts from the iteration on at which the run goes
# on, and a warning says so. REFUSED: the state in the checkpoint would mean something else.
FREE, TOLD, REFUSED = "free", "told", "refused"


def _may_move(old: Any, new: Any) -> str:
    """A data set by its path may lie in another folder; by another name it is another one."""
    return TOLD if _last_parts(old) == _last_parts(new) else REFUSED


def _may_not_switch(old: Any, new: Any) -> str:
    """A number whose 0 takes modules out of the network."""
    return TOLD if bool(old) == bool(new) else REFUSED


def _last_parts(names: Sequence[str]) -> list[str]:
    return [str(name).rpartition("/")[2] for name in names]


Rule = str | Callable[[Any, Any], str]

# Patterns of keys and their kind, or what decides between TOLD and REFUSED from the old and the new value; the first
# that matches counts. A key that nobody thought of is TOLD.
POLICY: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    # The network: weights and moments belong to its tensors.
    (_may_not_switch, ("MODEL.HEAD.AUX_WEIGHT",)),
    (TOLD, ("MODEL.BACKBONE.FREEZE_AT", "MODEL.BACKBONE.DROP_PATH", "MODEL.BACKBONE.CHECKPOINT", "MODEL.HEAD.DROPOUT")),
    (FREE, ("MODEL.WEIGHTS", "MODEL.HEAD.RESET")),  # read where a run begins
    (REFUSED, ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.*", "MODEL.HEAD.*", "MODEL.RESNETS.*")),
    (REFUSED, ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT")),
    # The order of the samples: position = iteration x batch + place, in epochs of the whole set.
    (_may_move, ("DATASETS.TRAIN",)),
    (REFUSED, ("SEED", "SOLVER.IMS_PER_BATCH", "DATASETS.HOLD_OUT", "DATASETS.SPLIT_SEED")),
    (REFUSED, ("DATALOADER.SAMPLING", "DATALOADER.SHUFFLE_BLOCK", "DATALOADER.REPEATS")),
    # What optimizer and average remember.
    (REFUSED, ("SOLVER.OPTIMIZER", "SOLVER.EMA.ENABLED", "SOLVER.SWA.ENABLED")),
    # Where, how often and how fast.
    (FREE, ("VERSION", "OUTPUT_DIR", "CUDNN_BENCHMARK", "VIS_PERIOD", "GLOBAL.*")),
    (FREE, ("DATALOADER.NUM_WORKERS", "DATALOADER.TIMEOUT", "DATALOADER.PACKING", "DATALOADER.TRACE")),
    (FREE, ("DATALOADER.MAX_BAD_SHARE", "INPUT.MAX_PIXELS", "TEST.IMS_PER_BATCH", "TEST.EXPECTED_RESULTS")),
    (FREE, ("SOLVER.CHECKPOINT_*", "SOLVER.LOG_PERIOD", "SOLVER.WRITERS")),
    # Decided by now: into iterations, BASE_LR, AMP and CHANNELS_LAST, which are compared.
    (FREE, ("*_EPOCHS", "SOLVER.LR_FOR_BATCH", "SOLVER.LR_SCALING", "SOLVER.CPU_SETTINGS")),
    # Detectors', which a classifier does not read.
    (FREE, ("MODEL.LOAD_PROPOSALS", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.FPN.*", "MODEL.PROPOSAL_GENERATOR.*")),
    (FREE, ("MODEL.ANCHOR_GENERATOR.*", "MODEL.RPN.*", "MODEL.ROI_*", "MODEL.SEM_SEG_HEAD.*", "MODEL.PANOPTIC_FPN.*")),
    (FREE, ("MODEL.RETINANET.*", "INPUT.MIN_SIZE_*", "INPUT.MAX_SIZE_*", "INPUT.RANDOM_FLIP", "INPUT.CROP.*")),
    (FREE, ("INPUT.MASK_FORMAT", "DATASETS.P*", "DATALOADER.ASPECT_RATIO_GROUPING", "DATALOADER.SAMPLER_TRAIN")),
    (FREE, ("DATALOADER.REPEAT_*", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "SOLVER.REFERENCE_WORLD_SIZE")),
    (FREE, ("TEST.KEYPOINT_OKS_SIGMAS", "TEST.DETECTIONS_PER_IMAGE", "TEST.AUG.*")),
    # Device, precision and memory format: other roundings.
    (TOLD, ("MODEL.DEVICE", "MODEL.CHANNELS_LAST", "SOLVER.AMP.*", "SOLVER.TF32", "SOLVER.ACCUMULATE")),
    (TOLD, ("MODEL.COMPILE", "SOLVER.PARALLEL")),
    # Losses, pictures and figures.
    (TOLD, ("MODEL.LOSS.*", "MODEL.DISTILL.*", "INPUT.*", "DATASETS.ROOT", "DATASETS.TEST", "DATALOADER.ON_ERROR")),
    (TOLD, ("TEST.METRIC", "TEST.EVAL_PERIOD", "TEST.PRECISE_BN.*")),
    # Rates, decays and their course; MAX_ITER below what is done is refused apart.
    (TOLD, ("SOLVER.BASE_LR*", "SOLVER.BIAS_LR_FACTOR", "SOLVER.LAYER_DECAY", "SOLVER.PARAM_OVERRIDES")),
    (TOLD, ("SOLVER.WEIGHT_DECAY*", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.BETAS", "SOLVER.SQUARE_DECAY")),
    (TOLD, ("SOLVER.EPS", "SOLVER.CLIP_GRADIENTS.*", "SOLVER.NON_FINITE", "SOLVER.NON_FINITE_MOST")),
    (TOLD, ("SOLVER.MAX_ITER", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.WARMUP_*", "SOLVER.RESCALE_INTERVAL")),
    (TOLD, ("SOLVER.GAMMA", "SOLVER.STEPS", "SOLVER.NUM_DECAYS", "SOLVER.DECAY_ITERS", "SOLVER.POLYNOMIAL_POWER")),
    (TOLD, ("SOLVER.RESTART_*", "SOLVER.PLATEAU_PATIENCE", "SOLVER.EMA.*", "SOLVER.SWA.*")),
    (TOLD, ("SOLVER.FREEZE", "SOLVER.EARLY_STOP.*")),
)

# With another test set or other pictures of it, the best figure so far cannot be compared with the next.
JUDGED_BY = ("DATASETS.TEST", "INPUT.TEST_*")


@dataclass(frozen=True)
class Change:
    """A key with its value in the checkpoint and the present one, and what that means."""

    key: str
    old: Any
    new: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def rule_for(key: str) -> Rule | None:
    """What the first fitting row of :data:`POLICY` says; None: no row speaks of ``key``."""
    return next((rule for rule, patterns in POLICY if any(fnmatchcase(key, one) for one in patterns)), None)


def changes(cfg: CfgNode, content: Mapping[str, Any], *, images: int) -> list[Change]:
    """How ``cfg``, with everything decided, and ``images`` in its training set differ from what ``content`` tells.

    content: of a checkpoint. A key that it did not know yet had its default value then; nothing is found in one that
    tells no config.
    """
    found = []
    told = content.get("images", 0)
    if images and told and told != images:
        found.append(Change("images of DATASETS.TRAIN", told, images, REFUSED))
    present = cfg.dump()
    if content.get("config", present) == present:
        return found
    old = {**_plain(add_imgcls_config(get_cfg()).dump()), **_plain(content["config"])}
    done = int(content["iteration"]) + 1
    for key, new in _plain(present).items():
        if key in old and old[key] != new:
            found.append(Change(key, old[key], new, _kind_of(key, old[key], new, done)))
    return found


def _plain(text: str) -> dict[str, Any]:
    return {key: value for key, value in walk(parse_yaml(text, "the config")) if not isinstance(value, dict)}


def _kind_of(key: str, old: Any, new: Any, done: int) -> str:
    if key == "SOLVER.MAX_ITER" and new < done:
        return REFUSED
    rule = rule_for(key)
    return rule(old, new) if callable(rule) else rule or TOLD


def with_what_was_decided(cfg: CfgNode, content: Mapping[str, Any]) -> CfgNode:
    """A copy of ``cfg`` in which what the run decided for itself is what ``content``, its checkpoint, tells.

    That is the seed where ``SEED`` leaves it to the run, or its samples would come in another order, and what
    ``SOLVER.CPU_SETTINGS`` chose on a CPU: another one might choose otherwise.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SEED < 0:
        cfg.SEED = int(content.get("seed", cfg.SEED))
    old = _plain(content.get("config", ""))
    if cfg.SOLVER.CPU_SETTINGS != "auto" or old.get("SOLVER.CPU_SETTINGS") != "decided" or old["MODEL.DEVICE"] != "cpu":
        return cfg
    cfg.SOLVER.CPU_SETTINGS = "decided"
    taken = []
    # What is True was asked for; the changes will tell it where it is new.
    if old["SOLVER.AMP.ENABLED"] and not cfg.SOLVER.AMP.ENABLED:
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, old["SOLVER.AMP.DTYPE"]
        taken.append(f"SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE {cfg.SOLVER.AMP.DTYPE}")
    if old["MODEL.CHANNELS_LAST"] and not cfg.MODEL.CHANNELS_LAST:
        cfg.MODEL.CHANNELS_LAST = True
        taken.append("MODEL.CHANNELS_LAST True")
    if taken:
        logger.info("as the run began: %s (SOLVER.CPU_SETTINGS off: as the config says)", " ".join(taken))
    return cfg


def require_resumable(cfg: CfgNode, content: Mapping[str, Any], path: Path, *, images: int) -> list[Change]:
    """:func:`changes`, if none of them is refused; otherwise a ``ValueError`` that lists all that are."""
    found = changes(cfg, content, images=images)
    refused = [str(change) for change in found if change.kind == REFUSED]
    if refused:
        raise ValueError(
            f"{path} (iteration {content['iteration']}) cannot go on with another {'; '.join(refused)}. Take the old "
            f"values (config.yaml beside it), or start another OUTPUT_DIR with MODEL.WEIGHTS {path}"
        )
    return found


def tell(found: Sequence[Change], iteration: int) -> None:
    """Log the changes of a run that goes on with ``iteration``."""
    # Where the run writes is told anyway.
    worth = [change for change in found if change.key != "OUTPUT_DIR"]
    lines = {kind: "; ".join(str(change) for change in worth if change.kind == kind) for kind in (TOLD, FREE)}
    if lines[TOLD]:
        logger.warning("the config has changed; from iteration %d on the new values count: %s", iteration, lines[TOLD])
    if lines[FREE]:
        logger.info("changed, but nothing that is computed: %s", lines[FREE])


def best_stays(found: Sequence[Change]) -> bool:
    """Whether the best figure so far can be compared with those to come."""
    judging = [change for change in found if any(fnmatchcase(change.key, one) for one in JUDGED_BY)]
    return all(change.key == "DATASETS.TEST" and _may_move(change.old, change.new) == TOLD for change in judging)
