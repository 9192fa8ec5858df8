"""README and docs: commands parse, paths and links exist, tables are current, Python blocks run, outputs are real."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from torch import nn

import imgcls
from imgcls.__main__ import COMMANDS
from imgcls.checkpoint import write_checkpoint
from imgcls.commands import (
    analyze,
    average_checkpoints,
    benchmark_data,
    benchmark_train,
    doctor,
    make_detector_config,
    pack_dataset,
    plot_run,
    plot_schedule,
    prepare_data,
    prepare_digits,
    prepare_imagenet,
    prepare_voc,
    show_data,
    sweep,
    train_detector,
    verify,
)
from imgcls.commands import convert as convert_command
from imgcls.commands import import_weights as import_command
from imgcls.commands import train as train_command
from imgcls.commands import tune_thresholds as tune_command
from imgcls.commands.arguments import parse
from imgcls.config import find_config, load_config
from imgcls.data import digit_canvases
from imgcls.engine import Run, finalize
from imgcls.modeling import all_variants, families, family_of
from imgcls.transfer import convert, detector_fragment, read_handover

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "add-a-network", "augmentation", "averaging", "bad-input", "configuration", "data-sets", "data-speed", "detection",
    "distillation", "doctor", "faults", "fine-tuning", "hand-over", "import-weights", "lists", "multi-label",
    "networks", "own-images", "precision-and-sharding", "recipes", "resume", "sampling", "sandbox", "schedules",
    "seeing-runs", "shards", "stopping", "sweep", "timm", "training", "training-speed",
)))  # fmt: skip
# YAMLs of the reader's own, which no checkout has.
READERS_OWN = {
    "my_machine.yaml",
    "output/digits_sweep/best.yaml",
    "my_detector.yaml",
    "lite0_retinanet.yaml",
    "lite0.classifier.yaml",
}

Parse = Callable[[Sequence[str]], argparse.Namespace]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """docs/render_tables.py."""
    return load_script("docs/render_tables.py")


@dataclass(frozen=True)
class Block:
    """A fenced block: the comment in the line above it, its language and its lines."""

    mark: str
    language: str
    body: str


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"(?:^<!-- ([^\n]*) -->\n)?^( *)```(\w*)\n(.*?)^\2```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(match[1] or "", match[3], match[4]) for match in found]


def test_every_page_is_looked_at() -> None:
    assert sorted(PAGES) == sorted(["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])


def test_twin_blocks_are_found_with_their_mark() -> None:
    text = "a\n\n<!-- tested: x -->\n```python\n1\n```\n\n  ```sh\n  2\n  ```\n"
    assert blocks(text) == [Block("tested: x", "python", "1\n"), Block("", "sh", "  2\n")]


# -- commands --------------------------------------------------------------------------------------------------------

BEGINS = r"(?:[A-Z][A-Z_]*=\S+ +)*(?:python (?:tools/|scripts/|docs/|-m imgcls\b)|sh scripts/)"


def commands(text: str) -> list[str]:
    """The command lines of a page's blocks, and those in its running text that have options."""
    found = []
    for block in blocks(text):
        joined = block.body.replace("\\\n", " ")
        lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
        found += [line for line in lines if re.match(BEGINS, line)]
    for span in re.findall(r"(?<!`)`((?:python |sh )?(?:tools|scripts)/[^`\n]* --?[^`\n]*)`", text):
        starter = "" if span.startswith(("python ", "sh ")) else "sh " if ".sh" in span.split()[0] else "python "
        found.append(starter + span)
    return found


def overriding(parser: argparse.ArgumentParser) -> Parse:
    return lambda words: parse(parser, words)


class _ParsedError(Exception):
    """Carries what a main() parsed out of it, before it does anything."""


def only_parsing(main: Callable[[Sequence[str]], Any]) -> Parse:
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any) -> None:
        raise _ParsedError(original(self, *args))

    def parse_words(words: Sequence[str]) -> argparse.Namespace:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(_ParsedError) as caught:
            main(words)
        return caught.value.args[0]

    return parse_words


def only_parsing_no_words(main: Callable[[], Any]) -> Parse:
    """The same for a main() that takes its words from sys.argv."""

    def with_argv(words: Sequence[str]) -> Any:
        with mock.patch.object(sys, "argv", ["a script", *words]):
            return main()

    return only_parsing(with_argv)


