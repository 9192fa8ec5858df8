"""Import weights of another library: a file that starts a detector, and with its head a classifier."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.transfer import detector_fragment
from imgcls.transfer.classifier_config import classifier_yaml
from imgcls.transfer.import_weights import Imported, import_weights, write_import

NONE_LEFT = "none left over on either side"


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    made.add_argument("file", nargs="?", metavar="FILE", help="weights to import; without: the library's own are taken")
    made.add_argument(
        "--from",
        dest="library",
        required=True,
        metavar="LIBRARY",
        help="torchvision, timm, efficientnet_lite_pytorch, mae, vitdet, huggingface or detectron2",
    )
    made.add_argument("--variant", required=True, metavar="NAME", help="our network, e.g. resnet50")
    made.add_argument(
        "--tag", default="", metavar="TAG", help="which of the library's weights (IMAGENET1K_V2; timm: a1_in1k)"
    )
    made.add_argument("--in-channels", type=int, default=3, metavar="N", help="channels of your images; 3 unless said")
    made.add_argument(
        "--mean", type=float, nargs="+", metavar="M", help="of the images in 0..255, instead of the stated"
    )
    made.add_argument("--std", type=float, nargs="+", metavar="S", help="likewise")
    made.add_argument("--output", required=True, metavar="FILE", help="the .pth to write; a .yaml comes beside it")
    made.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    imported = import_weights(
        args.library,
        args.variant,
        args.file,
        tag=args.tag,
        in_channels=args.in_channels,
        mean=args.mean,
        std=args.std,
    )
    output = Path(args.output)
    write_import(imported, output, overwrite=args.overwrite)
    fragment = output.with_suffix(".yaml")
    fragment.write_text(detector_fragment(imported.handover, output))
    for line in report_lines(imported):
        print(line)
    print(f"{output}: give it to MODEL.WEIGHTS, of a classifier as of a detector")
    print(f"{fragment}: the keys that a detector's YAML needs")
    if imported.handover.classifier:
        config = output.with_suffix(".classifier.yaml")
        config.write_text(classifier_yaml(imported.handover, output, config))
        print(f"{config}: the classifier's config, to evaluate it or to train on")


def report_lines(imported: Imported) -> list[str]:
    """What was mapped, what the images must be like, and how far the logits are from the library's own."""
    handover, report = imported.handover, imported.report
    contract = handover.contract
    left = f"{len(imported.left)} of the file stand behind the last map and have no place: {_few(imported.left)}"
    lines = [
        f"{imported.origin}: {len(report.loaded)} tensors mapped, {left if imported.left else NONE_LEFT}"
        + (f"; trunk only: {len(report.new)} tensors of the head stay random" if report.new else ""),
        f"input: {contract.input_format}, mean {list(contract.pixel_mean)}, std {list(contract.pixel_std)}, "
        f"short side {contract.resize} {contract.interpolation}, centre {contract.size}",
    ]
    if imported.difference is None:
        lines.append(f"{imported.compared}: not compared ({imported.why_not})")
    else:
        difference = f"largest difference to the library's own network {imported.difference:.1e} (relative)"
        lines.append(f"{imported.compared}: {difference}")
    return lines


def _few(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
