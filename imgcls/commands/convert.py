"""Convert a classifier's checkpoint to the file that starts a detector."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.transfer import convert, detector_fragment


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    made.add_argument("--weights", required=True, metavar="FILE", help="model_final.pth or model_best.pth of a run")
    made.add_argument("--output", required=True, metavar="FILE", help="the .pth to write; a .yaml comes beside it")
    made.add_argument(
        "--fold-normalization",
        action="store_true",
        help="fold channel order and std into the first convolution, for detectron2's default BGR input of std 1",
    )
    made.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    output = Path(args.output)
    handover = convert(args.weights, output, fold=args.fold_normalization, overwrite=args.overwrite)
    fragment = output.with_suffix(".yaml")
    fragment.write_text(detector_fragment(handover, output))
    size = output.stat().st_size / 2**20
    print(f"{output}: {len(handover.weights)} tensors of {handover.architecture.variant}, {size:.1f} MiB")
    contract = handover.contract
    print(f"input: {contract.input_format}, mean {list(contract.pixel_mean)}, std {list(contract.pixel_std)}")
    print(f"{fragment}: the keys that a detector's YAML needs")
