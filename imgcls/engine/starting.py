"""Where a run's weights come from: a checkpoint to go on from, weights to begin with, or nothing."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from imgcls.checkpoint import (
    BEST,
    Resume,
    checkpoint_to_resume,
    classifier_weights,
    is_whole,
    iteration_of,
    load_weights,
    notes_of,
    read_checkpoint,
    require_state,
    set_aside_newer,
)
from imgcls.engine.changes import best_stays, require_resumable, tell
from imgcls.engine.ranks.distributed import first_rank_does
from imgcls.engine.ranks.rank_statistics import take_own_statistics
from imgcls.modeling import Trunk, fit_to_input
from imgcls.structures import LoadReport, PreprocessingContract

if TYPE_CHECKING:
    from imgcls.engine.run import Run

logger = logging.getLogger(__name__)


def start(run: Run, resume: Resume) -> None:
    """Go on from the checkpoint named or the newest whole one, or begin with ``MODEL.WEIGHTS``. Collective."""
    folder = Path(run.cfg.OUTPUT_DIR)
    checkpoint = checkpoint_to_resume(resume, folder)
    if checkpoint is not None:
        resume_from(run, checkpoint)
        if not isinstance(resume, bool):
            first_rank_does(partial(set_aside_newer, checkpoint, folder))
        # What the record speaks of may lie in another folder, belong to the course that was left, or never have been
        # written for want of room.
        kept = iteration_of(folder / BEST) if is_whole(folder / BEST) else -1
        run.best = run.best if run.best and kept >= run.best["iteration"] else {}
        first_rank_does(partial(run.saving.tidy, checkpoint))
        return
    if resume:
        logger.warning("--resume: %s has no checkpoint, starting at iteration 0", folder)
    if run.cfg.MODEL.WEIGHTS:
        load_initial(run, run.cfg.MODEL.WEIGHTS)


def load_initial(run: Run, path: str) -> LoadReport:
    """Weights to begin with (a classifier's checkpoint or a converted backbone); a misfit is a ``ValueError``."""
    content = read_checkpoint(path)
    weights = classifier_weights(content)
    if isinstance(run.model.backbone, Trunk):
        weights = fit_to_input(weights, run.model.backbone, "backbone.")
    if not hasattr(run.model.head, "auxiliary"):
        # They serve training only; MODEL.HEAD.AUX_WEIGHT 0 leaves them out.
        weights = {name: value for name, value in weights.items() if not name.startswith("head.auxiliary.")}
    _require_same_contract(run, content, path)
    if run.data.train is None and content.get("thresholds"):
        # Training would make them another network's.
        run.model.thresholds = tuple(content["thresholds"])
    reset = run.cfg.MODEL.HEAD.RESET
    if reset:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    else:
        _require_same_classes(run, notes_of(content), path)
    report = load_weights(run.model, weights, may_be_new=lambda name: reset and name.startswith("head."))
    report.require_complete(
        path,
        "For another data set set MODEL.HEAD.RESET True (a new head); for another network change "
        "MODEL.BACKBONE.VARIANT or MODEL.WEIGHTS",
    )
    logger.info("%s: %s", path, report.summary())
    return report


def resume_from(run: Run, path: Path) -> None:
    """Take over a run's checkpoint, and with it its place in the run; a misfit is a ``ValueError``."""
    content = read_checkpoint(path, check_digest=False)
    require_state(content, path)
    _require_same_classes(run, content, str(path))
    changes = require_resumable(run.cfg, content, path, images=run.data.images)
    _require_same_contract(run, content, str(path))
    # Where an average is kept, "model" is the average: what was evaluated, and what is handed over.
    load_weights(run.model, content.get("live", content["model"])).require_complete(
        str(path), "--resume needs the config that the run began with (config.yaml in its OUTPUT_DIR)"
    )
    run.step.load_state_dict(content)
    if run.step.average is not None and "live" in content:
        run.step.average.load_state_dict(content["model"], content["average_updates"])
    take_own_statistics(run.networks, content.get("statistics_of_ranks", ()))
    run.start_iter = int(content["iteration"]) + 1
    tell(changes, run.start_iter)
    run.best = dict(content["best"]) if best_stays(changes) else {}
    run.owed = dict(content.get("evaluation_due", {}))
    run.freezing.follow(run.step, run.start_iter)
    run.early_stop.load_state_dict(content.get("early_stop", {}))
    logger.info("resuming from %s at iteration %d of %d", path, run.start_iter, run.max_iter)
    if run.early_stop.over and run.start_iter < run.max_iter:
        run.max_iter = run.start_iter
        why = run.early_stop.told()
        logger.warning("nothing is left to train: %s; a larger SOLVER.EARLY_STOP.PATIENCE goes on", why)
    elif run.start_iter >= run.max_iter and not run.owed:
        logger.warning(
            "nothing is left to train: %s has done %d iterations, SOLVER.MAX_ITER is %d",
            path.name,
            run.start_iter,
            run.max_iter,
        )


def _require_same_classes(run: Run, content: dict[str, Any], path: str) -> None:
    theirs = content.get("classes")
    if theirs and tuple(theirs) != run.data.classes:
        raise ValueError(
            f"{path} knows {len(theirs)} classes ({', '.join(theirs[:5])}, ...), the data has "
            f"{len(run.data.classes)} ({', '.join(run.data.classes[:5])}, ...). Change DATASETS.TRAIN, or set "
            "MODEL.HEAD.RESET True to train a new head"
        )


def _require_same_contract(run: Run, content: dict[str, Any], path: str) -> None:
    notes = notes_of(content)
    contract, theirs = notes.get("contract"), notes.get("architecture")
    differences = []
    if contract and len(contract["pixel_mean"]) == len(run.cfg.MODEL.PIXEL_MEAN):
        # Another number of channels has its own mean and std.
        differences = PreprocessingContract.from_dict(contract).differences(run.cfg)
    ours = architecture_of(run.model.backbone)
    # Of a network whose stems differ in stride alone the tensors would fit, and mean something else.
    if theirs and ours and theirs["stem"] != ours["stem"]:
        differences.append(
            f"MODEL.BACKBONE.STEM is {ours['stem']!r} in the config, the weights need {theirs['stem']!r}"
        )
    if differences:
        raise ValueError(f"{path} does not fit the config: {'; '.join(differences)}. Change these keys")


def architecture_of(backbone: nn.Module) -> dict[str, str]:
    """What the checkpoint says of the network; nothing of a backbone that somebody else registered.

    Such a one trains as well as ours; only handing it over needs to know its row.
    """
    return backbone.architecture.to_dict() if isinstance(backbone, Trunk) else {}