PARSE: dict[str, Callable[[], Parse]] = {
    "tools/train_net.py": lambda: overriding(train_command.parser()),
    "tools/train_net_builtin.py": lambda: overriding(train_command.parser(builtin=True)),
    "tools/convert_to_detection.py": lambda: convert_command.parser().parse_args,
    "tools/verify_transfer.py": lambda: overriding(verify.parser()),
    "tools/train_detector.py": lambda: overriding(train_detector.parser()),
    "tools/import_weights.py": lambda: import_command.parser().parse_args,
    "tools/make_detector_config.py": lambda: make_detector_config.parser().parse_args,
    "tools/plot_schedule.py": lambda: overriding(plot_schedule.parser()),
    "tools/plot_run.py": lambda: plot_run.parser().parse_args,
    "tools/sweep.py": lambda: overriding(sweep.parser()),
    "tools/average_checkpoints.py": lambda: average_checkpoints.parser().parse_args,
    "tools/tune_thresholds.py": lambda: overriding(tune_command.parser()),
    "tools/benchmark_train.py": lambda: benchmark_train.parser().parse_args,
    "tools/benchmark_data.py": lambda: benchmark_data.parser().parse_args,
    "tools/doctor.py": lambda: overriding(doctor.parser()),
    "tools/show_data.py": lambda: overriding(show_data.parser()),
    "tools/analyze_model.py": lambda: analyze.parser().parse_args,
    "tools/pack_dataset.py": lambda: pack_dataset.parser().parse_args,
    "scripts/prepare_data.py": lambda: prepare_data.parser().parse_args,
    "scripts/prepare_imagenet.py": lambda: prepare_imagenet.parser().parse_args,
    "scripts/prepare_voc.py": lambda: only_parsing(prepare_voc.main),
    "scripts/prepare_digit_detection.py": lambda: only_parsing(prepare_digits.main),
    "scripts/demo.py": lambda: only_parsing(load_script("scripts/demo.py").main),
    "scripts/cpu_settings_accuracy.py": lambda: only_parsing_no_words(
        load_script("scripts/cpu_settings_accuracy.py").main
    ),
    "scripts/loader_memory.py": lambda: only_parsing_no_words(load_script("scripts/loader_memory.py").main),
    "scripts/parity_campaign.py": lambda: only_parsing_no_words(load_script("scripts/parity_campaign.py").main),
    "scripts/fault_campaign.py": lambda: only_parsing_no_words(load_script("scripts/fault_campaign.py").main),
    "scripts/timm_campaign.py": lambda: only_parsing_no_words(load_script("scripts/timm_campaign.py").main),
    "docs/render_tables.py": lambda: only_parsing(load_script("docs/render_tables.py").main),
}
PACKAGED = {
    "train": "tools/train_net.py",
    "train-builtin": "tools/train_net_builtin.py",
    "convert": "tools/convert_to_detection.py",
    "verify": "tools/verify_transfer.py",
    "train-detector": "tools/train_detector.py",
    "import-weights": "tools/import_weights.py",
    "make-detector-config": "tools/make_detector_config.py",
    "show-data": "tools/show_data.py",
    "benchmark-data": "tools/benchmark_data.py",
    "benchmark-train": "tools/benchmark_train.py",
    "doctor": "tools/doctor.py",
    "analyze": "tools/analyze_model.py",
    "plot-schedule": "tools/plot_schedule.py",
    "plot-run": "tools/plot_run.py",
    "sweep": "tools/sweep.py",
    "average-checkpoints": "tools/average_checkpoints.py",
    "tune-thresholds": "tools/tune_thresholds.py",
    "pack-dataset": "tools/pack_dataset.py",
    "prepare-data": "scripts/prepare_data.py",
    "prepare-imagenet": "scripts/prepare_imagenet.py",
    "prepare-voc": "scripts/prepare_voc.py",
    "prepare-digits": "scripts/prepare_digit_detection.py",
}
# A shell script -> the program that it hands its words to, and whether the first of them is the config.
SHELL: dict[str, tuple[str, bool]] = {
    "scripts/train_net.sh": ("tools/train_net.py", True),
    "scripts/train_net_builtin.sh": ("tools/train_net_builtin.py", True),
    "scripts/demo.sh": ("scripts/demo.py", False),
    "scripts/demo_seeds.sh": ("", False),  # a folder
    "scripts/test.sh": ("", False),  # pytest's
    "scripts/setup_env.sh": ("", False),
}


