"""Precise BN: against activations that are kept and reduced in the test, on one rank and on two, and over a kill."""

from __future__ import annotations

import copy
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_cfg
from detectron2.config import CfgNode
from detectron2.utils import comm
from test_loops import run_in_process, same
from torch import nn

from imgcls.data import build_train_loader
from imgcls.engine import Run, finalize
from imgcls.engine.precise_bn import recompute_statistics

NET = "mobilenet_v1_0.25"
WORDS = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 2, "MODEL.HEAD.DROPOUT", 0.5, "DATASETS.TEST", ())
Statistics = dict[str, torch.Tensor]


def norms_of(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}


def statistics(network: nn.Module) -> Statistics:
    return {name: torch.stack([norm.running_mean, norm.running_var]) for name, norm in norms_of(network).items()}  # type: ignore[list-item]


def by_hand(run: Run, iterations: int) -> Statistics:
    """Mean and variance of all inputs of every norm, kept in double precision, with batch statistics in between."""
    network, inputs = copy.deepcopy(run.model).eval(), {}  # type: ignore[var-annotated]
    for name, norm in norms_of(network).items():
        norm.train()
        inputs[name] = []
        norm.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0].double()))
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = iterations  # more than the run's own
    with torch.no_grad():
        for batch in build_train_loader(cfg, run.data.train):  # type: ignore[arg-type]
            network(batch)
    columns = {name: torch.cat(parts).transpose(0, 1).flatten(1) for name, parts in inputs.items()}
    return {name: torch.stack([c.mean(1), c.var(1, unbiased=False)]) for name, c in columns.items()}


def close(ours: Statistics, theirs: Statistics) -> bool:
    return all(torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-3, atol=1e-5) for name in theirs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has taken two steps."""
    done, _ = run_in_process("plain", tiny_cfg(tmp_path_factory.mktemp("run") / "run", *WORDS))
    return done


@pytest.fixture
def network(run: Run) -> Any:
    return copy.deepcopy(run.model)


def compute(run: Run, network: nn.Module, iterations: int = 3) -> None:
    assert run.data.train is not None
    recompute_statistics(run.cfg, network, run.data.train, iterations=iterations)


def test_the_statistics_are_those_of_all_activations_in_the_batches(run: Run, network: Any) -> None:
    before, expected = statistics(network), by_hand(run, 3)
    compute(run, network)
    assert close(statistics(network), expected)
    assert not close(before, expected) and not close(by_hand(run, 2), expected)


def test_nothing_else_changes(run: Run, network: Any) -> None:
    """Neither weights, nor counters, nor the mode, nor the momentum; and the buffers are the tensors that they were."""
    before, buffers = copy.deepcopy(network.state_dict()), [id(buffer) for buffer in network.buffers()]
    for mode in (True, False):
        network.train(mode)
        compute(run, network)
        assert all(module.training == mode for module in network.modules())
    assert buffers == [id(buffer) for buffer in network.buffers()]
    after = network.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{name}.{kind}" for name in norms_of(network) for kind in ("running_mean", "running_var")}
    assert {norm.momentum for norm in norms_of(network).values()} == {0.1}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_it_depends_on_nothing_but_weights_and_data(run: Run, network: Any) -> None:
    torch.manual_seed(7)
    compute(run, network)
    first = statistics(network)
    for norm in norms_of(network).values():
        norm.reset_running_stats()
    torch.rand(10)
    compute(run, network)
    assert same(statistics(network), first)
    with torch.no_grad():
        next(network.backbone.stem.parameters()).mul_(2)
    compute(run, network)
    assert not same(statistics(network), first)


@pytest.mark.parametrize("after", [0, 2])
def test_whoever_leaves_early_has_changed_nothing(
    after: int, run: Run, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal to stop does not wait for hundreds of batches; no batch is read that nobody looks at."""
    before, asked, passes = copy.deepcopy(network.state_dict()), [], []
    network.register_forward_hook(lambda *_: passes.append(1))
    leave = lambda: asked.append(1) or len(asked) > after  # noqa: E731
    assert not recompute_statistics(run.cfg, network, run.data.train, iterations=50, leave=leave)
    assert len(passes) == after and len(asked) == after + 1
    assert same(network.state_dict(), before) and network.training
    assert {norm.momentum for norm in norms_of(network).values()} == {0.1}
    assert recompute_statistics(run.cfg, network, run.data.train, iterations=2, leave=lambda: False)
    assert close(statistics(network), by_hand(run, 2))


def test_frozen_norms_and_norms_that_evaluation_does_not_use_keep_theirs(run: Run, network: Any) -> None:
    network.frozen = (network.backbone.res2,)
    network.unused = nn.BatchNorm2d(3)
    network.unused.running_mean.fill_(5.0)
    before = statistics(network)
    compute(run, network)
    after = statistics(network)
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {"unused", *(name for name in before if name.startswith("backbone.res2"))} and len(kept) > 1


def test_a_network_without_batch_norm_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgcls.engine.precise_bn.build_train_loader", None)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    compute(run, network)
    assert network.training


@pytest.mark.parametrize(("loop", "average"), [("plain", True), ("builtin", False)])
def test_a_run_evaluates_and_saves_precise_statistics_and_resumes_with_them(
    loop: str, average: bool, tmp_path: Path
) -> None:
    words = (*("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.EMA.ENABLED", average),)
    words += ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "DATASETS.TEST", ())
    done, _ = run_in_process("plain", tiny_cfg(tmp_path / "straight", *words))
    assert (done.network is done.model) is not average
    expected = copy.deepcopy(done.network)
    compute(done, expected, 2)
    straight = torch.load(tmp_path / "straight" / "model_final.pth", weights_only=True)
    assert same(straight["model"], expected.state_dict())
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    (tmp_path / "resumed" / "model_final.pth").unlink()
    again, _ = run_in_process(loop, tiny_cfg(tmp_path / "resumed", *words), resume=True)
    assert again.start_iter == 2
    resumed = torch.load(tmp_path / "resumed" / "model_final.pth", weights_only=True)
    assert all(same(resumed[part], straight[part]) for part in ("model", "live") if part in straight)


def test_by_default_the_running_statistics_stay(run: Run) -> None:
    assert not close(statistics(run.model), by_hand(run, run.cfg.TEST.PRECISE_BN.NUM_ITER // 50))


def _as_rank(rank: int, folder: str, cfg: CfgNode, model: nn.Module) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    cfg, data = finalize(cfg)
    assert data.train is not None
    recompute_statistics(cfg, model, data.train, iterations=3)
    torch.save(statistics(model), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_ranks_get_the_statistics_of_both_shares(
    run: Run, network: Any, classifier_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    """Equal on both; of the first norm, whose inputs no norm has touched, those that one rank gets of whole batches."""
    cfg = classifier_cfg(NET, *WORDS)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_as_rank, args=(rank, str(tmp_path), cfg, network)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    name, expected = next(iter(by_hand(run, 3).items()))
    assert close(first, {name: expected})
