"""What is done to a forked trainer before its command begins: where it dies, what it meets, what is broken."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faults.tape import Place, Tape, of_checkpoint, put_in
from imgcls.engine import run as runs
from imgcls.engine.saving import Saving
from imgcls.engine.step import TrainStep
from imgcls.modeling.cls_net import ClsNet


@dataclass(frozen=True)
class Death:
    """At an iteration: before its step or behind it, on one rank."""

    iteration: int
    rank: int
    after: bool


@dataclass(frozen=True)
class NotFinite:
    """A loss, or the gradient of a finite loss, that is NaN in an iteration on one rank."""

    iteration: int
    rank: int
    gradient: bool


@dataclass(frozen=True)
class Sabotage:
    """All of it, for one process; the default leaves the trainer alone.

    run, journal, gone: of a :class:`~faults.tape.Tape` over the folder ``run``, where one is wanted, and dies_at. full:
    of the writes to checkpoints, those numbered first + 1 .. last find no room. patience: seconds, instead of the usual
    ones, that the last save is tried for. pause: seconds that each iteration takes longer. broken: a fault of the
    product's own (``BREAKS``).
    """

    run: Path | None = None
    journal: Path | None = None
    gone: Path | None = None
    dies_at: tuple[Place, int] | None = None
    full: tuple[int, int] = (0, 0)
    death: Death | None = None
    not_finite: NotFinite | None = None
    patience: float = 0.0
    pause: float = 0.0
    broken: str = ""

    def __call__(self, rank: int) -> None:
        """Prepare this process, which is that rank's."""
        if self.run is not None and self.journal is not None and self.gone is not None and rank == 0:
            tape = Tape(
                self.run.absolute(), self.journal, self.gone, dies_at=self.dies_at,
                full=_full_between(*self.full), synced=self.broken != "fsync",
            )  # fmt: skip
            put_in(tape)
            _tell_iterations(tape)
        if self.death is not None and rank == self.death.rank:
            _at_iteration(self.death)
        if self.patience:
            _less_patient(self.patience)
        if self.pause:
            _slow(self.pause)
        if self.not_finite is not None and rank == self.not_finite.rank:
            _poison(self.not_finite)
        if self.broken:
            BREAKS[self.broken]()


def _full_between(first: int, last: int) -> Callable[[str], bool]:
    """Whether the write that is asked about is one that finds the disk full."""
    count = 0

    def full(name: str) -> bool:
        nonlocal count
        if not of_checkpoint(name):
            return False
        count += 1
        return first < count <= last

    return full


def _around(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _tell_iterations(tape: Tape) -> None:
    def make(train_on: Callable[..., Any]) -> Callable[..., Any]:
        def telling(run: Any, batch: Any, iteration: int) -> Any:
            tape.iteration = iteration
            return train_on(run, batch, iteration)

        return telling

    _around(runs.Run, "train_on", make)


def _less_patient(seconds: float) -> None:
    def make(init: Callable[..., Any]) -> Callable[..., Any]:
        return lambda saving, *args, **options: init(saving, *args, **{**options, "patience": seconds})

    _around(Saving, "__init__", make)


def _at_iteration(death: Death) -> None:
    def make(train_on: Callable[..., Any]) -> Callable[..., Any]:
        def dying(run: Any, batch: Any, iteration: int) -> Any:
            if iteration == death.iteration and not death.after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = train_on(run, batch, iteration)
            if iteration == death.iteration:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return dying

    _around(runs.Run, "train_on", make)


def _slow(seconds: float) -> None:
    def make(train_on: Callable[..., Any]) -> Callable[..., Any]:
        def slow(run: Any, batch: Any, iteration: int) -> Any:
            time.sleep(seconds)
            return train_on(run, batch, iteration)

        return slow

    _around(runs.Run, "train_on", make)


def _poison(fault: NotFinite) -> None:
    current = -1

    def numbered(gradients: Callable[..., Any]) -> Callable[..., Any]:
        def noting(step: Any, batch: Any, iteration: int) -> Any:
            nonlocal current
            current = iteration
            return gradients(step, batch, iteration)

        return noting

    def poisoned(forward: Callable[..., Any]) -> Callable[..., Any]:
        def spoiling(network: Any, *args: Any, **options: Any) -> Any:
            found = forward(network, *args, **options)
            if network.training and current == fault.iteration:
                for name, loss in found.items():
                    if fault.gradient:
                        loss.register_hook(lambda gradient: gradient * torch.nan)
                    else:
                        found[name] = loss * torch.nan
            return found

        return spoiling

    _around(TrainStep, "gradients", numbered)
    _around(ClsNet, "forward", poisoned)


# -- faults of the product, which the campaign has to find -------------------------------------------------------------


def _not_atomic() -> None:
    """A rename that copies instead, as shutil.move does from one file system to another."""
    rename = os.replace

    def copying(old: Any, new: Any, **options: Any) -> None:
        if not of_checkpoint(os.path.basename(os.fspath(new))):
            return rename(old, new, **options)
        with open(old, "rb") as source, open(new, "wb", buffering=0) as target:
            while part := source.read(1 << 14):
                target.write(part)
        return os.unlink(old)

    os.replace = copying  # type: ignore[assignment]


def _sampler_restarts() -> None:
    """The order of the samples begins anew with every process, as detectron2's does."""

    def make(build: Callable[..., Any]) -> Callable[..., Any]:
        return lambda cfg, source, start=0: build(cfg, source, start=0)

    _around(runs, "build_train_loader", make)


def _momentum_lost() -> None:
    """A resume that forgets the optimizer's state."""

    def make(load: Callable[..., Any]) -> Callable[..., Any]:
        def forgetting(step: Any, state: dict[str, Any]) -> Any:
            fresh = {**state["optimizer"], "state": {}}
            return load(step, {**state, "optimizer": fresh})

        return forgetting

    _around(TrainStep, "load_state_dict", make)


BREAKS: dict[str, Callable[[], None]] = {
    "rename": _not_atomic,
    "sampler": _sampler_restarts,
    "momentum": _momentum_lost,
    "fsync": lambda: None,  # the tape itself leaves it out
}