def complaint(line: str) -> str:
    """What is wrong with a command line; empty when it would run up to its data."""
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z][A-Z_]*=.*", words[0]):
        words = words[1:]
    starter, program, *rest = words
    if program == "-m":
        if not rest or rest[0] != "imgcls" or (rest[1:] and rest[1] not in PACKAGED):
            return f"no such command: {' '.join(rest)}"
        if not rest[1:]:
            return ""
        program, rest = PACKAGED[rest[1]], rest[2:]
    if not (ROOT / program).is_file():
        return f"no such script: {program}"
    if starter == "sh":
        if program not in SHELL:
            return f"unknown to this test: {program}"
        program, config_first = SHELL[program]
        rest = ["--config-file", *rest] if config_first else rest
    return parsing_complaint(program, rest) if program else ""


def parsing_complaint(program: str, words: Sequence[str]) -> str:
    if program not in PARSE:
        return f"unknown to this test: {program}"
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            args = PARSE[program]()(words)
    except SystemExit:
        return told.getvalue().strip() or "it does not parse"
    try:
        check_config(args)
    except ValueError as error:
        return str(error)
    return ""


def check_config(args: argparse.Namespace) -> None:
    """The files, keys and names that a parsed command line gives."""
    config = getattr(args, "config_file", None) or []
    variants = getattr(args, "variant", "") or []
    for variant in [variants] if isinstance(variants, str) else variants:
        family_of(variant)
    # tools/plot_schedule.py takes one such list a curve.
    for curve in config if config and isinstance(config[0], list) else [config]:
        load_config([find_config(name) for name in curve if name not in READERS_OWN], getattr(args, "opts", []))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    found = commands(text_of(page))
    assert found or page == "docs/add-a-network.md"
    assert [(line, told) for line in found if (told := complaint(line))] == []


def test_the_commands_of_the_readme_are_there() -> None:
    found = "\n".join(commands(text_of("README.md")))
    for program in (*list(PARSE)[:7], "scripts/demo.sh", "scripts/test.sh", "scripts/train_net.sh"):
        assert program in found, program


def test_every_packaged_command_is_known_here() -> None:
    assert set(PACKAGED) == set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("python tools/train_nets.py --data DIR", "no such script: tools/train_nets.py"),
        ("python tools/train_net.py --dta DIR", r"there is no option --dta; did you mean --data\?"),
        ("python tools/train_net.py --data DIR --variant mobilenet_v9", "there is no such network: got 'mobilenet_v9'"),
        ("python tools/train_net.py --config-file configs/quick/digit.yaml", "no such file or packaged config"),
        ("python tools/train_net.py --data DIR SOLVER.MAX_EPOCH 3", "nearest known key is SOLVER.MAX_EPOCHS"),
        ("python tools/train_net.py --data DIR SOLVER.MAX_ITER", "the last override has no value"),
        ("python tools/convert_to_detection.py --weights a.pth", "arguments are required: --output"),
        ("python tools/convert_to_detection.py --weights a --output b --fold", ""),  # argparse takes short forms
        ("python tools/convert_to_detection.py --weights a --output b --unfold", "unrecognized arguments: --unfold"),
        ("python -m imgcls training --data DIR", "no such command: imgcls training"),
        ("python scripts/prepare_voc.py --root DIR", "arguments are required: --output"),
        ("NPROC=2 sh scripts/train_net.sh configs/none.yaml", "no such file or packaged config"),
        ("sh scripts/demo.sh --seeds 3 x", "unrecognized arguments"),
        ("sh scripts/torchrun.sh x", "unknown to this test"),
    ],
)
def test_twin_a_wrong_command_is_complained_about(line: str, told: str) -> None:
    assert commands(f"```sh\n{line}\n```\n") == [line]
    assert bool(complaint(line)) == bool(told)
    assert re.search(told, complaint(line))


def test_twin_commands_are_found_in_running_text_and_over_two_lines() -> None:
    text = (
        "`tools/train_net.py --data DIR` and\n```sh\n$ python tools/verify_transfer.py \\\n    --weights a # why\n```\n"
    )
    assert [shlex.split(line, comments=True) for line in commands(text)] == [
        ["python", "tools/verify_transfer.py", "--weights", "a"],
        ["python", "tools/train_net.py", "--data", "DIR"],
    ]


# -- links and paths -------------------------------------------------------------------------------------------------

