"""Build ImageNet's class folders from the official archives."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.data.datasets.known_sets import set_root
from imgcls.data.fetch import require_digest
from imgcls.data.imagenet_archives import DEVKIT, DIGESTS, TRAIN, VAL, Counts, prepare

COUNTS = Counts()


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = Parser(
        description=f"Build ImageNet's class folders from {TRAIN}, {VAL} and {DEVKIT}. "
        "A run that was killed goes on where it ended when it is started again."
    )
    made.add_argument("--archives", type=Path, required=True, metavar="DIR", help="folder with the three files")
    made.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where train/ and val/ go (default: $DETECTRON2_DATASETS/imagenet, or datasets/imagenet)",
    )  # fmt: skip
    made.add_argument(
        "--counts", type=int, nargs=3, metavar=("CLASSES", "TRAIN", "VAL"), default=(1000, COUNTS.train, COUNTS.val),
        help="what there must be (default: %(default)s); other numbers are for archives that you made",
    )  # fmt: skip
    made.add_argument(
        "--check-digests", action="store_true", help="compare the archives' MD5 first; it reads 145 GB once more"
    )
    return made


@one_line_errors
def work(args: argparse.Namespace) -> None:
    output = args.output or set_root("imagenet")
    if args.check_digests:
        for name, digest in DIGESTS.items():
            require_digest(args.archives / name, digest)
            print(f"{name}: {digest}", flush=True)
    counts = Counts(*args.counts)
    built = prepare(args.archives, output, expected=counts, say=partial(print, flush=True))
    what = f"{counts.train:,} training and {counts.val:,} validation pictures of {counts.classes:,} classes"
    print(f"{output}: {what}{'' if built else ', there already'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Build the set; return 0. A user error is one line ``error: ...`` and exit code 2."""
    work(parser().parse_args(argv))
    return 0
