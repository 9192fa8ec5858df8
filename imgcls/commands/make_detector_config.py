"""Write the YAML of a detectron2 detector over any network, or over a converted or imported backbone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.config import load_config, require_sound
from imgcls.modeling import plain
from imgcls.transfer import detector_yaml, read_handover
from imgcls.transfer.detector_config import DETECTORS
from imgcls.transfer.pretrained import IMAGENET_MEAN, IMAGENET_STD, contract_of


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    made.add_argument("--detector", required=True, choices=DETECTORS, help="detectron2's detector, 1x schedule")
    made.add_argument("--weights", default="", metavar="FILE", help="of convert_to_detection or import_weights")
    made.add_argument(
        "--variant", default="", metavar="NAME", help="network without weights; with --weights not needed"
    )
    made.add_argument("--output", required=True, metavar="FILE", help="the .yaml to write")
    made.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if bool(args.weights) == bool(args.variant):
        raise ValueError("give either --weights FILE, which knows its network, or --variant NAME")
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or add --overwrite")
    if args.weights:
        handover = read_handover(args.weights, mmap=True)
        architecture, contract = handover.architecture, handover.contract
    else:
        architecture = plain(args.variant)
        contract = contract_of(IMAGENET_MEAN, IMAGENET_STD, 224, 256, "bilinear")
    output.write_text(detector_yaml(args.detector, architecture, contract, args.weights))
    require_sound(load_config(output))
    print(f"{output}: {args.detector} over {architecture.variant}; train it with")
    print(f"  python tools/train_detector.py --config-file {output}")
