"""Kill trainings at hundreds of places, resume them, and compare them with trainings that nobody killed.

    python scripts/fault_campaign.py --kills 300 --out docs/data/faults.json

Each case is a real training of the two commands, plain and builtin, with one or two ranks and 0, 1 or 4 data workers:
killed inside a save, at a random moment, around a step, with a power failure that takes what was not synced; signalled;
with a rank that dies or hangs; with flipped bits, cut files, lost pointers, full disks, NaN where a checkpoint is due,
a second job on its folder, another config on resume. Trainers are forked from this process, which imports everything
once; a tenth of the kills and some of the rest are of fresh processes.

It goes on where it was interrupted: what the file holds is kept while code, seed and --kills are the same. Exits with 1
when a newest checkpoint was bad, an end differed from the uninterrupted run's, or a case went otherwise than promised.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from faults import report
from faults.bench import Workshop, make_reference
from faults.jobs import Variant, make_pictures
from faults.plan import Task, do, plan
from faults.processes import adopt_orphans
from faults.sabotage import BREAKS


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="trainings to kill (default 300)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the report, JSON")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default 0)")
    parser.add_argument("--only", default="*", metavar="KIND", help="kinds of cases, e.g. 'save' or '*rank*'")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1)), metavar="N", help="cases at a time (default: cores)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the folders of the cases here")
    parser.add_argument(
        "--break", dest="broken", default="", choices=["", *BREAKS], help="break the product first, to see it found"
    )
    return parser


def main() -> int:
    args = options().parse_args()
    torch.set_num_threads(1)  # a thread of torch's would not live on in a forked trainer
    head = report.heading(args.kills, args.seed, args.broken)
    known = report.read(args.out, head)
    tasks = [task for task in plan(args.kills, args.seed) if fnmatch(task.kind, args.only)]
    try:
        with _workplace(args.work) as folder:
            parts = _campaign(args, head, known, [task for task in tasks if task.name not in known], folder)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    found = [case for name in (task.name for task in tasks) for case in parts.get(name, [])]
    print(report.table(report.sums(found)))
    bad = [case for case in found if case["problems"]]
    for case in bad:
        where = f"{case['kind']}, {case['loop']}, {case['ranks']} ranks, {case['workers']} workers, {case['point']}"
        print(f"FAILED: {where}: {'; '.join(case['problems'])}")
    return 1 if bad else 0


@contextlib.contextmanager
def _workplace(wanted: Path | None) -> Any:
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="fault_campaign_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _campaign(
    args: argparse.Namespace,
    head: dict[str, Any],
    parts: dict[str, list[dict[str, Any]]],
    tasks: list[Task],
    folder: Path,
) -> dict[str, list[dict[str, Any]]]:
    """Do ``tasks``, several at a time; the report is written after each."""
    began = time.perf_counter()
    data = make_pictures(folder / "data")
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=adopt_orphans) as pool:
        variants = list(dict.fromkeys(task.variant for task in tasks))
        made = {variant: pool.submit(_reference, folder, data, variant, args.broken) for variant in variants}
        references = {variant: future.result() for variant, future in made.items()}
        waiting = {pool.submit(do, task, folder, data, references, args.seed, args.broken): task for task in tasks}
        for future in _until_interrupted(pool, waiting):
            task = waiting[future]
            parts[task.name] = future.result()
            report.write(args.out, head, parts, time.perf_counter() - began)
            problems = [problem for case in parts[task.name] for problem in case["problems"]]
            minutes, seconds = divmod(round(time.perf_counter() - began), 60)
            what = "; ".join(problems)[:200] or "ok"
            print(f"{minutes:02d}:{seconds:02d} {task.name}: {len(parts[task.name])} cases, {what}", flush=True)
    return parts


def _until_interrupted(pool: ProcessPoolExecutor, waiting: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
    """The futures as they are done; Ctrl-C leaves those that have not begun."""
    try:
        yield from as_completed(waiting)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _reference(folder: Path, data: Path, variant: Variant, broken: str) -> Any:
    return make_reference(Workshop(folder, data, broken), variant)


if __name__ == "__main__":
    sys.exit(main())
