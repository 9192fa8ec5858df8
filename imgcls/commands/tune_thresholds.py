"""Choose the threshold of each class with the highest F1 on DATASETS.TEST, and write a checkpoint that has them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from imgcls.checkpoint import read_checkpoint, write_checkpoint
from imgcls.commands.arguments import add_config_file, one_line_errors, overriding_parser, parse
from imgcls.commands.train import print_results
from imgcls.config import find_config, load_config
from imgcls.engine import Run, setup, start_log
from imgcls.structures import Problem

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    made = overriding_parser(__doc__ or "")
    made.add_argument("--weights", required=True, metavar="FILE", help="model_best.pth or model_final.pth of a run")
    made.add_argument("--output", required=True, metavar="FILE", help="the copy to write, with the thresholds in it")
    add_config_file(made, "YAML; default: config.yaml in the folder of --weights")
    made.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or add --overwrite")
    start_log("")
    cfg = load_config(_configs_of(args), [*args.opts, "MODEL.WEIGHTS", repr(args.weights)])
    cfg, opened = setup(cfg, eval_only=True)
    if not cfg.MODEL.HEAD.MULTI_LABEL:
        allowed = "a set with several labels a picture (with one, the best score decides)"
        raise Problem("there is nothing to tune", tuple(cfg.DATASETS.TEST), allowed, "DATASETS.TEST").error()
    run = Run(cfg, opened)
    run.load_initial(args.weights)
    results = run.tune_thresholds()
    content = {**read_checkpoint(args.weights), "thresholds": list(run.model.thresholds)}
    write_checkpoint(output, content, iteration=content.get("iteration", -1))
    logger.info("classes, on the pictures that the thresholds were chosen on:\n%s", run.evaluating.class_table())
    print_results(results)
    print(f"{output}: thresholds of {len(opened.classes)} classes, tuned on {', '.join(cfg.DATASETS.TEST)}")


def _configs_of(args: argparse.Namespace) -> list[Path]:
    beside = Path(args.weights).with_name("config.yaml")
    if not args.config_file and not beside.is_file():
        raise ValueError(f"there is no {beside}; give the run's config as --config-file")
    return [find_config(name) for name in args.config_file] or [beside]
