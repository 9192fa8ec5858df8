"""Train or evaluate a classifier with the plain loop, or with detectron2's DefaultTrainer (``--builtin``)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from imgcls.checkpoint import checkpoint_to_resume
from imgcls.commands.arguments import one_line_errors, parse, training_parser
from imgcls.commands.recipe import training_config
from imgcls.engine import ClsTrainer, Run, finalize, setup, start_log, train
from imgcls.engine.machine.cpu_settings import take_over, undecided
from imgcls.engine.measuring.batch_size import advice_of, trials
from imgcls.engine.measuring.batch_size import told as told_trial
from imgcls.engine.measuring.tuning import tune
from imgcls.engine.ranks import stopping
from imgcls.engine.ranks.distributed import launch
from imgcls.engine.replay import replay
from imgcls.engine.replay import told as told_replay

logger = logging.getLogger(__name__)


def parser(builtin: bool = False) -> argparse.ArgumentParser:
    """The options of the two training commands."""
    how = "detectron2's DefaultTrainer" if builtin else "the plain loop"
    made = training_parser(f"Train or evaluate a classification network with {how}.")
    made.add_argument(
        "--data", default="", metavar="DIR", help="folder of class folders, or the root of the config's data set"
    )
    made.add_argument("--variant", default="", metavar="NAME", help="network, e.g. mobilenet_v1_1.0")
    made.add_argument("--output", default="", metavar="DIR", help="OUTPUT_DIR; with --eval-only for tables of classes")
    made.add_argument(
        "--replay", default="", metavar="FILE", help="take the step again that a replay_*.pth was written for, and stop"
    )
    made.add_argument("--tune", action="store_true", help="measure precision and memory format first, take the fastest")
    made.add_argument(
        "--find-batch-size", action="store_true", help="print the largest power of two that fits into memory, and stop"
    )
    made.set_defaults(builtin=builtin)
    return made


@one_line_errors
@stopping.listening()
def work(args: argparse.Namespace) -> None:
    """What each process does."""
    start_log("")
    cfg = training_config(args)
    if args.eval_only and args.resume:
        cfg.MODEL.WEIGHTS = str(checkpoint_to_resume(args.resume, Path(cfg.OUTPUT_DIR)) or cfg.MODEL.WEIGHTS)
    if args.replay:
        cfg.SOLVER.PARALLEL = "ddp"  # the file is the same, and gradients can be looked at whole
        print(told_replay(replay(Run(*finalize(cfg)), Path(args.replay))))
        return
    if args.tune:
        _tune(cfg, args)
    cfg, data = setup(cfg, resume=args.resume, eval_only=args.eval_only)
    if args.eval_only:
        _evaluate(Run(cfg, data), args.output)
        return
    if args.builtin:
        trainer = ClsTrainer(cfg, data)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    else:
        run = Run(cfg, data)
        run.start(resume=args.resume)
        results = train(run)
    _judge(cfg, results)


def _tune(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set precision and memory format in ``cfg``; of a run that goes on they are decided already."""
    if args.eval_only or checkpoint_to_resume(args.resume, Path(cfg.OUTPUT_DIR)) is not None:
        logger.info("--tune: there is nothing to choose, the checkpoint's settings hold")
        return
    decided, data = finalize(undecided(cfg))
    tune(decided, data)
    take_over(decided, cfg)


def _find_batch_size(args: argparse.Namespace) -> None:
    """Print each batch that was tried, and what to type."""
    start_log("")
    if "WORLD_SIZE" in os.environ:
        raise ValueError("--find-batch-size starts its own processes; run it without torchrun, with --num-gpus N")
    cfg = training_config(args)
    cfg.SOLVER.IMS_PER_BATCH = args.num_gpus * max(2, cfg.SOLVER.IMS_PER_BATCH // args.num_gpus)
    cfg, data = finalize(cfg)
    found = []
    for trial in trials(cfg, data, ranks=args.num_gpus, most=data.images // args.num_gpus):
        found.append(trial)
        print(told_trial(trial), flush=True)
    ranks = args.num_gpus * args.num_machines
    print(advice_of(found, ranks))


def _evaluate(run: Run, output: str) -> None:
    run.load_initial(run.cfg.MODEL.WEIGHTS)
    results = run.evaluate()
    logger.info("classes:\n%s", run.evaluating.class_table())
    if comm.is_main_process():
        if output:
            Path(output).mkdir(parents=True, exist_ok=True)
            run.evaluating.write_class_tables(Path(output))
        print_results(results)


def print_results(results: dict[str, Any]) -> None:
    """One line a metric on stdout, for people and for scripts."""
    for task, figures in results.items():
        for name, value in figures.items():
            print(f"{task}/{name} {value:.4f}")


def _judge(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Print the results; exit with 1 when they miss what the config's file expects of its own run."""
    if not comm.is_main_process():
        return
    print_results(results)
    if cfg.TEST.EXPECTED_RESULTS and not verify_results(cfg, results):
        sys.exit(1)


@one_line_errors
def main(argv: Sequence[str] | None = None, *, builtin: bool = False) -> None:
    """The command: parse, then run :func:`work` in as many processes as were asked for."""
    args = parse(parser(builtin), argv)
    if args.find_batch_size:
        _find_batch_size(args)
    else:
        launch(work, args)
