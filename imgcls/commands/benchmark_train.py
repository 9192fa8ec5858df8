"""Measure training: what our two loops cost beside a bare one and timm's, and what the settings chosen for CPUs gain.

All train the same network on one batch in memory, so that no loader is in the way. They run by turns, in blocks of
steps, each time in another order; a ratio is that of two blocks of one turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from imgcls.commands import training_loops as loops
from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.commands.benchmark_data import machine
from imgcls.commands.paired import Estimate, median_of_ratios
from imgcls.config import get_config
from imgcls.engine import Data, finalize
from imgcls.engine.machine.cpu_settings import decide_cpu_settings
from imgcls.engine.machine.memory import MIB, peak_resident
from imgcls.engine.measuring.batch_size import fresh_processes
from imgcls.engine.measuring.made_up import made_up_batch, made_up_data
from imgcls.modeling import family_of
from imgcls.structures import Problem

BARE, PLAIN, BUILTIN, TIMM_STEP = "bare loop", "imgcls, plain loop", "imgcls, builtin loop", "timm's step"
CHOSEN, TIMM = "imgcls, settings chosen", "timm's defaults"
OVERHEAD = {
    BARE: loops.bare_loop,
    PLAIN: loops.plain_loop,
    BUILTIN: loops.builtin_loop,
    TIMM_STEP: loops.timm_step_loop,
}
SETTINGS = {CHOSEN: loops.plain_loop, TIMM: loops.timm_loop}
PARTS = {"overhead": OVERHEAD, "settings": SETTINGS}
MEMORY_STEPS = 2


@dataclass
class Row:
    """One loop. seconds: of each block. peak: bytes of memory at most, of a process of its own; 0: not measured."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--variant", default="resnet18", metavar="NAME", help="network (default: %(default)s)")
    made.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side (default: %(default)s)")
    made.add_argument("--batch", type=int, default=16, metavar="N", help="images (default: %(default)s)")
    made.add_argument("--steps", type=int, default=20, metavar="N", help="in a block (default: %(default)s)")
    made.add_argument("--pairs", type=int, default=30, metavar="N", help="blocks of each loop (default: %(default)s)")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="of torch on the CPU (default: torch's)")
    made.add_argument("--device", default="cuda", metavar="NAME", help="cuda or cpu (default: cuda where there is one)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and pixels (default: %(default)s)")
    made.add_argument(
        "--part", choices=["both", *PARTS], default="both", help="what the loops cost, what the settings gain, or both"
    )
    made.add_argument("--no-memory", action="store_true", help="leave out the processes that peak memory is taken from")
    made.add_argument("--out", default="", metavar="FILE", help="write everything measured there, as JSON")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name, low in (("size", 1), ("batch", 2), ("steps", 1), ("pairs", 1), ("threads", 0)):
        value = getattr(args, name)
        if value < low:
            raise Problem("nothing can be measured so", value, f">= {low}", f"--{name}").error()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    logging.getLogger("imgcls").setLevel(logging.WARNING)
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        cfg, data = config_of(args, scratch)
        report = measure(args, cfg, data)
    print(told(report))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {args.out}")


def config_of(args: argparse.Namespace, folder: str) -> tuple[CfgNode, Data]:
    """A run of ten classes as the base config has it, in float32, contiguous, that neither evaluates nor ends."""
    words = [
        *("MODEL.BACKBONE.VARIANT", args.variant, "MODEL.BACKBONE.NAME", family_of(args.variant).builder),
        *("INPUT.TRAIN_SIZE", args.size, "SOLVER.IMS_PER_BATCH", args.batch, "SEED", args.seed),
        *("MODEL.BACKBONE.PRETRAIN_SIZE", args.size if args.variant.startswith("vit") else 0),
        *("MODEL.DEVICE", args.device, "SOLVER.CPU_SETTINGS", "off", "SOLVER.BASE_LR", 0.01, "OUTPUT_DIR", folder),
        *("SOLVER.MAX_ITER", 10**6, "SOLVER.CHECKPOINT_EPOCHS", 0.0, "SOLVER.CHECKPOINT_PERIOD", 10**6),
        *("TEST.EVAL_EPOCHS", 0.0, "DATASETS.TRAIN", ("digits_train",), "DATASETS.TEST", ()),
    ]
    cfg, data = finalize(get_config("Base-ClsNet.yaml", words))
    return cfg, made_up_data(data)


