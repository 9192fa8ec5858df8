"""Write a data set as WebDataset tar shards, which many machines read quickly and any number of ranks reads exactly."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.data import open_source, splits_below
from imgcls.data.datasets.shards import damaged_shards
from imgcls.data.packing import Packed, PackOptions, pack

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
LIMITS = {"short-side": (0, 1 << 16), "quality": (1, 95), "workers": (0, 1024), "seed": (-1, 1 << 62)}


def parser() -> Parser:
    """The options of the command."""
    made = Parser(description="Write a data set as WebDataset tar shards with an index, or check such a folder.")
    made.add_argument(
        "--data", default="", metavar="DIR|NAME", help="folder of class folders, list file, or a set's name"
    )
    made.add_argument("--output", default="", metavar="DIR", help="folder to write; it must not hold anything")
    made.add_argument(
        "--short-side", type=int, default=0, metavar="N", help="resize pictures with a longer short side (pixels)"
    )
    made.add_argument("--quality", type=int, default=90, metavar="Q", help="JPEG quality of resized ones (default 90)")
    made.add_argument(
        "--shard-size", default="100MB", metavar="SIZE", help="of a shard: 100MB (KB, GB), or a number of samples"
    )
    made.add_argument("--workers", type=int, default=0, metavar="N", help="processes; the result is always the same")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of packing; -1: the set's own")
    made.add_argument(
        "--on-error", default="raise", choices=("raise", "skip"), help="what to do about a picture that is unreadable"
    )
    made.add_argument("--check", default="", metavar="DIR", help="compare a packed folder with its digests, and stop")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 1 when ``--check`` finds damage."""
    args = parser().parse_args(argv)
    if args.check:
        return _check(Path(args.check))
    if not (args.data and args.output):
        raise ValueError("nothing says what to pack: give --data DIR or NAME, and --output DIR")
    options = _options(args)
    output = Path(args.output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already; remove it, or change --output")
    sets = _sets(args.data)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")
    try:
        lines = _pack_all(sets, partial, options)
        os.rename(partial, output)  # over an empty folder too, but never over a filled one
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("\n".join(lines))
    print(f"written: {output}; {_usage(args.output, sets)}")
    return 0


def _options(args: argparse.Namespace) -> PackOptions:
    found = re.fullmatch(r"(\d+)([A-Za-z]*)", args.shard_size)
    number, unit = (int(found[1]), found[2].upper()) if found else (0, "")
    if number < 1 or unit not in ("", *UNITS):
        raise ValueError(f"--shard-size is {args.shard_size!r}; allowed: a number with KB, MB or GB, or of samples")
    for name, low, high in (
        ("short_side", 0, 1 << 16),
        ("quality", 1, 95),
        ("workers", 0, 1024),
        ("seed", -1, 1 << 62),
    ):
        if not low <= getattr(args, name) <= high:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(args, name)}; allowed: {low} to {high}; change {option}")
    return PackOptions(
        short_side=args.short_side,
        quality=args.quality,
        shard_bytes=number * UNITS[unit] if unit else 0,
        shard_samples=0 if unit else number,
        seed=args.seed,
        workers=args.workers,
        skip_bad=args.on_error == "skip",
    )


def _sets(data: str) -> dict[str, str]:
    """Folder below the output -> name of the set to pack into it; the two splits of a folder or list, or one set."""
    if not os.path.exists(data):
        return {"": data}
    train, val = splits_below(data)
    return {"train": train, "val": val}


def _pack_all(sets: dict[str, str], folder: Path, options: PackOptions) -> list[str]:
    lines, classes = [], None
    for below, name in sets.items():
        source = open_source(name, classes=classes)
        classes = source.classes
        (folder / below).mkdir(parents=True)
        lines.append(_line(name, len(classes), pack(source, folder / below, options)))
    return lines


def _line(name: str, classes: int, done: Packed) -> str:
    pictures = done.resized + done.copied
    text = f"{name}: {pictures} pictures of {classes} classes, {done.resized} resized, {done.copied} as they were; "
    left_out = f"; {len(done.left_out)} unreadable ones left out" if done.left_out else ""
    shards = "1 shard" if done.shards == 1 else f"{done.shards} shards"
    return f"{text}{shards}, {done.bytes / 1e6:.1f} MB{left_out}"


def _usage(output: str, sets: dict[str, str]) -> str:
    return f"train with --data {output}" if "train" in sets else f"it is called shards:{output}"


def _check(folder: Path) -> int:
    places = [folder] if (folder / "index.json").is_file() else sorted(folder.glob("*/index.json"))
    places = [place.parent if place.name == "index.json" else place for place in places]
    if not places:
        raise ValueError(f"{folder} has no index.json, and neither has a folder in it; change --check")
    damage = [line for place in places for line in damaged_shards(place)]
    print("\n".join(damage) if damage else f"{folder} is whole: every shard has the digest that it was packed with")
    return 1 if damage else 0
