"""Try every network that timm lists as a variant ``timm:<name>`` and record what became of it.

    python scripts/timm_campaign.py --out docs/data/timm.json --minutes 15

Of each: its maps, how many of timm's tensors have a place, and the largest difference of its maps, in fp32 and relative
to the map, from those of timm's own ``features_only`` network with the same random weights. Networks above
--most-parameters are built without memory (meta device): their maps and tensors are looked at, nothing is computed.

It goes on where it was interrupted: what the file holds is kept while the bridge's code and timm's version are the
same. timm's modules take turns, each with its networks in the order that their names suggest, smallest first.
Exits with 1 when a network's maps differ, or it fails for another reason than that timm offers no maps.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import sys
import time
import warnings
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

import imgcls
from imgcls.checkpoint import without_counters, write_whole
from imgcls.modeling import Architecture, Trunk, family_of, make_trunk
from imgcls.modeling.backbones import timm_bridge
from imgcls.transfer.parity import maps_difference, maps_reference, randomise, trunk_of
from imgcls.transfer.references import build_reference

ROOT = Path(imgcls.__file__).resolve().parents[1]
LIMIT = 1e-5
# Pixels: the probe's size, which a hand-over needs; networks that do not take it are compared at their own.
SIDE = 128
# Words in names that tell sizes, smallest first.
SIZES = "atto femto zepto pico nano micro tiny xxt xxs xt xs mini small s medium m base b l large x xl xxl huge giant"


def digest() -> str:
    """SHA-256 of the bridge that the record speaks of."""
    return hashlib.sha256(Path(timm_bridge.__file__).read_bytes()).hexdigest()


def in_turn(names: list[str]) -> list[str]:
    """``names`` with timm's modules taking turns, each one's networks in the order of their supposed sizes."""
    modules = defaultdict(list)
    for name in names:
        modules[model_entrypoint(name).__module__].append(name)
    rows = zip_longest(*(sorted(own, key=supposed_size) for own in modules.values()))
    return [name for row in rows for name in row if name is not None]


def supposed_size(name: str) -> tuple[int, list[int], str]:
    """What a name says of the network's size: a word such as "tiny", then its numbers."""
    ranks = {word: rank for rank, word in enumerate(SIZES.split())}
    words = [ranks[word] for word in re.split(r"[_\d]+", name) if word in ranks]
    return max(words, default=0), [int(number) for number in re.findall(r"\d+", name)], name


def try_network(name: str, most_parameters: float) -> dict[str, Any]:
    """The record of one network; "problem" where something is wrong with ours, "no maps" where timm has none."""
    variant = f"timm:{name}"
    try:
        family = family_of(variant)
    except ValueError as error:
        return {"no maps": str(error)}
    row, source = family.variants[variant], family.sources["timm"]
    with torch.device("meta"):
        trunk = make_trunk(Architecture(variant), out_features=row.map_names)
        theirs = without_counters(build_reference("timm", name, row.options).state_dict())
    own = without_counters(trunk.state_dict())
    mapped = {rule.ours for rule in source.rules_for(row) if rule.ours}
    record: dict[str, Any] = {
        "maps": [list(one) for one in row.maps],
        "stages": len(trunk.stage_modules()),
        "parameters": sum(parameter.numel() for parameter in trunk.parameters()),
        "tensors": len(own),
        "behind the last map": len(theirs) - len(own),
    }
    without = [key for key in own if key not in mapped]
    if without:
        record["problem"] = f"{len(without)} tensors have no counterpart in timm: {', '.join(without[:3])}"
    elif record["parameters"] > most_parameters:
        record["compared"] = f"not: more than {most_parameters / 1e6:g} M parameters"
    else:
        record |= compared(name)
    return record


def compared(name: str) -> dict[str, Any]:
    """The largest difference of the maps, and the size of the image."""
    variant = f"timm:{name}"
    row = family_of(variant).variants[variant]
    ours, reference, weights = pair(variant)
    refused = ""
    for side in dict.fromkeys((SIDE, row.image_size)):
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        try:
            difference = max(maps_difference(ours, reference, x).values())
        except ValueError as error:  # made for one size
            refused = str(error)
            continue
        found: dict[str, Any] = {"compared": f"{side}x{side}", "difference": difference, **weights}
        if refused:
            found["one size"] = refused.rpartition(": ")[2]
        return found if difference <= LIMIT else {**found, "problem": f"the maps differ by {difference:.1e}"}
    return {"problem": refused}


def pair(variant: str) -> tuple[Trunk, nn.Module, dict[str, str]]:
    """Ours and timm's with the same weights: unlike initial ones, unless the maps overflow with these."""
    family = family_of(variant)
    row, source = family.variants[variant], family.sources["timm"]
    for weights in ({}, {"weights": "initial, for others made the maps overflow"}):
        torch.manual_seed(0)
        whole = build_reference("timm", row.name, row.options)
        if not weights:
            randomise(whole, 0)
        tensors = whole.state_dict()
        reference = maps_reference(variant, "timm", tensors)
        with torch.no_grad():
            maps = reference(torch.randn(1, 3, row.image_size, row.image_size))
        if all(torch.isfinite(value).all() for value in maps):
            break
    return trunk_of(variant, source, tensors), reference, weights


def read(path: Path) -> dict[str, Any]:
    """The networks of the record so far; none where the bridge or timm has changed since."""
    if not path.is_file():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    fresh = record["digest"] == digest() and record["timm"] == timm.__version__
    return dict(record["networks"]) if fresh else {}


def write(path: Path, networks: dict[str, Any], listed: list[str], most_parameters: float) -> None:
    """Write the record whole or not at all."""
    record = {
        "command": "python scripts/timm_campaign.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"one of {os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "timm": timm.__version__,
        "digest": digest(),
        "computed up to": f"{most_parameters / 1e6:g} M parameters; larger networks: structure only",
        "listed": len(listed),
        "covered": len(networks),
        "networks": dict(sorted(networks.items())),
        "remaining": [name for name in listed if name not in networks],
    }
    # One line a network.
    text = json.dumps(record, indent=1)
    text = re.sub(r"\n {3,}|\n  (?=[}\]])", " ", text)
    write_whole(path, text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/timm.json", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="stop after so long")
    parser.add_argument("--most-parameters", type=float, default=25e6, metavar="N", help="25e6 unless said")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    listed, started, written = timm.list_models(), time.perf_counter(), 0.0
    networks = read(args.out)
    for name in in_turn(listed):
        if time.perf_counter() - started > 60 * args.minutes:
            break
        if "problem" in networks.get(name, {"problem": ""}):
            try:
                networks[name] = try_network(name, args.most_parameters)
            except Exception as error:  # whatever timm's network raises belongs in the record
                networks[name] = {"problem": f"{type(error).__name__}: {error}"[:300]}
            if "problem" in networks[name]:
                print(f"{name}: {networks[name]['problem']}", flush=True)
            if time.perf_counter() - written > 20:
                write(args.out, networks, listed, args.most_parameters)
                written = time.perf_counter()
    write(args.out, networks, listed, args.most_parameters)
    failed = [name for name, record in networks.items() if "problem" in record]
    print(f"{len(networks)} of {len(listed)} networks of timm {timm.__version__}; {len(failed)} with a problem")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
