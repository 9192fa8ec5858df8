"""The largest batch that fits into memory, found by trying: each trial in a process of its own, which may fail."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from imgcls.engine.machine.memory import (
    MIB,
    OutOfMemory,
    available_memory,
    is_out_of_memory,
    out_of_memory,
    peak_resident,
    taken_memory,
)
from imgcls.engine.measuring.made_up import made_up_batch, made_up_data
from imgcls.engine.run import Run
from imgcls.engine.setup import Data

# Of the free memory; the rest is for data workers, evaluation and what else the machine does.
SHARE = 0.9
# oneDNN says no more than this where it gets no memory; a process under a limit of memory may take it for that.
_ONEDNN = ("could not create a primitive", "could not execute a primitive")
PATIENCE = 900  # seconds; somebody who waits longer for two steps does not want that batch
STEPS = 2  # the second one has the optimizer's state beside the gradients


@dataclass(frozen=True)
class Trial:
    """batch: images on one rank. peak: bytes held at most. said: why it does not fit; empty: it does."""

    batch: int
    peak: int = 0
    said: str = ""


def trials(cfg: CfgNode, data: Data, *, ranks: int = 1, memory: int = 0, most: int = 2**20) -> Iterator[Trial]:
    """2, 4, 8, ... images on a rank, two training steps each, up to the first that does not fit.

    Begins with two images a micro-batch: one alone is nothing that BatchNorm could train on.

    cfg: with everything decided, as engine.setup does. ranks: on this machine; without GPUs they share its memory.
    memory: bytes that a rank may take; 0: a share of what is free. most: no batch is larger.
    """
    memory = memory or int(SHARE * available_memory() / (1 if cfg.MODEL.DEVICE.startswith("cuda") else ranks))
    processes = fresh_processes(__name__)
    batch = 2 ** (2 * cfg.SOLVER.ACCUMULATE - 1).bit_length()
    while batch <= most:
        trial = _try(processes, cfg, made_up_data(data), batch, memory)
        yield trial
        if trial.said:
            return
        batch *= 2


def fresh_processes(module: str) -> Any:
    """A multiprocessing context whose server has imported ``module`` once and forks for each process.

    The server has no threads, which a fork of this process would be without, and no memory in use.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _try(processes: Any, cfg: CfgNode, data: Data, batch: int, memory: int) -> Trial:
    answers, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_rehearse, args=(theirs, cfg, data, batch, memory), daemon=True)
    process.start()
    theirs.close()
    try:
        if not answers.poll(PATIENCE):
            process.kill()
            return Trial(batch, said=f"{STEPS} steps take longer than {PATIENCE} seconds")
        answer = answers.recv()
    except EOFError:
        answer = None
    finally:
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer or Trial(batch, said=_how_it_ended(process.exitcode))


def _how_it_ended(code: int) -> str:
    # Libraries that cannot tell end the process; so does the system, of a process that holds too much.
    return f"the process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _rehearse(answers: Connection, cfg: CfgNode, data: Data, batch: int, memory: int) -> None:
    """What a trial's process does: sends a :class:`Trial`, or the error that has nothing to do with memory."""
    answer: Trial | Exception
    try:
        answer = Trial(batch, _peak_of_steps(cfg, data, batch, memory))
    except Exception as error:
        is_memory = is_out_of_memory(error) or any(words in str(error) for words in _ONEDNN)
        answer = Trial(batch, said=_why(error)) if is_memory else error
    answers.send(answer)
    answers.close()


def _why(error: Exception) -> str:
    return str(out_of_memory(error)).removeprefix("out of memory: ").partition(". ")[0]


def _peak_of_steps(cfg: CfgNode, data: Data, batch: int, memory: int) -> int:
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if not on_gpu:
        torch.ones(512, 512) @ torch.ones(512, 512)  # its threads need memory of their own
        _limit_memory(taken_memory() + memory)
    run = Run(cfg, data)
    pixels = made_up_batch(cfg, batch)
    with EventStorage(0):
        for iteration in range(STEPS):
            run.step(pixels, iteration)
        run.step.settle()
    return torch.cuda.max_memory_reserved() if on_gpu else peak_resident()


def _limit_memory(most: int) -> None:
    if sys.platform != "linux":
        return
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([most, *allowed]), hard))


def largest(found: Sequence[Trial]) -> int:
    """The largest batch that fits; :class:`OutOfMemory` where none does."""
    fitting = [trial.batch for trial in found if not trial.said]
    if not fitting:
        raise OutOfMemory(
            f"not even {found[-1].batch} images fit: {found[-1].said}. Choose a smaller MODEL.BACKBONE.VARIANT or "
            "INPUT.TRAIN_SIZE, or set MODEL.BACKBONE.CHECKPOINT True"
        )
    return max(fitting)


def advice_of(found: Sequence[Trial], ranks: int) -> str:
    """What to type, for ``ranks`` ranks in all."""
    batch = largest(found)
    each = f" ({batch} on each of {ranks} ranks)" if ranks > 1 else ""
    more = "" if found[-1].said else "; the training set has no more for a larger one"
    return f"largest power of two that fits: SOLVER.IMS_PER_BATCH {batch * ranks}{each}{more}"


def told(trial: Trial) -> str:
    """A line on one trial."""
    return f"{trial.batch:>6} images: " + (trial.said or f"fit, {trial.peak / MIB:.0f} MiB at most")
