"""The campaign's report: what it speaks of, every case, and sums to look at."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from imgcls.checkpoint import write_whole

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "torchvision", "detectron2", "fvcore")
# What decides whether work is lost; the record counts for these files only.
CODE = (
    "imgcls/engine/*.py",
    "imgcls/engine/output/*.py",
    "imgcls/engine/ranks/*.py",
    "imgcls/checkpoint/*.py",
    "imgcls/solver/*.py",
    "imgcls/data/loaders.py",
    "imgcls/data/guarded_loader.py",
    "imgcls/data/workers.py",
    "imgcls/data/samplers.py",
    "imgcls/commands/train.py",
    "scripts/fault_campaign.py",
    "scripts/faults/*.py",
)


def digest() -> str:
    """SHA-256 of the code that the report speaks of, without lines of comments and blank ones."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
        found.update(path.relative_to(ROOT).as_posix().encode())
        found.update("\n".join(line for line in lines if line and not line.lstrip().startswith("#")).encode())
    return found.hexdigest()


def heading(kills: int, seed: int, broken: str) -> dict[str, Any]:
    """Where, with what and of what the cases speak."""
    versions = {library: importlib.import_module(library).__version__ for library in LIBRARIES}
    return {
        "command": f"python scripts/fault_campaign.py --kills {kills} --seed {seed} --out docs/data/faults.json",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "versions": {"python": platform.python_version(), **versions},
        "digest": digest(),
        "kills": kills,
        "seed": seed,
        **({"broken": broken} if broken else {}),
    }


def read(path: Path, head: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cases that are recorded already, by the part that they belong to; none of another campaign's."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    same = all(content.get(key) == head.get(key) for key in ("digest", "kills", "seed", "broken", "versions"))
    return dict(content["parts"]) if same else {}


def write(path: Path, head: dict[str, Any], parts: dict[str, list[dict[str, Any]]], seconds: float) -> None:
    """Write the report whole or not at all."""
    parts = dict(sorted(parts.items()))
    content = {**head, "seconds": round(seconds), "sums": sums(cases(parts)), "parts": parts}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def cases(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every case of a report."""
    return [case for records in parts.values() for case in records]


def sums(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind: how many cases, how many of them good, bad newest checkpoints, ends that differ, the longest time."""
    kinds: dict[str, dict[str, Any]] = {}
    for case in found:
        kind = kinds.setdefault(
            case["kind"], {"cases": 0, "good": 0, "bad newest": 0, "different": 0, "most lost": 0, "longest s": 0.0}
        )
        kind["cases"] += 1
        kind["good"] += not case["problems"]
        kind["bad newest"] += bool(case.get("bad_newest"))
        kind["different"] += case.get("equal") is False
        kind["most lost"] = max(kind["most lost"], case.get("lost_iterations") or 0)
        kind["longest s"] = max(kind["longest s"], case.get("seconds") or 0.0)
    return kinds


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The sums, to read."""
    names = list(next(iter(rows.values()), {}))
    lines: list[Sequence[str]] = [("kind", *names)]
    lines += [(kind, *(f"{row[name]:g}" for name in names)) for kind, row in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
