"""Writing a run's checkpoints: the periodic ones, the best and the last, now or when there is room."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from imgcls.checkpoint import (
    BEST,
    FINAL,
    file_digest,
    is_whole,
    iteration_of,
    point_at,
    prunable,
    prune,
    read_manifest,
    sweep,
    write_checkpoint,
    write_manifest,
)

logger = logging.getLogger(__name__)


class Saving:
    """The checkpoints of ``folder``. Every rank has one; only rank 0 calls :meth:`save`, and all call :meth:`note`.

    What cannot be written (a full disk, a quota, a file system that became read-only) is tried again after 1, 2, 4, ...
    iterations, at most ``period`` apart, while the checkpoints before it stay as they are; the weights of a best
    checkpoint wait in memory.

    keep: how many of the newest periodic checkpoints stay, beside the best and the last one. keep_every: iterations
    from one checkpoint that stays for good to the next; 0: none does. patience: seconds that a save which cannot wait
    for a later iteration is tried for.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_every: int = 0, period: int = 1, patience: float = 20.0
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.period, self.patience = period, patience
        self._owes_newest = False
        self._owed_best: Mapping[str, Any] | None = None
        self._next, self._distance = -1, 1
        self._telling, self._full = False, False  # whether a failure is news; whether the last one was for want of room

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> Saving:
        """That of OUTPUT_DIR, as ``SOLVER.CHECKPOINT_*`` says."""
        node = cfg.SOLVER
        return cls(
            Path(cfg.OUTPUT_DIR),
            keep=node.CHECKPOINT_KEEP,
            keep_every=node.CHECKPOINT_KEEP_EVERY,
            period=node.CHECKPOINT_PERIOD,
        )

    def tidy(self, newest: Path) -> None:
        """Finish the save that a process before this one was killed in, if it was: ``newest`` is what it goes on from.

        Remove temporary files, write the manifest that ``newest`` lacks, point at it, and delete what is old; nothing
        where later ones are damaged, for those would count as the ones to keep.
        """
        with suppress(OSError):  # the next save says what is wrong with the disk
            sweep(self.folder)
            if newest.resolve().parent != self.folder.resolve():
                return
            if read_manifest(newest) is None:
                iteration = iteration_of(newest)
                write_manifest(newest, file_digest(newest), iteration=iteration, kept=self._stays(newest, iteration))
            point_at(newest)
            if all(iteration_of(path) <= iteration_of(newest) for path in prunable(self.folder)):
                prune(self.folder, self.keep)

    def due_again(self, iteration: int) -> bool:
        """Whether what could not be written is to be tried again now; the same on all ranks."""
        return 0 <= self._next <= iteration

    def note(self, iteration: int, owing: bool) -> None:
        """Take up whether something is ``owing`` after ``iteration``, which every rank knows from rank 0."""
        self._distance = min(2 * self._distance, self.period) if owing and self._next >= 0 else 1
        self._next = iteration + self._distance if owing else -1

    def save(
        self, content: Mapping[str, Any], *, saving: bool, last: bool = False, best: bool = False, must: bool = False
    ) -> bool:
        """Write ``content``, a checkpoint's, and what is owed; whether something is owing still.

        saving: as the newest checkpoint; with ``last`` as the run's last one. best: as the best one. must: there is no
        later iteration to try again at; after ``patience`` that is an ``OSError``, as with ``last``.
        """
        if best:
            self._owed_best = content
        self._owes_newest |= saving
        self._telling = saving or best or must
        until = time.monotonic() + (self.patience if last or must else 0.0)
        while not self._write(content, last) and time.monotonic() < until:
            time.sleep(min(1.0, self.patience / 4))
        if self._owed_best is content:
            self._owed_best = _copied(content)  # training goes on with the tensors
        if not self.owing:
            return False
        if last or must:
            raise OSError(
                f"the checkpoint of iteration {content['iteration']} could not be written to {self.folder}; "
                f"{self._what_is_there()}. Make room: --resume goes on from there"
            )
        return True

    @property
    def owing(self) -> bool:
        """Whether something could not be written; known on rank 0."""
        return self._owes_newest or self._owed_best is not None

    def _write(self, content: Mapping[str, Any], last: bool) -> bool:
        """Try all that is owed once; the best first, for the newest tells which is the best."""
        iteration = content["iteration"]
        if self._owed_best is not None and self._written(BEST, self._owed_best):
            if self._owed_best["iteration"] != iteration:
                logger.info("saved %s of iteration %d", self.folder / BEST, self._owed_best["iteration"])
            self._owed_best = None
        if self._owes_newest:
            name = FINAL if last else f"model_{iteration:07d}.pth"
            if self._written(name, content, newest=True, kept=self._stays(Path(name), iteration)):
                self._owes_newest = False
                prune(self.folder, self.keep)
                logger.info("saved %s", self.folder / name)
        self._telling = False
        return not self.owing

    def _stays(self, path: Path, iteration: int) -> bool:
        """Whether a checkpoint is one that stays for good."""
        return path.name != FINAL and self.keep_every > 0 and (iteration + 1) % self.keep_every == 0

    def _written(self, name: str, content: Mapping[str, Any], **how: bool) -> bool:
        iteration, needed = content["iteration"], sum(tensor.nbytes for tensor in _tensors(content))
        if self._full and not self._telling and _free(self.folder) < needed:
            return False
        try:
            sweep(self.folder)
            try:
                write_checkpoint(self.folder / name, content, iteration=iteration, **how)
            except OSError as error:
                if not self._made_room(error):
                    raise
                write_checkpoint(self.folder / name, content, iteration=iteration, **how)
        except OSError as error:
            self._full = _is_for_want_of_room(error)
            if self._telling:
                logger.error(
                    "%s of iteration %d is not saved, it is tried again: %s (%.1f MB needed, %.1f MB free). %s",
                    *(name, iteration, error, needed / 1e6, _free(self.folder) / 1e6, self._what_is_there()),
                )
            return False
        return True

    def _made_room(self, error: OSError) -> bool:
        """Delete now what would be pruned after the save, while there is another one to go on from."""
        old, stay = prunable(self.folder), max(1, self.keep - 1)
        if not _is_for_want_of_room(error) or len(old) <= stay or not is_whole(old[-1]):
            return False
        prune(self.folder, stay)
        return True

    def _what_is_there(self) -> str:
        paths = [path for path in self.folder.glob("model_*.pth") if path.name != BEST]
        newest = max(paths, key=iteration_of, default=None)
        return f"{newest.name} is the newest checkpoint" if newest else "there is no checkpoint before it"


def _is_for_want_of_room(error: OSError) -> bool:
    # What writes a file whole names it in an error of its own.
    return getattr(error.__cause__ or error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _free(folder: Path) -> int:
    """Bytes; 0 where nobody can say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _copied(value: Any) -> Any:
    """The same values in tensors of their own, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value
