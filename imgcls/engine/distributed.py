"""Processes: starting them, wrapping the model for them, and letting them agree on an error."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)


def launch(main: Callable[..., None], args: Any) -> None:
    """Run ``main(args)`` in every process that ``args`` or the environment asks for.

    Under torchrun this process is one of them. Otherwise ``args.num_gpus`` processes are started on this machine, on
    gloo where there is no GPU. A process that fails ends the others, and its exit code is ours.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(main, args)
        return
    if args.num_gpus > 1 and not torch.cuda.is_available():
        print(f"no GPU here: starting {args.num_gpus} processes on the CPU (gloo) instead", file=sys.stderr)
    elif torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()} GPUs")
    try:
        launch_processes(
            _with_fair_threads,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
            timeout=TIMEOUT,
        )
    except ProcessExitedException as error:
        # The process has said why on its own stderr.
        sys.exit(error.exit_code if error.exit_code > 0 else 128 + abs(error.exit_code))


def _with_fair_threads(main: Callable[..., None], args: Any) -> None:
    local = comm.get_local_size()
    if local > 1 and not torch.cuda.is_available():
        # Each process would take every core, as torchrun prevents with OMP_NUM_THREADS.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    try:
        main(args)
    finally:
        _leave()


def _join(main: Callable[..., None], args: Any) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        main(args)
    finally:
        _leave()


def _leave() -> None:
    # After an error the other ranks may be in a collective that this one will never join: no barrier on the way out.
    if dist.is_initialized() and sys.exc_info()[0] is None:
        dist.destroy_process_group()


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


def first_rank_does(action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0 only; its ``ValueError`` or ``OSError`` is raised on every rank. Collective."""
    problem = ""
    if comm.is_main_process():
        try:
            action()
        except (ValueError, OSError) as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)
