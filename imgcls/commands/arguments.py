"""Command lines: the options that training commands share, and user errors in one line."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from detectron2.utils import comm

from imgcls.data.workers import is_worker_end, worker_error
from imgcls.engine.machine.memory import is_out_of_memory, out_of_memory

CONFIG_ENDINGS = (".yaml", ".yml")
DATA_PARALLEL, NUM_GPUS = "--data-parallel", "--num-gpus"


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


def add_config_file(
    parser: argparse.ArgumentParser, what: str = "YAML, a path or a name under configs/", **options: Any
) -> None:
    """``--config-file FILE [FILE ...]``: the option of every command that reads a config; ``args.config_file``.

    A list, of which later files override earlier ones; with ``action="append"`` a list of such lists.
    """
    options = {"nargs": "+", "default": [], **options}
    parser.add_argument("--config-file", metavar="FILE", help=f"{what}; of several the later ones win", **options)


def training_parser(description: str) -> Parser:
    """Options of detectron2's own train_net.py, with its names."""
    parser = overriding_parser(description)
    add_config_file(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        default=False,
        const=True,
        metavar="PATH",
        help="go on from that checkpoint; without PATH from the newest whole one in OUTPUT_DIR",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument(
        NUM_GPUS, type=_count, default=1, metavar="N", help="processes on this machine (not read under torchrun)"
    )
    parser.add_argument("--num-machines", type=_count, default=1, metavar="N", help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="K", help="this machine's number")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="where the processes meet, e.g. tcp://10.0.0.1:29500"
    )
    parser.add_argument(
        "--dist-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="a process that does not answer the others for so long ends them all (default 300)",
    )
    return parser


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above 0")
    return int(word)


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds above 0")
    return seconds


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, wherever they stand, and as ``opts`` the words between and after them: KEY VALUE pairs.

    Words in .yaml or .yml that come first, behind a ``--config-file``, are further configs. ``--resume`` takes the next
    word only if that is a checkpoint, so that ``--resume KEY VALUE`` stays what it looks like.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if DATA_PARALLEL in argv and NUM_GPUS in parser._option_string_actions:
        parser.exit(2, f"error: one process for several GPUs is not offered; type: {_torchrun_line(argv)}\n")
    options, words = _sorted_out(parser, argv)
    for word in words[::2]:
        if word.endswith(CONFIG_ENDINGS):
            parser.error(f"configs come right behind --config-file FILE: {word} stands where a KEY should")
    args = parser.parse_args(options)
    args.opts = words
    return args


def _sorted_out(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options, each config behind its ``--config-file``, and the words that belong to none."""
    options: list[list[str]] = []  # each with its value
    configs: list[str] | None = None  # the --config-file that further ones join
    words: list[str] = []
    waiting = deque(argv)
    while waiting:
        word = waiting.popleft()
        if not word.startswith("--") and word != "-h":  # one dash may begin a value, such as -1e-3
            further = configs is not None and not words and word.endswith(CONFIG_ENDINGS)
            (configs if configs is not None and further else words).append(word)
            continue
        name, equals, value = word.partition("=")
        action = _action(parser, name)
        options.append([word])
        if action.dest == "config_file":
            if configs is not None and not isinstance(action, argparse._AppendAction):
                parser.error("--config-file is given twice; further configs follow the first: --config-file A B")
            configs = options[-1]
            configs[:] = [name, value] if equals else [name]
        takes = action.nargs != 0 and not equals and bool(waiting) and not waiting[0].startswith("--")
        if takes and (action.dest != "resume" or _is_checkpoint(waiting[0])):
            options[-1].append(waiting.popleft())
    return [word for option in options for word in option], words


def _action(parser: argparse.ArgumentParser, name: str) -> argparse.Action:
    """The option that ``name``, or its unmistakable beginning, stands for."""
    known = parser._option_string_actions
    fitting = {known[option].dest: known[option] for option in known if option.startswith(name) and name != "--"}
    if name in known or len(fitting) == 1:
        return known.get(name) or next(iter(fitting.values()))
    near = difflib.get_close_matches(name, known, n=1)
    parser.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _is_checkpoint(word: str) -> bool:
    """Whether the word behind ``--resume`` is meant as a file: no KEY has a slash or is called so."""
    if word.endswith(CONFIG_ENDINGS):
        return False
    return word.endswith(".pth") or os.sep in word or os.path.isfile(word)


def _torchrun_line(argv: Sequence[str]) -> str:
    """The command without ``--data-parallel``, as so many processes as ``--num-gpus`` says, or as one a GPU."""
    replaced = Parser(add_help=False, allow_abbrev=False)
    replaced.add_argument(DATA_PARALLEL, action="store_true")
    replaced.add_argument(NUM_GPUS, type=_count, default=max(2, torch.cuda.device_count()))
    args, words = replaced.parse_known_args(argv)
    # "imgcls train" is what python -m imgcls train calls itself.
    program = ["-m", *sys.argv[0].split()] if sys.argv[0].startswith("imgcls ") else [sys.argv[0]]
    return shlex.join(["torchrun", "--standalone", f"--nproc_per_node={args.num_gpus}", *program, *words])


def one_line_errors(work: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a user error (``ValueError``, ``OSError``, an extra that is absent) into one line on stderr, exit code 2.

    So do the death of a data worker and the end of the memory.

    IMGCLS_TRACEBACK=1 shows the traceback instead.
    """

    @functools.wraps(work)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return work(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            _stop(error)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                _stop(out_of_memory(error))
            # torch says so from a signal handler, so it may come up in the middle of a training step.
            if not is_worker_end(error):
                raise
            _stop(worker_error(error))
        except KeyboardInterrupt:
            sys.exit(130)

    return guarded


def _stop(error: Exception) -> NoReturn:
    if os.environ.get("IMGCLS_TRACEBACK"):
        raise error
    rank = f" (rank {comm.get_rank()})" if comm.get_world_size() > 1 else ""
    print(f"error{rank}: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
