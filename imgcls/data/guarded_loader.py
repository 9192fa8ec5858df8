"""A DataLoader whose faults come out as one error, and which never waits without end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from imgcls.data.mapper import BadFile, MappedDataset, Packed
from imgcls.data.watch import Watch
from imgcls.data.workers import end, is_of_a_transform, kill, worker_error

logger = logging.getLogger(__name__)

# How torch begins to say that its own timeout has passed; there is no exception for it.
TIMED_OUT = "DataLoader timed out"


class BadFiles:
    """The files of a set that could not be read, by name: each is said once, and too many end the run.

    size: of the set. share: of it that may be bad; 0..1.
    """

    def __init__(self, size: int, share: float) -> None:
        self.size, self.share = size, share
        self.reasons: dict[str, str] = {}

    def add(self, files: list[BadFile]) -> None:
        """Take note of ``files``; a ``ValueError`` when they are more than the share."""
        for file in files:
            if file.name not in self.reasons:
                self.reasons[file.name] = file.reason
                logger.warning("left out: %s", file.reason)
        if len(self.reasons) > self.share * self.size:
            raise ValueError(
                f"{len(self.reasons)} of {self.size} images cannot be read, more than the share "
                f"DATALOADER.MAX_BAD_SHARE {self.share:g}; the last one: {list(self.reasons.values())[-1]}. Mend the "
                "data or raise that key"
            )

    def __len__(self) -> int:
        return len(self.reasons)


class Loader:
    """A DataLoader whose faults come out as one ``ValueError`` in the main process, and never as a wait without end.

    bad: the files that could not be read so far, when they are not to end the run.
    left_out: how many samples the latest pass went without.
    """

    def __init__(self, loader: DataLoader, bad: BadFiles) -> None:
        self.loader, self.bad = loader, bad
        self.left_out = 0

    @property
    def dataset(self) -> MappedDataset:
        return self.loader.dataset  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Batches: :class:`~imgcls.structures.Batch`, or what the loader's packing makes."""
        self.left_out = 0
        known = len(self.bad)
        for packed in self._packed():
            if packed.bad:
                self.left_out += packed.left_out
                self.bad.add(packed.bad)
            if packed.fatal:
                raise ValueError(packed.fatal)
            if packed.batch is not None:
                yield packed.batch
        if len(self.bad) > known:
            name, bad = self.dataset.source.name, len(self.bad)
            logger.warning("%s: %d of %d files could not be read", name, bad, self.bad.size)

    def _packed(self) -> Iterator[Packed]:
        """What the workers send; they are ended when the pass ends early, and killed when they hang."""
        workers, whole = iter(self.loader), False
        processes = getattr(workers, "_workers", [])
        # A little later than torch's own, which knows of fewer ways to wait but says in plain words what it waited for.
        watch = Watch(1.1 * self.loader.timeout, lambda: kill(processes))
        try:
            while True:
                packed = _awaited(workers, watch)
                if packed is None:
                    break
                yield packed
            whole = True
        except (RuntimeError, OSError, EOFError) as error:
            end(processes)
            if not self.loader.num_workers or is_of_a_transform(error):
                raise
            late = f"no batch came in {watch.seconds:g} seconds" if watch.fired else ""
            raise worker_error(error, late) from error
        finally:
            watch.close()
            if not whole:
                # Ends workers that were to persist; when the garbage collector does, it waits 5 seconds for each.
                self.loader._iterator = None


def _awaited(workers: Iterator[Packed], watch: Watch) -> Packed | None:
    """What the workers send next, None at the end; torch's timeout is no word against them if we slept through it."""
    while True:
        with watch:
            try:
                return next(workers, None)
            except RuntimeError as error:
                if not (str(error).startswith(TIMED_OUT) and watch.stood_still()):
                    raise
