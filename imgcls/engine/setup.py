"""Before training: find every mistake that can be found, then fix what the config left open, then claim the output."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from imgcls.checkpoint import Resume, checkpoint_to_resume, continues, notes_of, read_checkpoint, require_state
from imgcls.config import register_check, require_sound, resolve_durations
from imgcls.data import HoldOut, Source, open_sources
from imgcls.data.workers import is_worker_end
from imgcls.engine.changes import require_resumable, with_what_was_decided
from imgcls.engine.freezing import Freezing
from imgcls.engine.labels import decide_labels
from imgcls.engine.machine.cpu_settings import decide_cpu_settings
from imgcls.engine.machine.memory import is_out_of_memory
from imgcls.engine.machine.precision import set_float32_precision
from imgcls.engine.output.log_file import LogFile, quiet_where_full
from imgcls.engine.output.output_dir import claim
from imgcls.engine.output.provenance import command, describe
from imgcls.engine.ranks.distributed import fault_of_another, first_rank_does
from imgcls.engine.teacher import require_teacher
from imgcls.modeling import is_classifier
from imgcls.solver import parameter_groups, scale_learning_rate
from imgcls.structures import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The sources of a run. train is None when only evaluating, test is None when DATASETS.TEST is empty."""

    train: Source | None
    test: Source | None
    classes: tuple[str, ...]

    @property
    def images(self) -> int:
        """In the training set; 0 when only evaluating."""
        return 0 if self.train is None else len(self.train)


def finalize(cfg: CfgNode, *, eval_only: bool = False) -> tuple[CfgNode, Data]:
    """A copy of ``cfg`` in which everything is decided, and the opened data sets.

    Decided are the device, the seed, the number of classes, what their labels ask for and every length in iterations.
    Mistakes are one ``ValueError`` that lists them all.
    """
    cfg = sound(cfg)
    data = _open_for_evaluation(cfg) if eval_only else _open_for_training(cfg)
    if cfg.DATALOADER.ON_ERROR == "raise":
        # A file that cannot be read would end the run later.
        for source in filter(None, (data.train, data.test)):
            source.check_files()
    decide(cfg, data)
    if data.train is not None:
        require_teacher(cfg, data.classes)
    return cfg, data


