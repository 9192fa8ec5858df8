"""Print what a network costs and offers: parameters, multiply-adds, activations, maps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tabulate import tabulate

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.modeling import make_classifier, plain
from imgcls.modeling.analysis import Cost, analyze
from imgcls.transfer.examine import CONTRACT, side_of


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    made.add_argument("--variant", required=True, nargs="+", metavar="NAME", help="networks, e.g. resnet50 swin_t")
    made.add_argument("--size", type=int, default=0, metavar="PIXELS", help="side of the image; 0: the paper's")
    made.add_argument("--classes", type=int, default=1000, metavar="N", help="outputs of the classifier")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    rows = []
    for variant in args.variant:
        cost = analyze(make_classifier(plain(variant), args.classes, CONTRACT), args.size or side_of(variant))
        rows.append(cost_row(variant, cost))
    header = (
        "variant",
        "parameters",
        "of the body",
        "multiply-adds",
        "activations",
        "image",
        "maps: stride x channels",
    )
    print(tabulate(rows, headers=header, disable_numparse=True))


def cost_row(variant: str, cost: Cost) -> tuple[str, ...]:
    """One line of the table, in the units that papers use."""
    maps = ", ".join(f"{name} {stride}x{channels}" for name, (stride, channels) in cost.maps.items())
    return (
        variant,
        f"{cost.parameters / 1e6:.2f} M",
        f"{cost.body / 1e6:.2f} M",
        f"{cost.multiply_adds / 1e9:.3f} G",
        f"{cost.activations / 1e6:.2f} M",
        f"{cost.size} px",
        maps,
    )
