"""Which checkpoint ``--resume`` means, and making room for what follows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from imgcls.checkpoint.manifest import is_whole, iteration_of, manifest_path, newest_whole
from imgcls.checkpoint.reading import read_checkpoint

logger = logging.getLogger(__name__)

# False: do not resume. True: from the newest whole checkpoint of OUTPUT_DIR. A path: from that one.
Resume = bool | str | Path

STATE = ("optimizer", "iteration")  # what a run's checkpoint has and a file of weights has not


def checkpoint_to_resume(resume: Resume, folder: Path, *, state: Sequence[str] = STATE) -> Path | None:
    """The checkpoint to go on from; None: begin at iteration 0.

    state: entries that it must have. A named one that is absent, torn or without them is a ``ValueError``.
    """
    if isinstance(resume, bool):
        return newest_whole(folder) if resume else None
    path = Path(resume)
    if not path.is_file():
        is_what = "is a folder" if path.is_dir() else "does not exist"
        beside = sorted(file.name for file in (path if path.is_dir() else path.parent).glob("model_*.pth"))
        there = ", ".join(beside) or "there is none"
        raise ValueError(
            f"--resume {path} {is_what}; name a checkpoint ({there}), or say --resume alone for the newest one in "
            f"OUTPUT_DIR {folder}"
        )
    if not is_whole(path):
        raise ValueError(f"--resume {path}: the file is damaged; name another checkpoint, or say --resume alone")
    require_state(read_checkpoint(path, mmap=path.suffix != ".pkl", check_digest=False), path, state)
    return path


def require_state(content: object, path: Path, state: Sequence[str] = STATE) -> None:
    """Raise ``ValueError`` for a file of weights, such as a converted backbone."""
    if not isinstance(content, dict) or any(name not in content for name in state):
        raise ValueError(
            f"{path} holds weights but no state of an imgcls run; it cannot be resumed. Start another OUTPUT_DIR "
            f"with MODEL.WEIGHTS {path}"
        )


def continues(resume: Resume, folder: Path) -> bool:
    """Whether the run goes on in the folder that its checkpoint lies in, whose results are its own then."""
    return resume if isinstance(resume, bool) else Path(resume).resolve().parent == folder.resolve()


def set_aside_newer(path: Path, folder: Path) -> None:
    """Move the checkpoints of ``folder`` that are of later iterations than ``path`` into a folder of their own.

    They belong to another course of the run: ``--resume`` alone would go on from them later.
    """
    reached = iteration_of(path)
    newer = [file for file in sorted(folder.glob("model_*.pth")) if iteration_of(file) > reached]
    if not newer:
        return
    aside = next(place for place in (folder / f"set_aside_{number}" for number in count(1)) if not place.exists())
    aside.mkdir()
    for file in newer:
        # The manifest first: a kill between the two leaves a whole checkpoint, whose digest is inside.
        for part in (manifest_path(file), file):
            if part.exists():
                part.replace(aside / part.name)
    logger.info("later checkpoints than %s moved to %s: %s", path.name, aside, ", ".join(file.name for file in newer))
