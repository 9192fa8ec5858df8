"""Stochastic weight averaging: which weights are taken in, their mean, the rate, statistics, files and exact resume."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines_of, tiny_cfg
from detectron2.utils import comm
from sharding_cases import on_ranks
from test_loops import run_in_process, same
from test_precise_bn import close, norms_of, statistics
from torch import nn
from torch.optim.swa_utils import SWALR

from imgcls.checkpoint import read_checkpoint
from imgcls.config import all_problems, load_config, resolve_durations
from imgcls.data import build_train_loader
from imgcls.engine import Run, finalize, starting
from imgcls.engine.precise_bn import recompute_statistics
from imgcls.engine.ranks import stopping
from imgcls.solver import Swa, build_average, build_schedule

# Six iterations: averaging begins after the second, and takes in the weights of the fourth and the sixth.
ON = (
    *("SOLVER.SWA.ENABLED", True, "SOLVER.SWA.START", 0.34, "SOLVER.SWA.PERIOD_EPOCHS", 0.0, "SOLVER.SWA.PERIOD", 2),
    *("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 9, "DATALOADER.NUM_WORKERS", 0),
    *("TEST.PRECISE_BN.NUM_ITER", 2, "TEST.IMS_PER_BATCH", 500),
)


def taken(start: int, period: int, iterations: int) -> list[int]:
    """The iterations whose weights the mean is of, found by averaging powers of two."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    swa, found = Swa(net, start=start, period=period), []
    for iteration in range(iterations):
        before = swa.updates
        swa.update(net, iteration)
        found += [iteration] if swa.updates > before else []
    return found


def test_the_ends_of_the_periods_behind_the_start_are_taken_in():
    assert taken(0, 1, 4) == [0, 1, 2, 3]
    assert taken(3, 1, 6) == [3, 4, 5]
    assert taken(2, 2, 7) == [3, 5]
    assert taken(4, 3, 6) == []


def test_the_average_is_the_mean_in_equal_shares():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    swa, seen = Swa(net, start=2, period=3), []
    for iteration in range(14):
        with torch.no_grad():
            for value in net.parameters():
                value.normal_()
        net[1].running_mean += 1
        if iteration in (4, 7, 10, 13):
            seen.append([value.detach().double().clone() for value in net.parameters()])
        assert swa.begun == (iteration > 4)
        swa.update(net, iteration)
    assert swa.updates == 4
    for index, value in enumerate(swa.network.parameters()):
        torch.testing.assert_close(value.double(), sum(each[index] for each in seen) / 4, rtol=1e-6, atol=1e-7)
    assert torch.equal(swa.network[1].running_mean, net[1].running_mean)  # to be computed anew


def test_one_average_at_most(classifier_cfg):
    both = ("SOLVER.EMA.ENABLED", True, "SOLVER.SWA.ENABLED")
    assert all_problems(classifier_cfg("mobilenet_v1_0.25", *both, False)) == []
    (problem,) = all_problems(classifier_cfg("mobilenet_v1_0.25", *both, True))
    assert problem.key == "SOLVER.SWA.ENABLED" and "two averages" in str(problem)


def test_lengths_in_epochs_and_periods_that_do_not_fit(plain_cfg):
    cfg = plain_cfg
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.SWA.PERIOD_EPOCHS = 10, 100, 0.5
    resolve_durations(cfg, 60)
    assert cfg.SOLVER.SWA.PERIOD == 1  # not enabled
    cfg.SOLVER.SWA.ENABLED = True
    resolve_durations(cfg, 60)
    average = build_average(cfg, nn.Linear(1, 1))
    assert (cfg.SOLVER.SWA.PERIOD, average.start, average.period) == (3, 75, 3)
    cfg.SOLVER.SWA.PERIOD = 60
    with lines_of("imgcls.solver") as said:
        assert build_average(cfg, nn.Linear(1, 1)).period == 25
    assert said == ["SOLVER.SWA.PERIOD cut from 60 to 25: the run has 100 iterations"]


def test_a_period_in_iterations_replaces_that_in_epochs():
    cfg = load_config([], ["SOLVER.SWA.PERIOD", 7])
    assert (cfg.SOLVER.SWA.PERIOD, cfg.SOLVER.SWA.PERIOD_EPOCHS) == (7, 0.0)
    cfg = load_config([], ["SOLVER.SWA.PERIOD", 7, "SOLVER.SWA.PERIOD_EPOCHS", 2.0])
    assert cfg.SOLVER.SWA.PERIOD_EPOCHS == 2.0