def sound(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg`` with the device and the seed decided, all of its checks passed."""
    cfg = cfg.clone()
    cfg.defrost()
    decide_device(cfg)
    if cfg.SEED < 0:
        cfg.SEED = int(comm.shared_random_seed()) % 2**31
    require_sound(cfg)
    scale_learning_rate(cfg)
    return cfg


def decide(cfg: CfgNode, data: Data) -> None:
    """Decide, in place, what depends on the data: classes, what labels ask for, lengths; and precision on CPUs."""
    _decide_classes(cfg, data)
    decide_labels(cfg, data.train, data.test)
    if data.train is not None:
        resolve_durations(cfg, len(data.train))
        decide_cpu_settings(cfg)


def setup(cfg: CfgNode, *, resume: Resume = False, eval_only: bool = False) -> tuple[CfgNode, Data]:
    """:func:`finalize`, then claim OUTPUT_DIR, start the log and write config.yaml and environment.txt. Collective.

    resume: whether the run is to go on from a checkpoint, or from which one; a named one is examined here.
    """
    checkpoint = None if eval_only else checkpoint_to_resume(resume, Path(cfg.OUTPUT_DIR))
    # Only looked at here, before anything is touched; Run.start takes it over.
    content = read_checkpoint(checkpoint, mmap=True, check_digest=False) if checkpoint else {}
    if checkpoint:
        require_state(content, checkpoint)
    cfg, data = finalize(with_what_was_decided(cfg, content), eval_only=eval_only)
    if eval_only:
        start_log("")
    else:
        changes = require_resumable(cfg, content, checkpoint, images=data.images) if checkpoint else []
        first_rank_does(lambda: _require_named(cfg, data))
        first_rank_does(lambda: claim(cfg.OUTPUT_DIR, resume=continues(resume, Path(cfg.OUTPUT_DIR))))
        start_log(cfg.OUTPUT_DIR)
        start = int(content["iteration"]) + 1 if checkpoint else 0
        first_rank_does(lambda: describe(cfg, start, notes="".join(f"changed {change}\n" for change in changes)))
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    set_float32_precision(cfg)
    logger.info("command: %s", command())
    logger.info("seed %d, %d ranks on %s", cfg.SEED, comm.get_world_size(), cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg, data


def _require_named(cfg: CfgNode, data: Data) -> None:
    """Try the patterns of parameter names on a network that is thrown away: what they miss ends a run unwritten."""
    if not (cfg.SOLVER.FREEZE or cfg.SOLVER.PARAM_OVERRIDES):
        return
    here = cfg.clone()
    here.MODEL.DEVICE = "cpu"
    network = build_model(here)
    Freezing.from_cfg(cfg, network, data.images)
    parameter_groups(cfg, network)


def start_log(folder: str) -> None:
    """Log to the console, and to ``folder/log.txt`` unless ``folder`` is empty, for imgcls, detectron2 and fvcore."""
    # detectron2 adds handlers for every new folder: the second run of a process would print each line twice.
    setup_logger.cache_clear()
    rank = comm.get_rank()
    file = LogFile(Path(folder) / (f"log.txt.rank{rank}" if rank else "log.txt")) if folder else None
    for name in ("fvcore", "detectron2", "imgcls"):
        for handler in logging.getLogger(name).handlers[:]:
            logging.getLogger(name).removeHandler(handler)
            handler.close()
        console = setup_logger(distributed_rank=rank, name=name, abbrev_name=name)
        for handler in console.handlers:
            quiet_where_full(handler)
        if file is not None:
            console.addHandler(file)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_not_a_user_error)


def _not_a_user_error(record: logging.LogRecord) -> bool:
    # detectron2's loop logs a traceback of whatever ends it; the command says a user error in one line itself.
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    is_user_error = isinstance(error, (ValueError, OSError))
    return not (is_user_error or is_worker_end(error) or is_out_of_memory(error) or fault_of_another(error))


def decide_device(cfg: CfgNode) -> None:
    """``MODEL.DEVICE`` becomes cpu, in place, where this machine has no such device (cuda, mps)."""
    has_it = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = cfg.MODEL.DEVICE.partition(":")[0]
    if not has_it.get(kind, True):
        logger.info("no GPU here: MODEL.DEVICE %s becomes cpu", cfg.MODEL.DEVICE)
    elif kind == "mps" and comm.get_world_size() > 1:
        logger.info("no ranks on mps: MODEL.DEVICE %s becomes cpu", cfg.MODEL.DEVICE)
    else:
        return
    cfg.MODEL.DEVICE = "cpu"


def _open_for_training(cfg: CfgNode) -> Data:
    train = open_sources(cfg.DATASETS.TRAIN, root=cfg.DATASETS.ROOT, hold_out=HoldOut.from_cfg(cfg))
    return Data(train, _open_test(cfg, train.classes), train.classes)


def _open_for_evaluation(cfg: CfgNode) -> Data:
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only needs the weights to evaluate: add MODEL.WEIGHTS OUTPUT_DIR/model_final.pth")
    # The checkpoint knows its classes: the training set need not be here.
    content = read_checkpoint(cfg.MODEL.WEIGHTS, mmap=True, check_digest=False)
    classes = notes_of(content).get("classes")
    test = _open_test(cfg, tuple(classes) if classes else None)
    if test is None:
        raise Problem("there is nothing to evaluate on", (), "a data set", "DATASETS.TEST").error()
    return Data(None, test, tuple(classes) if classes else test.classes)


def _open_test(cfg: CfgNode, classes: tuple[str, ...] | None) -> Source | None:
    if not cfg.DATASETS.TEST:
        return None
    return open_sources(
        cfg.DATASETS.TEST,
        root=cfg.DATASETS.ROOT,
        classes=classes,
        hold_out=HoldOut.from_cfg(cfg),
        key="DATASETS.TEST",
    )


def _decide_classes(cfg: CfgNode, data: Data) -> None:
    stated = cfg.MODEL.HEAD.NUM_CLASSES
    if stated not in (0, len(data.classes)):
        counted = next(source.name for source in (data.train, data.test) if source is not None)
        allowed = f"0 (count them) or {len(data.classes)}, the classes of {counted}"
        raise Problem("the number of classes is not the data's", stated, allowed, "MODEL.HEAD.NUM_CLASSES").error()
    cfg.MODEL.HEAD.NUM_CLASSES = len(data.classes)


@register_check
def check_classifier(cfg: CfgNode) -> list[Problem]:
    """What training a classifier needs of the config as a whole."""
    if not is_classifier(cfg):
        return []
    problems = []
    if cfg.INPUT.FORMAT != "RGB":
        problems.append(Problem("ClsNet takes RGB only", cfg.INPUT.FORMAT, "RGB", "INPUT.FORMAT"))
    world = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world:
        allowed = f"a multiple of the number of ranks ({world})"
        problems.append(
            Problem("the batch cannot be shared evenly", cfg.SOLVER.IMS_PER_BATCH, allowed, "SOLVER.IMS_PER_BATCH")
        )
    return problems