FOLDERS = "configs|docs|imgcls|requirements|scripts|tests|tools"


def broken_links(page: str, text: str) -> list[str]:
    """Relative links to files or headings that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        if re.match(r"https?://", target):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (heading and heading not in anchors(path.read_text(encoding="utf-8"))):
            found.append(target)
    return found


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_paths(text: str) -> list[str]:
    """Paths into the repository that nothing answers to; ``*`` matches as in a shell."""
    named = re.findall(rf"(?<![\w./@-])(?:{FOLDERS})/[\w./*-]*|(?<![\w./-])(?:LICENSE|setup\.py)\b", text)
    return [name for name in (path.rstrip(".") for path in named) if not list(ROOT.glob(name.rstrip("/")))]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_exists(page: str) -> None:
    text = text_of(page)
    # What the wrong commands of an error message name is wrong on purpose.
    outside_errors = re.sub(r"^error: .*$", "", text, flags=re.MULTILINE)
    assert broken_links(page, text) == []
    assert missing_paths(outside_errors) == []


def test_the_picture_is_xml_and_names_files_that_exist() -> None:
    picture = ElementTree.parse(ROOT / "docs/data-flow.svg").getroot()
    assert picture.tag.endswith("svg")
    words = " ".join(" ".join(picture.itertext()).split())
    assert {"tools/train_net.py", "train_net_builtin.py", "engine/step.py", "verify_transfer.py"} <= set(words.split())
    for name in re.findall(r"[\w/]+\.py", words.replace("convert_to_ detection", "convert_to_detection")):
        assert [*ROOT.glob(name), *ROOT.glob(f"tools/{name}"), *ROOT.glob(f"imgcls/{name}")], name


def test_twin_a_missing_file_and_heading_are_seen() -> None:
    text = "[a](docs/none.md) [b](docs/training.md#none) [c](docs/training.md#keys) [d](https://example.com/x)"
    assert broken_links("README.md", text) == ["docs/none.md", "docs/training.md#none"]
    text = "`tools/none.py`, configs/nowhere/*.yaml, tests/test_docs.py, https://example.com/docs/x, imgcls/data/."
    assert missing_paths(text) == ["tools/none.py", "configs/nowhere/*.yaml"]


# -- rendered tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_rendered_tables_are_current(page: str, tables: ModuleType) -> None:
    text = text_of(page)
    assert tables.rendered(text) == text, "run python docs/render_tables.py"


def test_every_table_has_its_place(tables: ModuleType) -> None:
    places = re.findall(r"<!-- rendered: (\w+) -->", "".join(map(text_of, PAGES)))
    known = ["demo", "families", "fault_stages", "faults", "keys", "networks", "policies", "recipes", "sets"]
    assert sorted(places) == sorted(tables.TABLES) == sorted([*known, "transforms"])


def flat(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_the_keys_table_has_every_key_with_a_reason(tables: ModuleType) -> None:
    ours = set(flat(imgcls.add_imgcls_config(get_cfg()))) - set(flat(get_cfg()))
    rows = [line.split(" | ") for line in tables.keys_table().splitlines()[2:]]
    assert {row[0].strip("| `") for row in rows} == ours
    assert all(len(row[-1].strip("| ")) > 5 for row in rows)
    (epochs,) = [line for line in tables.keys_table().splitlines() if line.startswith("| `SOLVER.MAX_EPOCHS`")]
    assert epochs.startswith(
        "| `SOLVER.MAX_EPOCHS` | `0.0` | a finite number >= 0 | replaces MAX_ITER. Lengths in epochs"
    )


def test_notes_on_keys_come_from_above_and_behind(tables: ModuleType) -> None:
    source = """
def _add_x(cfg):
    node = cfg.MODEL.HEAD
    # Above,
    # twice.
    _set_new(node, "A", 1)  # behind
    _set_new(cfg.TEST, "B", 2)  # alone
    _set_new(node.AMP, "C", 3)
    _set_new(cfg, "D", {})
