"""Measure data loading: each stage of it, and images/s beside torchvision's, timm's and DALI's pipelines.

All do the same: read JPEG files, cut out a random box, resize it to a square, mirror half of them, and hand over
batches. Runs are interleaved, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.commands.data_pipelines import CROP_AND_FLIP, OTHERS, Contestant, Work, imgcls_pipeline
from imgcls.data import Source, open_source
from imgcls.data.fast_jpeg import FromJpeg, Jpeg, from_jpeg, read_fast
from imgcls.data.mapper import ClsMapper, stack
from imgcls.data.photo_like import SIZES, jpeg_of, photo_like
from imgcls.data.samplers import Draw
from imgcls.data.transforms import train_transform
from imgcls.structures import Batch, Problem

GENERATED = 64  # pictures


@dataclass
class Rate:
    """Images/s of one pipeline in each repeat."""

    name: str
    repeats: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)

    def times(self, other: Rate) -> float:
        """How many times ``other`` it is: the median over the repeats, of the two runs beside each other."""
        return statistics.median(a / b for a, b in zip(self.repeats, other.repeats, strict=True))


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", default="", metavar="DIR", help="folder of class folders of JPEGs; default: generated")
    made.add_argument(
        "--with",
        dest="others",
        nargs="*",
        default=["torchvision", "timm"],
        choices=[*OTHERS],
        metavar="NAME",
        help=f"pipelines to compare with, of {', '.join(OTHERS)} (default: torchvision timm)",
    )
    made.add_argument("--shards", default="", metavar="DIR", help="also read these shards, written by pack_dataset")
    made.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: %(default)s)")
    made.add_argument("--images", type=int, default=2560, metavar="N", help="in one run (default: %(default)s)")
    made.add_argument("--batch", type=int, default=64, metavar="N", help="images (default: %(default)s)")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="or threads (default: %(default)s)")
    made.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side (default: %(default)s)")
    made.add_argument("--dali-python", default=sys.executable, metavar="FILE", help="an interpreter that has DALI")
    made.add_argument("--json", default="", metavar="FILE", help="write everything measured there")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name, low in (("repeats", 1), ("images", 1), ("batch", 1), ("workers", 0), ("size", 1)):
        value = getattr(args, name)
        if value < low:
            raise Problem(f"there is nothing to measure with so many {name}", value, f">= {low}", f"--{name}").error()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.data) if args.data else generate(Path(scratch))
        work = Work(folder, args.images, args.batch, args.workers, args.size)
        source = open_source(f"folder:{folder}")
        found = contestants(args, work, source)  # before the first minute has passed: it says what is missing
        report: dict[str, Any] = {
            "data": described(source, bool(args.data)),
            "machine": machine(),
            "work": _plain(work),
        }
        print(report["data"])
        report["stages"] = median_stages(source, work, args.repeats)
        print(_stage_table(report["stages"]))
        rates = compare(found, args.repeats)
        report["rates"] = [{**asdict(rate), "median": rate.median} for rate in rates]
        print(_rate_table(rates))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {args.json}")


def generate(folder: Path) -> Path:
    """Photo-like JPEGs of ImageNet's sizes, in two class folders."""
    for index in range(GENERATED):
        rng = np.random.default_rng(index)
        path = folder / f"class{index % 2}" / f"{index:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg_of(photo_like(*SIZES[index % len(SIZES)], rng), quality=90, subsampling=2 * (index % 2)))
    return folder


def described(source: Source, given: bool) -> str:
    """What the pictures are, in a line."""
    step = -(-len(source) // 1000)
    sizes = [os.path.getsize(source[index]["file_name"]) for index in range(0, len(source), step)]
    kind = f"{source.name}" if given else "generated noise that resembles photographs (no --data)"
    return f"{len(source)} files of {np.mean(sizes) / 1000:.0f} kB in the mean: {kind}"


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------------------------------- stages


def median_stages(source: Source, work: Work, repeats: int) -> dict[str, float]:
    """:func:`stages`, the median of each over some batches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        found = [stages(source, work, first=repeat * work.batch) for repeat in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def stages(source: Source, work: Work, first: int = 0) -> dict[str, float]:
    """Milliseconds an image of what happens to the batch from sample ``first`` on, one thing after another."""
    transform = from_jpeg(train_transform(CROP_AND_FLIP, work.size, "bilinear"))
    assert isinstance(transform, FromJpeg)
    mapper = ClsMapper(transform)
    samples = [source[(first + index) % len(source)] for index in range(work.batch)]
    for sample in samples:
        mapper(sample, Draw(0, 0))
    spent: dict[str, float] = {}
    pictures = _timed(spent, "read", lambda: [read_fast(sample["file_name"]) for sample in samples])
    jpegs = [picture for picture in pictures if isinstance(picture, Jpeg)]
    kept = [transform.keeps(jpeg) for jpeg in jpegs]
    mode = transform.interpolation
    parts = _timed(spent, "decode", lambda: [jpeg.decode(*box, mode) for jpeg, box in zip(jpegs, kept, strict=True)])
    flip = transform.transform.transforms[1]
    sized = zip(parts, kept, strict=True)
    images = _timed(spent, "augment", lambda: [flip(part.resized(size, mode)) for part, (_, size) in sized])
    mapped = [{"image": image, "label": 0, "image_id": 0} for image in images]
    batch = _timed(spent, "collate", lambda: stack(mapped))
    if torch.cuda.is_available():
        pinned = batch.pin_memory()
        _timed(spent, "transfer", lambda: _sent(pinned))
    return {name: 1000 * seconds / len(samples) for name, seconds in spent.items()}


def _sent(batch: Batch) -> None:
    batch.to("cuda")
    torch.cuda.synchronize()


def _timed(spent: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    spent[name] = time.perf_counter() - start
    return result


def contestants(args: argparse.Namespace, work: Work, source: Source) -> dict[str, Contestant]:
    """All that are to run, by the name in the table."""
    found = {"imgcls": imgcls_pipeline(work, source)}
    if args.shards:
        found["imgcls, shards"] = imgcls_pipeline(work, open_source(f"shards:{args.shards}"))
    return {**found, **{name: OTHERS[name](work, source, args.dali_python) for name in args.others}}


def compare(found: dict[str, Contestant], repeats: int) -> list[Rate]:
    """Every contestant ``repeats`` times, by turns."""
    rates = [Rate(name, []) for name in found]
    for _ in range(repeats):
        for rate in rates:
            rate.repeats.append(found[rate.name]())
    return rates


# -------------------------------------------------------------------------------------------------------------- tables


def _stage_table(spent: dict[str, float]) -> str:
    rows = [(name, f"{value:.3f}") for name, value in spent.items()]
    if "transfer" not in spent:
        rows.append(("transfer", "none: there is no GPU"))
    return "\n" + tabulate(rows, headers=("stage of imgcls, one core", "ms an image"), disable_numparse=True)


def _rate_table(rates: Sequence[Rate]) -> str:
    ours = [rate for rate in rates if rate.name.startswith("imgcls")]
    rows = []
    for rate in rates:
        ratios = ["" if rate in ours else f"{mine.times(rate):.2f}" for mine in ours]
        rows.append((rate.name, f"{rate.median:.0f}", f"{min(rate.repeats):.0f}-{max(rate.repeats):.0f}", *ratios))
    headers = ("pipeline", "images/s", "range", *(f"{mine.name} is times" for mine in ours))
    return "\n" + tabulate(rows, headers=headers, disable_numparse=True)


def _plain(work: Work) -> dict[str, Any]:
    return {**asdict(work), "folder": str(work.folder)}


if __name__ == "__main__":
    main()
