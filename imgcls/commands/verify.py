"""Verify that a converted backbone arrives in a detector; exits with 1 when it does not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from imgcls.commands.arguments import add_config_file, one_line_errors, overriding_parser, parse
from imgcls.config import find_config, load_config
from imgcls.transfer import verify


def parser() -> argparse.ArgumentParser:
    made = overriding_parser(__doc__ or "")
    made.add_argument("--weights", required=True, metavar="FILE", help="written by convert_to_detection")
    add_config_file(made, "the detector's YAML", required=True)
    made.add_argument("--classifier", metavar="FILE", help="the checkpoint it was made from: compare whole maps")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    # MODEL.WEIGHTS is the file under test, whatever the YAML names.
    paths = [find_config(name) for name in args.config_file]
    cfg = load_config(paths, [*args.opts, "MODEL.WEIGHTS", args.weights])
    outcome = verify(args.weights, cfg, args.classifier)
    print(outcome.text())
    if not outcome.passed:
        sys.exit(1)