"""
    assert tables.notes_on_keys(source) == {
        "MODEL.HEAD.A": "behind. Above, twice.",
        "TEST.B": "alone",
        "MODEL.HEAD.AMP.C": "",
    }


def test_twin_a_stale_table_is_seen(tables: ModuleType) -> None:
    text = text_of("docs/training.md")
    stale = text.replace("pixels, side of the centre crop", "pixels, side of the crop")
    assert stale != text and tables.rendered(stale) == text


def test_the_networks_are_as_many_as_the_readme_says() -> None:
    others, text = len(families()) - 1, text_of("README.md")
    assert f"{len(all_variants())} networks in {others} families and one that is built from YAML rows" in text


def test_a_line_of_the_networks_table_is_the_record(tables: ModuleType) -> None:
    cost = {"parameters": 4_650_000, "multiply_adds": 385_400_000, "activations": 6_740_000, "size": 224}
    cost["maps"] = {"stem": [4, 16], "res2": [4, 24], "res3": [8, 40]}
    parity = {
        "torchvision": {"differences": {"float32 64x64": 2.2e-7, "float32 97x97": 4.4e-7, "float64 64x64": 0.0}},
        "timm": {"differences": {"float32 64x64": 3.1e-7, "float64 64x64": 1.2e-15}},
    }
    detectors = {"retinanet": {"problems": []}, "faster_rcnn": {"problems": ["broken"]}}
    found = {"family": "x", "cost": cost, "parity": parity, "detectors": detectors}
    assert tables.network_row("x_1", found) == (
        *("`x_1`", "x", "4.65 M", "0.385 G", "6.74 M", "224"),
        *("torchvision, timm", "4e-07", "1e-15", "4 8", "R"),
    )
    nothing = tables.network_row("x_1", {**found, "parity": {}})
    assert nothing[6:9] == ("-", "-", "-")


def test_the_networks_table_has_a_line_for_each_recorded_network(tables: ModuleType) -> None:
    recorded = json.loads(tables.PARITY.read_text(encoding="utf-8"))["variants"]
    lines = tables.networks_table().splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == list(recorded)


def test_recorded_demos_are_of_todays_recipe(tables: ModuleType) -> None:
    if tables.DEMO.is_file():
        assert json.loads(tables.DEMO.read_text())["recipe"] == tables.recipe_digest(), "record the demos again"


def test_demos_are_recorded_and_rendered(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "DEMO", tmp_path / "data" / "demo.json")
    assert tables.demo_table() == "@@DEMO_SEEDS@@"
    figures = {"top1": 97.0, "transfer": "135 of 135", "AP_scratch": 10.0, "seconds": 200.0}
    for seed, found in ((1, 27.0), (0, 22.0)):
        (tmp_path / str(seed)).mkdir()
        run = {"seed": seed, **figures, "AP_pretrained": found}
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(run))
    tables.record_demos([tmp_path / "1", tmp_path / "0"])
    lines = tables.demo_table().splitlines()
    assert lines[0] == "|  | seed 0 | seed 1 | mean | largest - smallest |"
    assert "| difference of the two APs | 12.0 | 17.0 | 14.5 | 5.0 |" in lines
    assert "| tensors that arrived | 135 of 135 | 135 of 135 |  |  |" in lines


# -- figures that are still to come ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_out(page: str) -> None:
    assert re.findall(r"@@\w+@@", text_of(page)) == []


def measured_rows(text: str) -> list[tuple[str, str]]:
    """(config, result) of README's table of what was measured."""
    section = text.split("Measured on photographs")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[2:]]
    return [(row[0].strip("`"), row[2]) for row in rows]


def unfounded(config: str, result: str) -> list[str]:
    """Figures of a result that the config's opening comment does not state as measured."""
    lines = (ROOT / config).read_text(encoding="utf-8").splitlines()
    opening = " ".join(line.lstrip("# ") for line in lines[: lines.index(next(x for x in lines if x[:1] != "#"))])
    stated = opening.partition("measured:")[2]
    return [figure for figure in re.findall(r"\d+\.\d+", result) if figure not in re.findall(r"\d+\.\d+", stated)]


def test_measured_figures_are_those_of_the_configs() -> None:
    rows = measured_rows(text_of("README.md"))
    assert len(rows) == 3
    assert [(config, unfounded(config, result)) for config, result in rows if unfounded(config, result)] == []


def test_twin_a_figure_nobody_measured_is_seen() -> None:
    assert unfounded("configs/cifar10/mobilenet_v1_cpu.yaml", "top-1 99.9 %") == ["99.9"]
    assert unfounded("configs/imagenet/resnet50_sgd_90ep.yaml", "top-1 76.13 %") == ["76.13"]


# -- Python blocks and outputs ---------------------------------------------------------------------------------------


