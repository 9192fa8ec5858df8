"""Train or evaluate a detectron2 detector, started from a converted backbone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from imgcls.checkpoint import Resume, SafeCheckpointer, checkpoint_to_resume, continues
from imgcls.commands.arguments import one_line_errors, parse, training_parser
from imgcls.commands.train import print_results
from imgcls.config import find_config, load_config, require_sound
from imgcls.engine import describe, start_log
from imgcls.engine.detector import DETECTOR_STATE, DetectorTrainer, register_detection_sets
from imgcls.engine.output.output_dir import claim
from imgcls.engine.ranks.distributed import first_rank_does, launch, wrap_for_ranks
from imgcls.engine.setup import decide_device


def parser() -> argparse.ArgumentParser:
    """The options of detectron2's own train_net.py."""
    return training_parser(__doc__ or "")


def _config(args: argparse.Namespace) -> CfgNode:
    if not args.config_file:
        raise ValueError("give the detector's YAML: --config-file configs/detection/mobilenet_v1_retinanet_fpn.yaml")
    cfg = load_config([find_config(name) for name in args.config_file], args.opts)
    decide_device(cfg)
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise ValueError("detectron2's detectors train with AMP on GPUs only; set SOLVER.AMP.ENABLED False")
    register_detection_sets(cfg)
    require_sound(cfg)
    return cfg


@one_line_errors
def work(args: argparse.Namespace) -> None:
    """What each process does."""
    start_log("")
    cfg = _config(args)
    if isinstance(args.resume, str):
        checkpoint_to_resume(args.resume, Path(cfg.OUTPUT_DIR), state=DETECTOR_STATE)
        if args.eval_only:
            cfg.MODEL.WEIGHTS, args.resume = args.resume, False
    if not args.eval_only:
        first_rank_does(lambda: claim(cfg.OUTPUT_DIR, resume=continues(args.resume, Path(cfg.OUTPUT_DIR))))
    cfg.freeze()
    start_log("" if args.eval_only else cfg.OUTPUT_DIR)
    if not args.eval_only:
        first_rank_does(lambda: describe(cfg))
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    results = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    if comm.is_main_process() and results:
        print_results(results)
        if not verify_results(cfg, results):
            sys.exit(1)


def _train(cfg: CfgNode, resume: Resume) -> dict[str, Any]:
    trainer = DetectorTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", {})


def _evaluate(cfg: CfgNode, resume: Resume) -> dict[str, Any]:
    if not (cfg.MODEL.WEIGHTS or resume):
        raise ValueError("--eval-only needs the weights to evaluate: add MODEL.WEIGHTS OUTPUT_DIR/model_final.pth")
    model = DetectorTrainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR if resume else "")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    # Superfluous tensors do no harm to what is evaluated; a missing one would be evaluated at random.
    needed = replace(checkpointer.report, unexpected=())
    needed.require_complete(cfg.MODEL.WEIGHTS or cfg.OUTPUT_DIR, "Give MODEL.WEIGHTS a detector that this YAML trained")
    return DetectorTrainer.test(cfg, wrap_for_ranks(model))


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    if args.num_gpus > 1 and not torch.cuda.is_available():
        raise ValueError(
            f"--num-gpus {args.num_gpus}: detectron2's trainer runs one process on a machine without a GPU; "
            "leave --num-gpus away"
        )
    launch(work, args)
