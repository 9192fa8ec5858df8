"""What tests share: small configs, tiny data, and processes that are real."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg

import imgcls
from imgcls.engine.output import output_dir
from imgcls.modeling import family_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Two pytest processes on two cores with two threads each run ten times slower than with one.
    torch.set_num_threads(1)


@pytest.fixture
def classifier_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """``classifier_cfg("mobilenet_v1_0.25", "KEY", value, ...)``: digits at 32 pixels, four iterations, on the CPU."""

    def make(variant: str = "mobilenet_v1_0.25", *overrides: object) -> CfgNode:
        return tiny_cfg(tmp_path / "run", *overrides, variant=variant)

    return make


def tiny_cfg(output: Path, *overrides: object, variant: str = "mobilenet_v1_0.25") -> CfgNode:
    """What ``classifier_cfg`` makes, for fixtures of a module, with any OUTPUT_DIR."""
    cfg = imgcls.get_config("quick/digits_mobilenet_v1.yaml")
    small = [
        *("MODEL.BACKBONE.VARIANT", variant, "MODEL.BACKBONE.NAME", family_of(variant).builder),
        *("INPUT.TRAIN_SIZE", 32, "INPUT.TEST_SIZE", 32, "MODEL.DEVICE", "cpu"),
        *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 4, "SOLVER.MAX_EPOCHS", 0.0, "SOLVER.WARMUP_EPOCHS", 0.0),
        *("SOLVER.LOG_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 100, "SOLVER.CHECKPOINT_EPOCHS", 0.0),
        *("TEST.EVAL_EPOCHS", 0.0, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", str(output)),
    ]
    cfg.merge_from_list([*small, *overrides])
    return cfg


@pytest.fixture
def detector_cfg() -> Callable[..., CfgNode]:
    """``detector_cfg("retinanet", variant, "KEY", value, ...)``: the shipped detector YAMLs, small, on the CPU."""

    def make(detector: str = "retinanet", variant: str = "mobilenet_v1_0.25", *overrides: object) -> CfgNode:
        cfg = imgcls.get_config(f"detection/mobilenet_v1_{detector}_fpn.yaml")
        cfg.merge_from_list(
            [
                *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
                *("MODEL.BACKBONE.VARIANT", variant, *overrides),
            ]
        )
        return cfg

    return make


@pytest.fixture
def plain_cfg() -> CfgNode:
    """detectron2's defaults with imgcls' keys."""
    return imgcls.add_imgcls_config(get_cfg())


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``command("tools/train_net.py", "--help")``: run a script of the checkout in a process of its own."""

    def run(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        )

    return run


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def lines_of(name: str) -> Iterator[list[str]]:
    """A list that fills with what the logger ``name`` and those below it say."""
    handler, logger = Lines(), logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines that imgcls.config logs during a test."""
    with lines_of("imgcls.config") as lines:
        yield lines


@dataclass
class Done:
    """What a command left: like subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``tool("tools/train_net.py", "--help")``: run a script of the checkout in this process, as if typed.

    Starting a process costs seconds of imports; what needs one of its own uses ``command``.
    """
    monkeypatch.chdir(ROOT)
    return run_tool


def run_tool(script: str, *words: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    argv, code = sys.argv, 0
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = argv
        for folder in list(output_dir._locks):
            output_dir.release(folder)
    return Done(code, out.getvalue(), err.getvalue())


def write_image_folder(root: Path, classes: dict[str, int], side: int = 32, seed: int = 0) -> Path:
    """``root/<class>/<n>.png`` of random pixels, ``classes`` giving how many of each."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}.png")
    return root