def lines_of(page: str, name: str) -> str:
    """The Python blocks of a page marked ``<!-- tested: NAME -->``, one after another."""
    return "\n".join(block.body for block in blocks(text_of(page)) if block.mark == f"tested: {name}")


def run_python(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what a block registers must not reach other tests."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_tested_blocks_are_these() -> None:
    marks = [block.mark for page in PAGES for block in blocks(text_of(page)) if block.mark.startswith("tested: ")]
    assert sorted(set(marks)) == ["tested: bad-files", "tested: configuration", "tested: own-script", "tested: tiny"]
    assert all(
        block.language == "python" for page in PAGES for block in blocks(text_of(page)) if "tested" in block.mark
    )


def test_twin_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    assert run_python("print(1)", tmp_path).returncode == 0
    assert run_python("import imgcls_is_not_called_so", tmp_path).returncode != 0


@pytest.fixture(scope="module")
def handover(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """backbone.pth and backbone.yaml of a MobileNetV1 0.25 with statistics as different as after training."""
    folder = tmp_path_factory.mktemp("handover")
    overrides = ["MODEL.DEVICE", "cpu", "INPUT.TRAIN_SIZE", 32, "INPUT.TEST_SIZE", 32, "OUTPUT_DIR", str(folder)]
    run = Run(*finalize(imgcls.get_config("quick/digits_mobilenet_v1.yaml", overrides)))
    torch.manual_seed(3)
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    write_checkpoint(folder / "model_final.pth", run.checkpoint(0))
    written = convert(folder / "model_final.pth", folder / "backbone.pth")
    (folder / "backbone.yaml").write_text(detector_fragment(written, "backbone.pth"))
    return folder


def copied(handover: Path, folder: Path) -> Path:
    for name in ("backbone.pth", "backbone.yaml"):
        (folder / name).write_bytes((handover / name).read_bytes())
    return folder


MY_DETECTOR = """\
VERSION: 2
MODEL:
  META_ARCHITECTURE: RetinaNet
  DEVICE: cpu
  FPN:
    IN_FEATURES: [res3, res4, res5]
    OUT_CHANNELS: 16
  ANCHOR_GENERATOR:
    SIZES: [[32], [64], [128], [256], [512]]
  RETINANET:
    NUM_CLASSES: 10
DATASETS:
  TRAIN: ("my_digits",)
  TEST: ()
DATALOADER:
  NUM_WORKERS: 0
INPUT:
  MIN_SIZE_TRAIN: (64,)
  MAX_SIZE_TRAIN: 64
SOLVER:
  MAX_ITER: 2
  IMS_PER_BATCH: 2
  WARMUP_ITERS: 0
  STEPS: ()
  BASE_LR: 0.001
OUTPUT_DIR: trained
"""
OWN_SETS = """
from detectron2.data.datasets import register_coco_instances
register_coco_instances("my_digits", {}, "digits/train.json", "digits/train")
"""
# After the blocks: two steps were taken, every tensor of the frozen norms and of the filled model is the file's, and
# the same script with a file whose keys are prefixed does not start.
OWN_CHECKS = """
import torch
content = torch.load("backbone.pth", weights_only=True)
file = content["model"]
assert trainer.iter == 2 and len(report.loaded) == len(file) == 135, (trainer.iter, report.summary())
trained, filled = trainer.model.backbone.bottom_up.state_dict(), model.backbone.bottom_up.state_dict()
norms = [name for name in file if ".norm." in name]
assert len(norms) == 108 and all(torch.equal(trained[name], file[name]) for name in norms)
assert all(torch.equal(filled[name], file[name]) for name in file)
assert not torch.equal(trained["res5.block1.pointwise.weight"], file["res5.block1.pointwise.weight"])

prefixed = {f"net.{name}": tensor for name, tensor in file.items()}
torch.save({"model": prefixed, "matching_heuristics": True}, "prefixed.pth")
cfg.MODEL.WEIGHTS = "prefixed.pth"
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
try:
    trainer.train()
except ValueError as error:
    assert "0 of 135 tensors of the backbone" in str(error), error
else:
    raise SystemExit("it trained from random weights")
print("own script: passed")
"""


def test_the_lines_for_ones_own_script_run_with_stock_defaulttrainer(handover: Path, tmp_path: Path) -> None:
    copied(handover, tmp_path)
    digit_canvases.prepare(tmp_path / "digits", train=4, val=1, canvas=64)
    (tmp_path / "my_detector.yaml").write_text(MY_DETECTOR)
    script = lines_of("README.md", "own-script")
    assert "from detectron2.engine import DefaultTrainer" in script and "ClsTrainer" not in script
    done = run_python(OWN_SETS + script + OWN_CHECKS, tmp_path)
    assert done.stdout.endswith("own script: passed\n"), done.stdout[-2000:] + done.stderr[-3000:]


TINY_CHECKS = """
shape = build_model(classifier).backbone.output_shape()
assert {name: (spec.channels, spec.stride) for name, spec in shape.items()} == {"res5": (128, 32)}, shape
pyramid = build_model(detector).backbone
strides = {name: spec.stride for name, spec in pyramid.output_shape().items()}
assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}, strides
assert len(pyramid.bottom_up.freeze(2)._frozen) == 2

import torch
from imgcls.data.datasets import open_source
from imgcls.engine import Run, finalize
from imgcls.checkpoint import write_checkpoint
from imgcls.transfer import convert, verify
classifier.merge_from_list(["INPUT.TEST_SIZE", 32, "INPUT.TRAIN_SIZE", 32])
write_checkpoint(__import__("pathlib").Path("c.pth"), Run(*finalize(classifier)).checkpoint(0))
convert("c.pth", "b.pth")
outcome = verify("b.pth", detector)
assert outcome.passed and len(outcome.report.loaded) == 25, outcome.text()
print("tiny: passed")
"""


def test_the_example_family_trains_converts_and_verifies(tmp_path: Path) -> None:
    done = run_python(lines_of("docs/add-a-network.md", "tiny") + TINY_CHECKS, tmp_path)
    assert done.stdout.endswith("tiny: passed\n"), done.stdout[-2000:] + done.stderr[-3000:]


def test_the_lines_on_configuration_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("VERSION: 2\nSOLVER: {MAX_ITER: 5}\nSEED: 7\n")
    Path("mine_too.yaml").write_text("VERSION: 2\nSOLVER: {MAX_ITER: 6}\n")
    names: dict[str, Any] = {}
    exec(lines_of("docs/configuration.md", "configuration"), names)
    assert (names["cfg"].SOLVER.MAX_ITER, names["cfg"].SEED) == (6, 1)


def test_the_detector_of_ones_own_over_detectron2s_base(
    handover: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [block for block in blocks(text_of("docs/detection.md")) if block.language == "yaml"]
    zoo = str(files("detectron2") / "model_zoo" / "configs")
    monkeypatch.chdir(copied(handover, tmp_path))
    Path("my_detector.yaml").write_text(block.body.replace("/path/to/detectron2/configs", zoo))
    cfg = load_config("my_detector.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.MODEL.BACKBONE.NAME == "build_imgcls_retinanet_fpn_backbone" and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.BACKBONE.VARIANT == "mobilenet_v1_0.25" and cfg.SOLVER.MAX_ITER == 90000


def test_the_fragment_shown_is_the_one_written(handover: Path) -> None:
    (block,) = [block for block in blocks(text_of("docs/hand-over.md")) if block.language == "yaml"]
    assert yaml.safe_load(block.body) == yaml.safe_load((handover / "backbone.yaml").read_text())


def test_the_entries_of_the_file_are_those_of_the_page(handover: Path) -> None:
    content = torch.load(handover / "backbone.pth", weights_only=True)
    section = text_of("docs/hand-over.md").split("## The file")[1].split("**The contract**")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(content)
    for name in content["imgcls"]:
        assert f"`{name}`" in section, name
    assert read_handover(handover / "backbone.pth").intact


def masked(output: str) -> list[str]:
    """Lines without the figures, and without which stage is worst, that another training would change."""
    lines = re.sub(r"\d\.\de[+-]\d\d", "N", output).strip().splitlines()
    return [re.sub(r"features of \w+ differ", "features of S differ", line).rstrip() for line in lines]


@pytest.fixture(scope="module")
def four_files(handover: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good file and the three bad ones, made by the page's own lines."""
    folder = copied(handover, tmp_path_factory.mktemp("four"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(lines_of("docs/hand-over.md", "bad-files"), {})
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("backbone.pth", 0, "OK: 135 of 135"),
        ("renamed.pth", 1, "0 of 135 tensors loaded"),
        ("swapped.pth", 1, "channels (RGB, BGR) are swapped"),
        ("missing.pth", 1, "1 missing: res3.block0.depthwise.norm.running_var"),
    ],
)
def test_verify_says_what_the_page_shows(
    four_files: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, said: str
) -> None:
    (shown,) = [block.body for block in blocks(text_of("docs/hand-over.md")) if block.mark == f"output of: {name}"]
    words = ["--weights", str(four_files / name), "--config-file", "quick/digits_retinanet_fpn.yaml"]
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as caught:
        verify.main(words)
    assert code == (caught.value.code if caught else 0)
    assert masked(capsys.readouterr().out) == masked(shown)
    assert said in shown


def test_twin_another_output_is_seen() -> None:
    (shown,) = [block.body for block in blocks(text_of("docs/hand-over.md")) if block.mark == "output of: missing.pth"]
    assert masked(shown) == masked(shown.replace("9", "8", 0))
    assert masked(shown) != masked(shown.replace("134 of 135", "133 of 135"))
    assert masked(shown) != masked(shown.replace("running_var", "running_mean"))


def shown_as(page: str, mark: str) -> str:
    (body,) = [block.body for block in blocks(text_of(page)) if block.mark == mark]
    return body


def test_the_costs_shown_are_those_that_analyze_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [line for line in commands(text_of("docs/networks.md")) if "analyze_model" in line]
    analyze.main(shlex.split(line)[2:])
    assert capsys.readouterr().out.split() == shown_as("docs/networks.md", "output of: analyze").split()


def test_the_detectors_yaml_has_the_lines_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = next(line for line in commands(text_of("docs/networks.md")) if "--detector retinanet --variant" in line)
    make_detector_config.main(shlex.split(line)[2:])
    assert capsys.readouterr().out == shown_as("docs/networks.md", "output of: make-detector-config")
    shown = yaml.safe_load(shown_as("docs/networks.md", "part of: lite0_retinanet.yaml"))
    written = yaml.safe_load(Path("lite0_retinanet.yaml").read_text())
    assert common(shown, written) == shown
    shown["MODEL"]["BACKBONE"]["FREEZE_AT"] = 2
    assert common(shown, written) != shown
    # With detectron2's stock YAML as base the lines shown make the same detector.
    cfg, stock = load_config("lite0_retinanet.yaml"), load_config(find_config("detection/Base-RetinaNet.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR == stock.MODEL.ANCHOR_GENERATOR and cfg.SOLVER == stock.SOLVER


def common(one: Any, other: Any) -> Any:
    """What of a tree of keys stands in another with the same value."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: common(value, other[key]) for key, value in one.items() if key in other}
    return one if one == other else None


# -- messages --------------------------------------------------------------------------------------------------------

TOLD = r"^(?:error(?: \(rank \d\))?|FAILED|ValueError): (.*)$"


def literals() -> set[str]:
    """The text of imgcls' strings, f-strings by their fixed parts."""
    found = set()
    for path in (ROOT / "imgcls").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 8:
                found.add(node.value)
    return found


def share_from_source(message: str, source: set[str]) -> float:
    """How much of a message's fixed text stands in the source; values and file names do not."""
    covered = [False] * len(message)
    for text in source:
        start = message.find(text)
        while start >= 0:
            covered[start : start + len(text)] = [True] * len(text)
            start = message.find(text, start + 1)
    return sum(covered) / len(message)


def is_current(message: str, source: set[str]) -> bool:
    """Whether the code still says so: its beginning and the whole, or nearly all of it."""
    beginning = re.split(r": got |; | \(", message)[0]
    whole = share_from_source(message, source)
    return whole >= 0.65 or (whole >= 0.4 and share_from_source(beginning, source) >= 0.3)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_messages_shown_are_messages_of_the_code(page: str) -> None:
    source = literals()
    # Whole outputs are compared word by word above.
    loose = "".join(block.body for block in blocks(text_of(page)) if not block.mark)
    shown = re.findall(TOLD, loose, flags=re.MULTILINE)
    assert len(shown) >= 3
    assert [message for message in shown if not is_current(message, source)] == []


def test_twin_a_message_of_older_code_is_seen() -> None:
    source = literals()
    assert not is_current("the folder output/x has results already; pass --resume or take another one", source)
    # This one was removed; its tail is every problem's.
    rest = "got 13; allowed: fewer iterations than the run's 9; change SOLVER.WARMUP_EPOCHS"
    assert not is_current(f"the warm-up is as long as the run: {rest}", source)
