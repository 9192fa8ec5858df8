"""What tests/test_sharding.py has two ranks do, each in a process forked from one that has imported everything."""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import tiny_cfg
from detectron2.utils import comm
from test_loops import run_in_process
from torch import multiprocessing

from imgcls.engine import Run, finalize
from imgcls.structures import Batch

QUIET = ("DATALOADER.NUM_WORKERS", 0, "SOLVER.CPU_SETTINGS", "off", "SOLVER.BASE_LR", 0.01, "SOLVER.PARALLEL")
RUN = ("TEST.IMS_PER_BATCH", 500, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.OPTIMIZER", "AdamW")
CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
# In float64, with GroupNorm: three steps of a network with BatchNorm turn the last bit into the fourth decimal.
CASES = {
    "sgd": ("MODEL.CHANNELS_LAST", True),
    "accumulate": ("SOLVER.ACCUMULATE", 2, "SOLVER.OPTIMIZER", "AdamW"),
    "full_model": (*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "MODEL.BACKBONE.CHECKPOINT", True),
    "adaptive": (*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "adaptive"),
}


def batches(count: int) -> list[Batch]:
    """This rank's."""
    generator = torch.Generator().manual_seed(comm.get_rank())
    images = [torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(count)]
    return [Batch(each, torch.arange(4), torch.arange(4)) for each in images]


def three_steps(
    folder: Path, parallel: str, overrides: tuple[object, ...]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    words = (*QUIET, parallel, "MODEL.BACKBONE.NORM", "GN", *overrides)
    run = Run(*finalize(tiny_cfg(folder, *words)))
    run.model.double()
    losses = [sum(float(loss) for loss in run.step(batch, i).values()) for i, batch in enumerate(batches(3))]
    content = run.checkpoint(2)
    moments = content["optimizer"]["state"]
    state = {f"{i}.{name}": value for i, own in moments.items() for name, value in own.items()}
    return losses, {**content["model"], **(state if comm.is_main_process() else {})}


def compare(folder: Path) -> dict[str, list[float]]:
    """Largest difference of the losses, and of weights and moments relative to the largest, between DDP and FSDP2."""
    found = {}
    for name, overrides in CASES.items():
        (losses, state), (ours, mine) = (three_steps(folder, kind, overrides) for kind in ("ddp", "fsdp2"))
        assert list(state) == list(mine)
        apart = [float((state[k] - mine[k]).abs().max() / (state[k].abs().max() + 1e-12)) for k in state]
        found[name] = [max(abs(a - b) for a, b in zip(losses, ours, strict=True)), max(apart), len(apart)]
    return found


def not_finite(folder: Path) -> dict[str, object]:
    """A gradient that is not finite in what lies on rank 1 alone."""
    run = Run(*finalize(tiny_cfg(folder, *QUIET, "fsdp2", "SOLVER.NON_FINITE", "skip")))
    step, (first, second) = run.step, batches(2)
    step(first, 0)
    run._gather()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    bias = step.model.head.fc.bias
    hook = lambda own: own.grad.to_local().fill_(float("nan")) if comm.get_rank() == 1 else None  # noqa: E731
    handle = bias.register_post_accumulate_grad_hook(hook)
    step(second, 1)
    handle.remove()
    run._gather()
    same = all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    step(second, 2)
    run._gather()
    return {
        "skipped": step.skipped,
        "same": same,
        "moved": not torch.equal(run.model.head.fc.bias, before["head.fc.bias"]),
    }


def whole_runs(folder: Path) -> dict[str, float]:
    """Four iterations with FSDP2 through the builtin loop; resumed in the middle by DDP, and DDP's by FSDP2."""
    figures = {}
    for name, kind, other in (("fsdp2", "fsdp2", "ddp"), ("ddp", "ddp", "fsdp2")):
        out = folder / name
        run, results = run_in_process("builtin", tiny_cfg(out, *QUIET, kind, *RUN))
        figures[name] = results["classification"]["loss"]
        comm.synchronize()
        if comm.is_main_process():
            shutil.copytree(out, folder / f"{name}_again", ignore=shutil.ignore_patterns("model_final*", ".lock"))
        comm.synchronize()
        run, results = run_in_process("plain", tiny_cfg(folder / f"{name}_again", *QUIET, other, *RUN), resume=True)
        assert run.start_iter == 2
        figures[f"{name}_again"] = results["classification"]["loss"]
    return figures


def everything(folder: Path) -> dict[str, object]:
    return {"steps": compare(folder / "a"), "fault": not_finite(folder / "b"), "runs": whole_runs(folder / "c")}


def on_ranks(count: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``work(*args)`` returns on each of ``count`` gloo ranks; an error of any is an ``AssertionError``."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(multiprocessing.ProcessExitedException):  # what it was is told below
        multiprocessing.start_processes(_rank, (count, work, folder, args), nprocs=count, start_method="fork")
    results = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
    for result in results:
        assert "error" not in result, result["error"]
    assert len(results) == count
    return [result["value"] for result in results]


def _rank(rank: int, count: int, work: Callable[..., Any], folder: Path, args: Iterable[Any]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    comm.create_local_process_group(count)
    try:
        result = {"value": work(*args)}
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, folder / f"rank{rank}.pt")
    if "error" in result:
        # The other rank may wait in a collective: its error would hide this one.
        raise SystemExit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.save(on_ranks(2, everything, out / "ranks", out), out / "found.pt")