def chosen(cfg: CfgNode) -> CfgNode:
    """The same with what SOLVER.CPU_SETTINGS auto decides."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CPU_SETTINGS = "auto"
    decide_cpu_settings(cfg)
    return cfg


def measure(args: argparse.Namespace, cfg: CfgNode, data: Data) -> dict[str, Any]:
    """Everything as plain values: what was measured on, and for each part its rows and ratios."""
    report: dict[str, Any] = {
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "work": {key: getattr(args, key) for key in ("variant", "size", "batch", "steps", "pairs", "seed")},
        "device": cfg.MODEL.DEVICE,
        "interval": "95 %, between two order statistics (binomial), of the median of the ratios",
        "parts": {},
    }
    for part in PARTS if args.part == "both" else [args.part]:
        rows = run_by_turns(PARTS[part], cfg, data, args.batch, args.steps, args.pairs)
        if not args.no_memory:
            for row in rows:
                row.peak = peak_of(row.name, cfg, data, args.batch, args.threads)
        report["parts"][part] = _described(rows, args.steps, args.batch)
    if "settings" in report["parts"]:
        decided = chosen(cfg)
        report["chosen"] = {
            "SOLVER.AMP.ENABLED": decided.SOLVER.AMP.ENABLED,
            "SOLVER.AMP.DTYPE": decided.SOLVER.AMP.DTYPE,
            "MODEL.CHANNELS_LAST": decided.MODEL.CHANNELS_LAST,
        }
        report["timm"] = loops.timm_name(cfg) or "our network: timm has none of that name"
    return report


def run_by_turns(
    makers: dict[str, Callable[..., loops.Loop]], cfg: CfgNode, data: Data, batch: int, steps: int, pairs: int
) -> list[Row]:
    """``pairs`` blocks of each loop after one that is not counted, the first of one turn last in the next."""
    made: dict[str, tuple[loops.Feed, loops.Loop]] = {}
    for name, make in makers.items():
        feed = loops.Feed(made_up_batch(cfg, batch).to(cfg.MODEL.DEVICE), steps)
        made[name] = feed, make(chosen(cfg) if name == CHOSEN else cfg, data, feed)
    rows = {name: Row(name) for name in makers}
    names = list(makers)
    with logged_to_a_file(Path(cfg.OUTPUT_DIR) / "log.txt"):
        for turn in range(pairs + 1):
            for name in names:
                feed, block = made[name]
                block()
                if turn:
                    rows[name].seconds.append(feed.seconds)
            names = [*names[1:], names[0]]
    return list(rows.values())


@contextmanager
def logged_to_a_file(path: Path) -> Iterator[None]:
    """The loops' lines go where a run's go, but for the console."""
    logger, handler = logging.getLogger("imgcls"), logging.FileHandler(path)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


def peak_of(name: str, cfg: CfgNode, data: Data, batch: int, threads: int) -> int:
    """Bytes of memory that a fresh process of this loop holds at most: on a GPU of tensors, otherwise in all."""
    processes = fresh_processes(__name__)
    answers, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_peak, args=(theirs, name, cfg, data, batch, threads))
    process.start()
    theirs.close()
    try:
        return int(answers.recv())
    except EOFError:
        return 0
    finally:
        process.join()


def _peak(answers: Any, name: str, cfg: CfgNode, data: Data, batch: int, threads: int) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    logging.disable(logging.INFO)
    run_by_turns({name: (OVERHEAD | SETTINGS)[name]}, cfg, data, batch, MEMORY_STEPS, 1)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    answers.send(torch.cuda.max_memory_allocated() if on_gpu else peak_resident())


# -------------------------------------------------------------------------------------------------------------- tables


def _described(rows: Sequence[Row], steps: int, batch: int) -> list[dict[str, Any]]:
    """For each row its figures, with the ratio to the first one (overhead) or of the last one to it (settings)."""
    first, last = rows[0], rows[-1]
    found = []
    for row in rows:
        # Of loops the question is how much longer they take; of settings how many times faster they are.
        faster = row.name == CHOSEN
        base = last if faster else first
        ratio = median_of_ratios(base.seconds, row.seconds) if faster else median_of_ratios(row.seconds, base.seconds)
        extra = [(ours - theirs) / steps for ours, theirs in zip(row.seconds, base.seconds, strict=True)]
        found.append(
            {
                "name": row.name,
                "milliseconds": 1000 * statistics.median(row.seconds) / steps,
                "images_per_second": batch * steps / statistics.median(row.seconds),
                "ratio": asdict(ratio),
                "extra_microseconds": 1e6 * statistics.median(extra),
                "peak_mib": row.peak / MIB,
                "seconds": row.seconds,
            }
        )
    return found


def told(report: dict[str, Any]) -> str:
    """The report as tables."""
    work = report["work"]
    lines = [
        f"{work['variant']}, {work['size']} pixels, batch {work['batch']}, on {report['device']} with "
        f"{report['machine']['threads']} threads; {work['pairs']} blocks of {work['steps']} steps each, by turns"
    ]
    if "overhead" in report["parts"]:
        rows = [
            (row["name"], f"{row['milliseconds']:.2f}", _estimate(row), f"{row['extra_microseconds']:.0f}", _mib(row))
            for row in report["parts"]["overhead"]
        ]
        headers = ("loop, same precision", "ms a step", "times the bare loop (95 %)", "us a step more", "peak MiB")
        lines += ["", tabulate(rows, headers=headers, disable_numparse=True)]
    if "settings" in report["parts"]:
        ours, theirs = report["parts"]["settings"]
        rows = [
            (row["name"], f"{row['milliseconds']:.2f}", f"{row['images_per_second']:.1f}", times, _mib(row))
            for row, times in ((ours, _estimate(ours)), (theirs, ""))
        ]
        headers = ("settings", "ms a step", "images/s", "times timm's speed (95 %)", "peak MiB")
        lines += ["", tabulate(rows, headers=headers, disable_numparse=True)]
        lines += [
            f"chosen: {' '.join(f'{key} {value}' for key, value in report['chosen'].items())}; timm: {report['timm']}"
        ]
    return "\n".join(lines)


def _estimate(row: dict[str, Any]) -> str:
    return str(Estimate(**row["ratio"]))


def _mib(row: dict[str, Any]) -> str:
    return f"{row['peak_mib']:.0f}" if row["peak_mib"] else ""


if __name__ == "__main__":
    main()
