"""FSDP2 on two gloo ranks: DDP's numbers, the same files, resumed by one rank and back, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, lines_of, tiny_cfg
from sharding_cases import CASES, QUIET, RUN
from test_loops import run_in_process

from imgcls.config import all_problems
from imgcls.engine import Run, TrainStep, finalize
from imgcls.engine.ranks import sharding
from imgcls.engine.ranks.sharding import Sharded, blocks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder, and what each rank found; from a process of its own: backward does not survive forks."""
    folder = tmp_path_factory.mktemp("sharding")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "tests/sharding_cases.py"), str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_cut_up_or_not_the_numbers_are_the_same(ranks, case):
    for found in ranks[1]:
        losses, apart, count = found["steps"][case]
        assert losses < 1e-10 and apart < 1e-6 and count > 80


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(ranks):
    for found in ranks[1]:
        assert found["fault"] == {"skipped": 1, "same": True, "moved": True}


def test_files_and_figures_are_those_of_ddp(ranks):
    first, second = (found["runs"] for found in ranks[1])
    assert first == second
    for name, value in first.items():
        assert value == pytest.approx(first["ddp"], rel=1e-2), name
    one, other = (torch.load(ranks[0] / "c" / kind / "model_final.pth", weights_only=True) for kind in ("ddp", "fsdp2"))
    assert list(one) == list(other) and list(one["model"]) == list(other["model"])
    assert [list(state) for state in one["optimizer"]["state"].values()] == [
        list(state) for state in other["optimizer"]["state"].values()
    ]
    assert all(type(tensor) is torch.Tensor for tensor in other["model"].values())
    for name, tensor in one["model"].items():
        assert other["model"][name].shape == tensor.shape and other["model"][name].stride() == tensor.stride(), name


def test_one_rank_goes_on_with_what_two_have_cut_up(ranks, tmp_path):
    shutil.copytree(
        ranks[0] / "c" / "fsdp2", tmp_path / "alone", ignore=shutil.ignore_patterns("model_final*", ".lock")
    )
    with lines_of("imgcls.engine.ranks.sharding") as lines:
        run, results = run_in_process("plain", tiny_cfg(tmp_path / "alone", *QUIET, "fsdp2", *RUN), resume=True)
    assert lines == ["SOLVER.PARALLEL fsdp2: one rank, nothing is cut up"]
    assert run.start_iter == 2 and results["classification"]["loss"] > 0


def test_blocks_are_those_of_the_stages(classifier_cfg):
    model = Run(*finalize(classifier_cfg("resnet18"))).model
    names = {module: name for name, module in model.named_modules()}
    assert [names[block] for block in blocks(model)] == [
        "backbone.stem",
        *(f"backbone.res{stage}.{block}" for stage in (2, 3, 4, 5) for block in (0, 1)),
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("SOLVER.EMA.ENABLED", True, "SOLVER.PARALLEL ddp"),
        ("SOLVER.SWA.ENABLED", True, "SOLVER.PARALLEL ddp"),
        ("SOLVER.FREEZE", [["backbone.*", 1]], "SOLVER.PARALLEL ddp"),
        ("SOLVER.OPTIMIZER", "Muon", "SGD, AdamW"),
        ("MODEL.DEVICE", "mps", "cuda or cpu"),
    ],
)
def test_what_cannot_be_cut_up_is_refused(plain_cfg, key, value, words):
    plain_cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "ClsNet", key, value, "SOLVER.PARALLEL", "fsdp2"])
    (found,) = sharding.check_sharding(plain_cfg)
    assert found.key == key and words in found.allowed and found in all_problems(plain_cfg)
    plain_cfg.SOLVER.PARALLEL = "ddp"
    assert not sharding.check_sharding(plain_cfg)


def test_under_ddp_nothing_is_cut_up(classifier_cfg):
    run = Run(*finalize(classifier_cfg()))
    assert Sharded.from_cfg(run.cfg, run.model) is None
    assert isinstance(run.step, TrainStep) and run.step.model is run.model
