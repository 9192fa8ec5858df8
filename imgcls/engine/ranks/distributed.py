"""Processes: starting them, wrapping the model for them, and letting them agree on an error."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from imgcls.engine.ranks import launching
from imgcls.engine.ranks.launching import LOST_ANOTHER, NOT_ANSWERED, WAITED_IN_VAIN, launch_ranks

T = TypeVar("T")

# How gloo and torch's rendezvous say it, in lower case; they have no exceptions of their own for it.
_OTHER_IS_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")
_OTHER_IS_SILENT = ("timed out", "timeout")


def launch(main: Callable[..., None], args: Any) -> None:
    """Run ``main(args)`` in every process that ``args`` or the environment asks for.

    Under torchrun this process is one of them. Otherwise ``args.num_gpus`` processes are started on this machine, on
    gloo where there is no GPU. A process that fails ends the others, and its exit code is ours.
    """
    timeout = timedelta(seconds=args.dist_timeout)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        with _ending_with_others(say=True):
            _join(int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), timeout)
            main(args)
            dist.destroy_process_group()
        return
    if not 0 <= args.machine_rank < args.num_machines:
        machines = f"the {args.num_machines} machines (--num-machines)"
        raise ValueError(f"--machine-rank {args.machine_rank}, but {machines} are counted from 0")
    if args.num_gpus > 1 and not torch.cuda.is_available():
        print(f"no GPU here: starting {args.num_gpus} processes on the CPU (gloo) instead", file=sys.stderr)
    elif torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()} GPUs")
    if args.num_gpus * args.num_machines == 1:
        main(args)
        return
    code = launch_ranks(
        partial(_as_rank, main, args),
        partial(_meet, args.num_gpus, timeout),
        ranks=args.num_gpus,
        machines=args.num_machines,
        machine=args.machine_rank,
        url=args.dist_url,
        timeout=args.dist_timeout,
    )
    if code:
        sys.exit(code)


def _meet(local_size: int, timeout: timedelta, rank: int, world: int, url: str) -> None:
    with _ending_with_others():
        _join(rank % local_size, local_size, timeout, init_method=url, rank=rank, world_size=world)


def _as_rank(main: Callable[..., None], args: Any) -> None:
    local = comm.get_local_size()
    if local > 1 and not torch.cuda.is_available():
        # Each process would take every core, as torchrun prevents with OMP_NUM_THREADS.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    with _ending_with_others():
        main(args)
        # Not after an error: the other ranks may be in a collective that this one will never join.
        dist.destroy_process_group()


def _join(local_rank: int, local_size: int, timeout: timedelta, **where: Any) -> None:
    """Join the process group; what waits for another rank waits ``timeout`` at most."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    # For the groups that detectron2 makes without saying a time: of a machine's ranks, and on gloo beside NCCL.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=timeout, **where)
    comm.create_local_process_group(local_size)
    # Or one that ends at once, of a mistake in its config, would leave the others to a rendezvous with nobody.
    comm.synchronize()


@contextmanager
def _ending_with_others(*, say: bool = False) -> Iterator[None]:
    """End this process, with a line for a traceback, when a collective fails because of another rank.

    say: also when that one has gone, which a launcher of ours says better.
    """
    try:
        yield
    except RuntimeError as error:
        how = fault_of_another(error)
        if not how or os.environ.get("IMGCLS_TRACEBACK"):
            raise
        launching.notes.stands(how)
        iteration = launching.notes.of_this()[1]
        at = f" at iteration {iteration}" if iteration >= 0 else ""
        if how == WAITED_IN_VAIN:
            _say(f"no answer from another rank within --dist-timeout{at}: {_reason(error)}")
        elif say:
            _say(f"another rank has gone{at}, and this one with it; --resume goes on from the last checkpoint")
        sys.exit(NOT_ANSWERED if how == WAITED_IN_VAIN else 1)


def fault_of_another(error: BaseException) -> int:
    """How this rank stands after ``error`` when it is a collective's that failed because of another rank; else 0."""
    text = str(error).lower()
    of_a_collective = isinstance(error, dist.DistError) or "gloo" in text or "caused pair closure" in text
    if not isinstance(error, RuntimeError) or not of_a_collective:
        return 0
    if any(words in text for words in _OTHER_IS_GONE):
        return LOST_ANOTHER
    return WAITED_IN_VAIN if any(words in text for words in _OTHER_IS_SILENT) else 0


def _reason(error: BaseException) -> str:
    # Without the place in gloo's source.
    return str(error).splitlines()[0].partition("] ")[2] or str(error).splitlines()[0]


def _say(what: str) -> None:
    print(f"error (rank {comm.get_rank()}): {what}", file=sys.stderr, flush=True)


def wrap_for_ranks(model: nn.Module) -> nn.Module:
    """DistributedDataParallel where there are several ranks, otherwise ``model`` itself. The only DDP constructor.

    Buffers are not synchronised in forward: running statistics are averaged before each evaluation and save instead,
    which costs nothing in a step. On the CPU ``device_ids`` must be absent (detectron2's own constructor fails there).
    """
    if comm.get_world_size() == 1:
        return model
    options: dict[str, Any] = {}
    if next(model.parameters()).is_cuda:
        options["device_ids"] = [comm.get_local_rank()]
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch renamed the option in 2.15 and warns about the old name.
    options["forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"] = False
    return DistributedDataParallel(model, **options)


def first_rank_does(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 only and return what it gives on every rank; so with its errors. Collective.

    A ``ValueError`` or ``OSError`` becomes a ``ValueError`` on every rank.
    """
    problem, result = "", None
    if comm.is_main_process():
        try:
            result = action()
        except (ValueError, OSError) as error:
            problem = str(error)
    problem, result = comm.all_gather((problem, result))[0]
    if problem:
        raise ValueError(problem)
    return cast(T, result)
