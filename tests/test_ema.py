"""The average of the weights: its arithmetic, its place in evaluation, checkpoints and hand-over, and exact resume."""

from __future__ import annotations

import pytest
import torch
from test_loops import run_in_process, same
from torch import nn

from imgcls.checkpoint import read_checkpoint
from imgcls.engine import Run, finalize
from imgcls.solver import Ema

ON = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9, "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 4)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_that_of_the_formula(warmup):
    """a := d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)); the first weights are the first average."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(net, 0.4, warmup=warmup)
    slow = None
    for update in range(8):
        with torch.no_grad():
            for value in [*net.parameters(), net[1].running_mean, net[1].running_var]:
                value.copy_(torch.randn_like(value))
            net[1].num_batches_tracked += 1
        ema.update(net, update)
        now = {name: value.clone() for name, value in net.state_dict().items()}
        kept = min(0.4, (1 + update) / (10 + update)) if warmup else 0.4
        slow = now if slow is None else {n: kept * slow[n] + (1 - kept) * value for n, value in now.items()}
    state = ema.state_dict()
    for name, value in slow.items():
        if "num_batches" in name:
            assert state[name] == 8  # counters are copied
        else:
            torch.testing.assert_close(state[name], value)
            assert not torch.equal(state[name], net.state_dict()[name])


def test_the_average_goes_on_where_it_was():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    whole, first = Ema(net, 0.9), Ema(net, 0.9)
    weights = [torch.randn(2, 3) for _ in range(6)]

    def take(ema, values):
        for iteration, value in enumerate(values):
            net.weight.data.copy_(value)
            ema.update(net, iteration)

    take(whole, weights)
    take(first, weights[:3])
    second = Ema(net, 0.9)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()}, first.updates)
    take(second, weights[3:])
    assert torch.equal(second.network.weight, whole.network.weight)
    take(fresh := Ema(net, 0.9), weights[3:])
    assert not torch.equal(fresh.network.weight, whole.network.weight)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four iterations with an average, its final checkpoint, and the same run without."""
    from conftest import tiny_cfg

    folder = tmp_path_factory.mktemp("ema")
    run, _ = run_in_process("plain", tiny_cfg(folder / "on", *ON, "SOLVER.CHECKPOINT_PERIOD", 2))
    run_in_process("plain", tiny_cfg(folder / "off", *ON, "SOLVER.EMA.ENABLED", False))
    return folder, run


def test_the_checkpoint_holds_the_average_and_the_live_weights(trained):
    folder, run = trained
    content = read_checkpoint(folder / "on/model_final.pth")
    assert same(content["model"], run.network.state_dict()) and same(content["live"], run.model.state_dict())
    assert not same(content["model"], content["live"]) and content["average_updates"] == 4
    off = read_checkpoint(folder / "off/model_final.pth")
    assert same(off["model"], content["live"]) and "live" not in off  # the average changes no training


def test_what_is_evaluated_is_what_is_handed_over(trained):
    """The figure of the run is that of the saved file, read by a process that knows of no average."""
    from conftest import tiny_cfg

    folder, run = trained
    cfg = tiny_cfg(folder / "judge", *ON, "MODEL.WEIGHTS", str(folder / "on/model_final.pth"))
    judge = Run(*finalize(cfg, eval_only=True))
    judge.load_initial(cfg.MODEL.WEIGHTS)
    assert same(judge.model.state_dict(), run.network.state_dict())
    assert judge.evaluate() == run.results
    judge.model.load_state_dict(run.model.state_dict())
    assert judge.evaluate() != run.results


@pytest.mark.parametrize("loop", ["plain", "builtin"])
def test_a_resumed_run_ends_with_the_same_average(trained, loop, tmp_path):
    import shutil

    from conftest import tiny_cfg

    folder, run = trained
    shutil.copytree(folder / "on", tmp_path / "on")
    for path in (tmp_path / "on").glob("model_final*"):
        path.unlink()
    again, _ = run_in_process(loop, tiny_cfg(tmp_path / "on", *ON, "SOLVER.CHECKPOINT_PERIOD", 2), resume=True)
    assert again.start_iter == 2
    assert same(again.network.state_dict(), run.network.state_dict())
    assert same(again.model.state_dict(), run.model.state_dict())