def rates(cfg, **swa) -> list[float]:
    node = cfg.SOLVER
    node.MAX_ITER, node.BASE_LR, node.WARMUP_ITERS, node.LR_SCHEDULER_NAME = 40, 0.4, 0, "WarmupCosineLR"
    for key, value in swa.items():
        node.SWA[key] = value
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=node.BASE_LR)
    schedule = build_schedule(cfg, optimizer)
    found = []
    for _ in range(node.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_goes_over_to_that_of_the_average_as_torchs_does(plain_cfg):
    usual = rates(plain_cfg)
    assert rates(plain_cfg, ENABLED=True, START=0.5) == usual
    assert rates(plain_cfg, LR=0.05)[:20] == usual[:20] and set(rates(plain_cfg)[20:]) == {0.05}
    ours = rates(plain_cfg, ANNEAL=0.25)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=usual[20])
    theirs, schedule = [], SWALR(optimizer, swa_lr=0.05, anneal_epochs=10)
    for _ in range(20):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert ours[:20] == usual[:20] and ours[20:] == pytest.approx(theirs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six iterations with the average, every checkpoint kept, and six without."""
    folder = tmp_path_factory.mktemp("swa")
    run, _ = run_in_process("plain", tiny_cfg(folder / "on", *ON))
    run_in_process("plain", tiny_cfg(folder / "off", *ON, "SOLVER.SWA.ENABLED", False))
    return folder, run


def checkpoint(folder, iteration: int):
    return read_checkpoint(folder / ("model_final.pth" if iteration == 5 else f"model_{iteration:07d}.pth"))


def test_the_checkpoints_hold_the_mean_once_there_is_one(trained):
    folder, run = trained
    files = [checkpoint(folder / "on", iteration) for iteration in range(6)]
    plain = [checkpoint(folder / "off", iteration)["model"] for iteration in range(6)]
    assert [file["average_updates"] for file in files] == [0, 0, 0, 1, 1, 2]
    assert ["live" in file for file in files] == [False] * 3 + [True] * 3
    for file, without in zip(files, plain, strict=True):
        assert same(file.get("live", file["model"]), without)  # the average changes no training
    for name, _ in run.model.named_parameters():
        mean = (plain[3][name].double() + plain[5][name].double()) / 2
        torch.testing.assert_close(files[5]["model"][name].double(), mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(files[4]["model"][name], plain[3][name])


def test_running_statistics_are_those_of_the_mean(trained):
    folder, run = trained
    found, live = (checkpoint(folder / "on", 5)[entry] for entry in ("model", "live"))
    statistics = [name for name in found if "running" in name]
    net = copy.deepcopy(run.network)
    net.load_state_dict({**found, **{name: live[name] for name in statistics}})
    assert all(not torch.equal(live[name], found[name]) for name in statistics)
    recompute_statistics(run.cfg, net, run.data.train, iterations=2)
    assert statistics and all(torch.equal(net.state_dict()[name], found[name]) for name in statistics)


def test_what_is_evaluated_is_what_is_saved(trained):
    folder, run = trained
    cfg = tiny_cfg(folder / "judge", *ON, "MODEL.WEIGHTS", str(folder / "on/model_final.pth"))
    judge = Run(*finalize(cfg, eval_only=True))
    judge.load_initial(cfg.MODEL.WEIGHTS)
    assert judge.evaluate() == run.results
    judge.model.load_state_dict(run.model.state_dict())
    assert judge.evaluate() != run.results


@pytest.mark.parametrize(("loop", "last"), [("builtin", 1), ("plain", 3), ("builtin", 4)])
def test_a_run_resumed_before_at_and_after_the_start_ends_the_same(trained, loop, last, tmp_path):
    folder, run = trained
    shutil.copytree(folder / "on", tmp_path / "on")
    for path in (tmp_path / "on").glob("model_*.pth"):
        if path.name == "model_final.pth" or (path.name != "model_best.pth" and int(path.stem[6:]) > last):
            path.unlink()
    again, _ = run_in_process(loop, tiny_cfg(tmp_path / "on", *ON), resume=True)
    assert again.start_iter == last + 1
    theirs, ours = checkpoint(folder / "on", 5), checkpoint(tmp_path / "on", 5)
    assert same(ours["model"], theirs["model"]) and same(ours["live"], theirs["live"])
    assert again.results == run.results


# -- two ranks -----------------------------------------------------------------------------------------------------

# Saves after the fourth and the sixth iteration: the fifth is one that the uninterrupted run passes by.
TWO = (*ON, "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", ())


def as_rank(folder: Path, loop: str, last: int = -1, resume: bool = False, own: bool = True) -> dict[str, Any]:
    """What a run leaves on this rank, with the weights after each iteration; nothing where it is stopped.

    last: the iteration before which rank 1 is sent a SIGTERM. own: False is the mistake, to go on with the statistics
    of the file instead of this rank's own.
    """
    seen: dict[int, dict[str, torch.Tensor]] = {}
    usual_update, usual_train_on = Swa.update, Run.train_on

    def update(self, model, iteration):
        seen[iteration] = {name: value.detach().clone() for name, value in model.named_parameters()}
        usual_update(self, model, iteration)

    def train_on(self, batch, iteration):
        if iteration == last and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        usual_train_on(self, batch, iteration)

    with pytest.MonkeyPatch.context() as patch, stopping.listening():
        patch.setattr(Swa, "update", update)
        patch.setattr(Run, "train_on", train_on)
        if not own:
            patch.setattr(starting, "take_own_statistics", lambda networks, of_ranks: None)
        try:
            run, _ = run_in_process(loop, tiny_cfg(folder, *TWO), resume=resume)
        except stopping.Stopped:
            return {}
    return {"start": run.start_iter, "mean": run.network.state_dict(), "live": run.model.state_dict(), "seen": seen}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of a run on two ranks, and what it left on each."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder / "run", on_ranks(2, as_rank, folder / "found", folder / "run", "plain")


def test_both_ranks_have_the_mean_of_the_weights_that_are_due(ranks):
    folder, (first, second) = ranks
    assert all(same(first[name], second[name]) for name in ("mean", "live"))
    assert all(same(first["seen"][iteration], second["seen"][iteration]) for iteration in range(6))
    assert same(read_checkpoint(folder / "model_final.pth")["model"], first["mean"])

    def fits(*iterations: int) -> bool:
        weights = [first["seen"][iteration] for iteration in iterations]
        means = {name: sum(each[name].double() for each in weights) / len(weights) for name in weights[0]}
        return all(torch.allclose(first["mean"][name].double(), means[name], rtol=1e-6, atol=1e-7) for name in means)

    assert fits(3, 5)
    assert not any(fits(*others) for others in [(5,), (3,), (4, 5), (1, 3, 5), (2, 3, 4, 5)])


def test_the_statistics_are_those_of_the_mean_over_the_samples_of_both_ranks(ranks, tmp_path):
    """Each rank normalises its half of a batch by itself; what counts are the values of both."""
    run = Run(*finalize(tiny_cfg(tmp_path / "judge", *TWO, "SOLVER.MAX_ITER", 2)))
    run.model.load_state_dict(ranks[1][0]["mean"])
    found, network, inputs = statistics(run.model), run.model.eval(), {}
    for name, norm in norms_of(network).items():
        norm.train()
        inputs[name] = []
        norm.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0].double()))
    with torch.no_grad():
        for batch in build_train_loader(run.cfg, run.data.train):
            for half in batch.images.split(4):
                network(half)

    def over(parts: slice):
        columns = {name: torch.cat(each[parts]).transpose(0, 1).flatten(1) for name, each in inputs.items()}
        return {name: torch.stack([c.mean(1), c.var(1, unbiased=False)]) for name, c in columns.items()}

    assert {len(each) for each in inputs.values()} == {4}
    assert close(found, over(slice(None)))
    assert not close(found, over(slice(0, None, 2))) and not close(found, over(slice(1, None, 2)))


def again(folder: Path, to: Path, loop: str, own: bool = True) -> list[dict[str, Any]]:
    """What the run in ``folder`` leaves on each rank when it goes on, in a copy."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("model_final*", ".lock"))
    return on_ranks(2, as_rank, to.with_name(f"{to.name}_found"), to, loop, -1, True, own)


def same_end(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> bool:
    return all(same(one[name], other[name]) for one, other in zip(ours, theirs, strict=True))


def test_two_ranks_killed_behind_a_save_end_the_same(ranks, tmp_path):
    folder, straight = ranks
    found = again(folder, tmp_path / "run", "builtin")
    assert [(each["start"], list(each["seen"])) for each in found] == [(4, [4, 5])] * 2
    assert same_end(found, straight, "mean") and same_end(found, straight, "live")


def stopped(folder: Path, last: int) -> dict[str, Any]:
    """The checkpoint that a signal has two ranks write after iteration ``last``."""
    assert on_ranks(2, as_rank, folder.with_name("found"), folder, "builtin", last) == [{}, {}]
    return read_checkpoint(folder / f"model_{last:07d}.pth")


def test_two_ranks_stopped_at_a_save_make_up_for_the_statistics_of_the_mean(ranks, tmp_path):
    content = stopped(tmp_path / "run", 3)
    whole = read_checkpoint(ranks[0] / "model_0000003.pth")
    differ = {name for name, value in whole["model"].items() if not torch.equal(content["model"][name], value)}
    assert differ and all("running" in name for name in differ) and content["evaluation_due"]
    found = again(tmp_path / "run", tmp_path / "again", "plain")
    assert same(read_checkpoint(tmp_path / "again" / "model_0000003.pth")["model"], whole["model"])
    assert [each["start"] for each in found] == [4, 4]
    assert same_end(found, ranks[1], "mean") and same_end(found, ranks[1], "live")


def test_two_ranks_stopped_behind_a_save_go_on_with_their_own_statistics(ranks, tmp_path):
    assert len(stopped(tmp_path / "run", 4)["statistics_of_ranks"]) == 2
    found = again(tmp_path / "run", tmp_path / "again", "plain")
    assert [each["start"] for each in found] == [5, 5]
    assert same_end(found, ranks[1], "mean") and same_end(found, ranks[1], "live")
    assert not same_end(again(tmp_path / "run", tmp_path / "wrong", "plain", own=False), ranks[1], "live")
