"""Write the mean of several checkpoints of one network, as a file of weights for MODEL.WEIGHTS and the hand-over."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgcls.checkpoint import average_checkpoints, load_weights, write_checkpoint
from imgcls.commands.arguments import Parser, add_config_file, one_line_errors
from imgcls.config import find_config, load_config
from imgcls.engine import Run, finalize, start_log
from imgcls.engine.precise_bn import recompute_statistics

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    made.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="model_*.pth of one network, two or more")
    made.add_argument("--output", required=True, metavar="FILE", help="the .pth to write; its manifest comes beside it")
    made.add_argument(
        "--shares", nargs="+", type=float, default=[], metavar="X", help="of each checkpoint; default: equal ones"
    )
    made.add_argument(
        "--recompute-statistics",
        action="store_true",
        help="compute the running statistics of BatchNorm anew over TEST.PRECISE_BN.NUM_ITER training batches",
    )
    add_config_file(made, "YAML for that; default: config.yaml in the folder of the last checkpoint")
    made.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    output, paths = Path(args.output), [Path(name) for name in args.checkpoints]
    if output.suffix != ".pth":
        raise ValueError(f"the mean is written as a .pth; got {output}; change --output")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or add --overwrite")
    start_log("")
    content = average_checkpoints(paths, args.shares)
    if args.recompute_statistics:
        content["model"] = with_new_statistics(content, configs_of(args, paths[-1]))
    write_checkpoint(output, content)
    for file in content["averaged"]:
        print(f"{file['share']:.4f} of {file['file']}")
    statistics = (
        "computed anew"
        if args.recompute_statistics
        else "the mean of the files' own; --recompute-statistics computes them"
    )
    has_any = any(name.endswith("running_var") for name in content["model"])
    print(f"running statistics: {statistics if has_any else 'this network has none'}")
    print(f"{output}: {len(content['model'])} tensors; give it to MODEL.WEIGHTS or to convert_to_detection --weights")


def with_new_statistics(content: dict[str, Any], configs: Sequence[Path]) -> dict[str, Any]:
    """``content``'s weights with running statistics of the training set that ``configs`` names."""
    cfg, data = finalize(load_config(configs))
    run = Run(cfg, data)
    load_weights(run.model, content["model"]).require_complete("the mean", "--config-file must be the run's own")
    assert data.train is not None  # it was opened for training
    recompute_statistics(cfg, run.model, data.train)
    return dict(run.model.state_dict())


def configs_of(args: argparse.Namespace, checkpoint: Path) -> list[Path]:
    """Those of ``--config-file``, otherwise the config.yaml beside ``checkpoint``; a ``ValueError`` without either."""
    beside = checkpoint.with_name("config.yaml")
    if not args.config_file and not beside.is_file():
        raise ValueError(f"there is no {beside}; give the run's config as --config-file")
    return [find_config(name) for name in args.config_file] or [beside]
