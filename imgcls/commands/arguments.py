"""Command lines: the options that training commands share, and user errors in one line."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from detectron2.utils import comm


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, not after a screen of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def overriding_parser(description: str) -> Parser:
    """A parser for a command that takes KEY VALUE pairs beside its options; :func:`parse` reads them."""
    return Parser(
        description=description,
        usage="%(prog)s [options] [KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="KEY VALUE pairs override the config, e.g. SOLVER.BASE_LR 0.1 SOLVER.MAX_ITER 100.",
    )


def training_parser(description: str) -> Parser:
    """Options of detectron2's own train_net.py, with its names."""
    parser = overriding_parser(description)
    parser.add_argument("--config-file", metavar="FILE", default="", help="YAML, a path or a name under configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (not read under torchrun)"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="K", help="this machine's number")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="where the processes meet, e.g. tcp://10.0.0.1:29500"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, wherever they stand, and as ``opts`` the words between and after them: KEY VALUE pairs."""
    args, words = parser.parse_known_args(argv)
    for word in words:
        # One dash may begin a value, such as -1e-3.
        if word.startswith("--"):
            known = [name for action in parser._actions for name in action.option_strings]
            near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            parser.error(f"there is no option {word}" + (f"; did you mean {near[0]}?" if near else ""))
    args.opts = words
    return args


def one_line_errors(work: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a user error (``ValueError``, ``OSError``, an extra that is absent) into one line on stderr, exit code 2.

    IMGCLS_TRACEBACK=1 shows the traceback instead.
    """

    @functools.wraps(work)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return work(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("IMGCLS_TRACEBACK"):
                raise
            rank = f" (rank {comm.get_rank()})" if comm.get_world_size() > 1 else ""
            print(f"error{rank}: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return guarded
