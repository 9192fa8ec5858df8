"""A step whose loss or gradient was not finite, kept for looking at and taken again under observation."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from imgcls.checkpoint import write_checkpoint
from imgcls.engine.step import NonFinite, sample_ids
from imgcls.structures import Problem

logger = logging.getLogger(__name__)


def keep(folder: Path, content: dict[str, Any], fault: NonFinite) -> None:
    """Write the state before the step (``replay_*.pth``) and what went into it (``replay_*.json``) into ``folder``.

    content: of a checkpoint of the iteration before. The file is none that --resume would take by itself.
    """
    path = folder / f"replay_{fault.iteration:07d}.pth"
    record = {"iteration": fault.iteration, "seed": content["seed"], "samples": fault.ids, "reason": str(fault)}
    try:
        write_checkpoint(path, content, iteration=fault.iteration - 1)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:  # the fault itself is what the user has to hear of
        logger.warning("the state before the step could not be kept: %s", error)
        return
    logger.error("%s holds the state before that step; --replay %s takes it again", path, path)


def replay(run: Any, path: Path) -> dict[str, Any]:
    """Take the step behind the state in ``path`` again, changing no file: losses, and where numbers stop being finite.

    Returns ``iteration``, ``samples`` (of this rank), ``losses``, ``outputs`` (modules whose output is not finite, in
    the order of the forward pass) and ``gradients`` (parameters whose gradient is not finite).
    """
    if not path.is_file():
        raise Problem("there is no such file", str(path), "a replay_*.pth of OUTPUT_DIR", "--replay").error()
    run.resume_from(path)
    iteration = run.start_iter
    batch = next(iter(run.train_loader()), None)
    if batch is None:
        raise ValueError(
            f"there is no iteration {iteration} to take again: {path} has done {iteration}, SOLVER.MAX_ITER is "
            f"{run.cfg.SOLVER.MAX_ITER}; take the config that the run had"
        )
    # Compiled code would not stop for those who watch.
    with torch.compiler.set_stance("force_eager"), _watched(run.model) as outputs:
        losses = run.step.gradients(batch, iteration)
    bad = [n for n, p in run.model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return {
        "iteration": iteration,
        "rank": comm.get_rank(),
        "samples": sample_ids(batch),
        "losses": {name: float(loss) for name, loss in losses.items()},
        "outputs": outputs,
        "gradients": bad,
    }


def told(found: dict[str, Any]) -> str:
    """What :func:`replay` found, in a few lines."""
    losses = ", ".join(f"{name} {value:g}" for name, value in found["losses"].items())
    lines = [f"iteration {found['iteration']} on rank {found['rank']}: {losses}"]
    lines.append(f"samples: {', '.join(map(str, found['samples']))}")
    for kind, words in (("outputs", "modules whose output is not finite"), ("gradients", "gradients that are not")):
        names = found[kind]
        shown = ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
        lines.append(f"{words}: {shown or 'none'}")
    return "\n".join(lines)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """A list that fills with the names of the modules whose output is not finite."""
    bad: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                bad.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
