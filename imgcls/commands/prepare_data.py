"""Fetch a known data set, check it, unpack it and count it."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.data.archives import decompress, unpack
from imgcls.data.datasets.known_sets import KNOWN_SETS, Archive, KnownSet, set_root
from imgcls.data.fetch import fetch, require_digest
from imgcls.structures import Problem

_SECONDS_BETWEEN_LINES = 5.0
_UNPACKED = (".tar", ".tgz", ".tar.gz", ".zip")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = Parser(description="Fetch a known data set, check it, unpack it and count it.")
    made.add_argument("set", choices=list(KNOWN_SETS), help="name of the set")
    made.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="where it goes (default: $DETECTRON2_DATASETS/<set>, or datasets/<set>)",
    )
    made.add_argument(
        "--from", dest="given", type=Path, nargs="+", default=[], metavar="PATH",
        help="files that you have, or folders that hold them: they are not fetched, and stay where they are",
    )  # fmt: skip
    made.add_argument("--splits", nargs="+", metavar="SPLIT", help="these only (default: all that the set has)")
    made.add_argument("--keep", action="store_true", help="keep what was fetched after it was unpacked")
    return made


@one_line_errors
def work(args: argparse.Namespace) -> None:
    row, root = KNOWN_SETS[args.set], args.root or set_root(args.set)
    for path in args.given:
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}; change --from")
    if args.set == "imagenet":
        raise ValueError(f"imagenet is not fetched: {row.by_hand}")
    splits = args.splits or list(row.splits)
    for split in splits:
        if split not in row.splits:
            raise Problem(f"{args.set} has no such split", split, ", ".join(row.splits), "--splits").error()
    needed = [archive for archive in row.archives if archive.split in ("", *splits)]
    fetched = [file for archive in needed if (file := _place(archive, row, root, args.given)) is not None]
    for split in splits:
        found = row.open(args.set, split, root)
        classes = row.splits[split][1]
        print(f"{args.set}_{split}: {len(found):,} pictures, {classes:,} classes", flush=True)
    for file in fetched:
        if not args.keep:
            file.unlink()
    print(f"complete in {root}")


def _place(archive: Archive, row: KnownSet, root: Path, given: Sequence[Path]) -> Path | None:
    """Have the archive's content in its place; return the file that was fetched for it and is of no use any more."""
    place = root / archive.place
    if place.exists():
        print(f"{place}: there already")
        return None
    file = _given(archive, row, given)
    ours = None
    if file is None:
        if not archive.url.startswith("https://"):
            raise ValueError(row.by_hand)
        if given:
            print(f"{archive.name}: not among what --from names; it is fetched")
        ours = file = root / archive.name
        if fetch(archive.url, file, archive.digest, progress=_Progress(archive.name)):
            print(f"{file}: fetched, {file.stat().st_size:,} bytes, {archive.digest}", flush=True)
    elif archive.digest:
        require_digest(file, archive.digest)
    what = _unpack(archive, file, place)
    print(f"{place}: {what} from {file}", flush=True)
    return ours


def _given(archive: Archive, row: KnownSet, given: Sequence[Path]) -> Path | None:
    """Which of the user's files is this archive: the one of its name, or the only one where only one is needed."""
    files = [path / archive.name if path.is_dir() else path for path in given]
    named = next((file for file in files if file.name == archive.name and file.is_file()), None)
    if named is None and len(given) == 1 and len({other.name for other in row.archives}) == 1 and files[0].is_file():
        return files[0]
    return named


def _unpack(archive: Archive, file: Path, place: Path) -> str:
    if archive.name.endswith(_UNPACKED):
        return f"{unpack(file, place, top=archive.top):,} files"
    if archive.name.endswith(".gz"):
        return f"{decompress(file, place):,} bytes"
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.partial")
    shutil.copyfile(file, partial)
    partial.replace(place)
    return f"{place.stat().st_size:,} bytes"


class _Progress:
    """A line on stderr every few seconds of a long transfer."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            share = f" of {total / 1e6:,.0f}" if total else ""
            print(f"{self._name}: {done / 1e6:,.0f}{share} MB", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set named on the command line; return 0. A user error is one line ``error: ...`` and exit code 2."""
    work(parser().parse_args(argv))
    return 0
