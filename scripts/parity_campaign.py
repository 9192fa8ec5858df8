"""Examine every variant in full and record what was found: parity, maps, gradients, freezing, detectors, costs.

    python scripts/parity_campaign.py --out docs/data/parity.json

It goes on where it was interrupted: what the file holds is kept while the family's code is the same (--all: examine
again), and a detector that was not tried yet is added to it. On two idle cores the whole takes about an hour. Exits
with 1 when a variant has a problem.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import sys
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import imgcls
from imgcls.checkpoint import write_whole
from imgcls.modeling import Family, all_variants, family_of
from imgcls.transfer.examine import DETECTORS, detector_problems, examine, in_detectors

ROOT = Path(imgcls.__file__).resolve().parents[1]
LIBRARIES = ("torch", "torchvision", "timm", "efficientnet-lite-pytorch")


def family_digest(family: Family) -> str:
    """SHA-256 of the family's file and of the building blocks and shared trunks that it imports."""
    own = inspect.getmodule(family.build)
    assert own is not None
    digest = hashlib.sha256()
    for path in sorted(_sources(own)):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(module: ModuleType) -> set[Path]:
    """The files of ``module``, of imgcls.layers, and of whatever else of imgcls.modeling.backbones it imports."""
    assert module.__file__ is not None
    found: set[Path] = set()
    waiting = [Path(module.__file__).resolve()]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and _counts(node.module):
                waiting += [file for file in _defining(node) if file not in found]
    return found


def _defining(node: ast.ImportFrom) -> set[Path]:
    """The files that define what an import statement imports; a package's ``__init__`` only passes it on."""
    module = importlib.import_module(node.module or "")
    definers = [inspect.getmodule(getattr(module, alias.name)) for alias in node.names]
    files = [Path(definer.__file__).resolve() for definer in (*definers, module) if definer and definer.__file__]
    return {file for file in files if file.name != "__init__.py" and file.is_relative_to(ROOT / "imgcls")}


def _counts(module: str) -> bool:
    return module.startswith(("imgcls.layers", "imgcls.modeling.backbones", "imgcls.modeling.inverted"))


def read(path: Path) -> dict[str, Any]:
    """The record so far; an empty one where there is none."""
    if path.is_file():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {"variants": {}}


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record whole or not at all."""
    order = {variant: index for index, variant in enumerate(all_variants())}
    record["variants"] = dict(sorted(record["variants"].items(), key=lambda item: order.get(item[0], len(order))))
    write_whole(path, json.dumps(record, indent=1) + "\n")


def with_detectors(variant: str, known: dict[str, Any], lacking: list[str]) -> dict[str, Any]:
    """The record of a variant with more detectors in it."""
    built = in_detectors(variant, lacking)
    return {
        **known,
        "detectors": {**known["detectors"], **built},
        "problems": [*known["problems"], *detector_problems(built)],
    }


def conditions() -> dict[str, Any]:
    """Where and with what the figures were made."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    return {"machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU", "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/parity.json", metavar="FILE")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="variants to examine, e.g. 'resnet*'")
    parser.add_argument("--all", action="store_true", help="examine again what is up to date")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    failed = []
    for variant in all_variants():
        if not fnmatch(variant, args.only):
            continue
        digest = family_digest(family_of(variant))
        known = read(args.out)["variants"].get(variant, {})
        lacking = [detector for detector in DETECTORS if detector not in known.get("detectors", {})]
        anew = args.all or known.get("digest") != digest or known["problems"]
        if anew or lacking:
            started = time.perf_counter()
            known = {"digest": digest, **examine(variant)} if anew else with_detectors(variant, known, lacking)
            known["seconds"] = round(known.get("seconds", 0) + time.perf_counter() - started, 1)
            # Read again: another process may be examining other variants into the same file.
            record = {**read(args.out), "command": "python scripts/parity_campaign.py", **conditions()}
            record["date"] = datetime.date.today().isoformat()
            record["variants"][variant] = known
            write(args.out, record)
            print(f"{variant}: {'; '.join(known['problems']) or 'ok'} ({known['seconds']} s)", flush=True)
        failed += [variant] if known["problems"] else []
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
