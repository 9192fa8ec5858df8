"""A loss or gradient that is no finite number: nothing takes it, the run stops or goes on, the step is kept."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from test_loops import run_in_process, same
from torch import nn

from imgcls.engine import Run, finalize, step
from imgcls.engine.replay import replay, told
from imgcls.engine.step import can_be_masked, verdict
from imgcls.modeling.cls_net import ClsNet
from imgcls.solver import optimizers

SHORT = ("DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", (), "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)
BAD = 3  # the iteration that goes wrong; iteration 3 is one that saves


@pytest.fixture
def poison(monkeypatch):
    """``poison("loss")`` or ``poison("gradient")``: spoil one iteration, counted in steps of this process."""
    steps, forward = [], ClsNet.forward

    def spoil(kind, at=(BAD,), first=0):
        steps.clear()

        def spoilt(self, inputs, *rest, **more):
            losses = forward(self, inputs, *rest, **more)
            if self.training:
                steps.append(1)
                if first + len(steps) - 1 in at:
                    losses = dict(losses)
                    losses["loss_cls"] = (
                        losses["loss_cls"] * float("inf") if kind == "loss" else _Nan.apply(losses["loss_cls"])
                    )
            return losses

        monkeypatch.setattr(ClsNet, "forward", spoilt)

    return spoil


class _Nan(torch.autograd.Function):
    """A finite number whose gradient is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize("loop", ["plain", "builtin"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_it_stops_at_a_checkpoint_iteration_and_leaves_only_finite_files(kind, loop, poison, classifier_cfg, tmp_path):
    poison(kind)
    with pytest.raises(ValueError, match=rf"a loss or gradient is not finite at iteration {BAD} .*samples \d+") as told:
        run_in_process(loop, classifier_cfg("mobilenet_v1_0.25", *SHORT))
    assert "No weight was changed by it" in str(told.value)
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert names == ["model_0000001.pth", f"replay_{BAD:07d}.pth"]
    for name in names:
        content = torch.load(tmp_path / "run" / name, weights_only=True)
        tensors = [*content["model"].values(), *(s["momentum_buffer"] for s in content["optimizer"]["state"].values())]
        assert all(torch.isfinite(tensor.float()).all() for tensor in tensors)
    record = json.loads((tmp_path / "run" / f"replay_{BAD:07d}.json").read_text())
    assert record["iteration"] == BAD and len(record["samples"][0]) == 8


def test_a_resumed_run_ends_as_if_nothing_had_been(poison, classifier_cfg, tmp_path, monkeypatch):
    whole, _ = run_in_process(
        "plain", classifier_cfg("mobilenet_v1_0.25", *SHORT, "OUTPUT_DIR", str(tmp_path / "whole"))
    )
    cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT)
    with monkeypatch.context() as patch:
        poison("gradient")
        with pytest.raises(ValueError, match="not finite"):
            run_in_process("plain", cfg)
        patch.undo()
        monkeypatch.undo()
    again, _ = run_in_process("plain", cfg, resume=True)
    assert again.start_iter == 2 and same(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_left_out_changes_nothing(kind, poison, classifier_cfg, tmp_path, caplog):
    """Weights, momentum, running statistics and average stay those of the step before; the rest of the run goes on."""
    skip = (*SHORT, "SOLVER.NON_FINITE", "skip", "SOLVER.EMA.ENABLED", True, "SOLVER.MAX_ITER", BAD + 1)
    short = classifier_cfg("mobilenet_v1_0.25", *skip, "SOLVER.MAX_ITER", BAD, "OUTPUT_DIR", str(tmp_path / "short"))
    # A rate that does not look at the length of the run.
    for cfg in (short, long := classifier_cfg("mobilenet_v1_0.25", *skip)):
        cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupConstantLR"
    before, _ = run_in_process("plain", short)
    poison(kind)
    with caplog.at_level(logging.WARNING, "imgcls"):
        after, _ = run_in_process("plain", long)
    assert after.step.skipped == 1 and before.step.skipped == 0
    assert same(after.model.state_dict(), before.model.state_dict())
    assert same(after.network.state_dict(), before.network.state_dict())
    for one, two in zip(after.step.optimizer.state.values(), before.step.optimizer.state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    assert torch.load(tmp_path / "run/model_final.pth", weights_only=True)["skipped"] == 1


def test_more_than_the_most_end_the_run(poison, classifier_cfg):
    poison("loss", at=(1, 2, 4))
    skip = ("SOLVER.NON_FINITE", "skip", "SOLVER.NON_FINITE_MOST", 2)
    with pytest.raises(ValueError, match="not finite at iteration 4"):
        run_in_process("plain", classifier_cfg("mobilenet_v1_0.25", *SHORT, *skip))


def test_the_step_can_be_taken_again(poison, classifier_cfg, tmp_path, tool):
    """A weight that is no number: the replay names the module, the samples and the gradients."""
    cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT)
    poison("gradient")
    with pytest.raises(ValueError, match="not finite"):
        run_in_process("plain", cfg)
    record = json.loads((tmp_path / f"run/replay_{BAD:07d}.json").read_text())
    poison("gradient", first=BAD)
    run = Run(*finalize(cfg))
    found = replay(run, tmp_path / f"run/replay_{BAD:07d}.pth")
    assert found["iteration"] == BAD and found["samples"] == record["samples"][0]
    assert len(found["gradients"]) == len(list(run.model.parameters())) and found["outputs"] == []
    text = told(found)
    poison("gradient", first=BAD)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    words = ("--config-file", tmp_path / "run.yaml", "--replay", tmp_path / f"run/replay_{BAD:07d}.pth")
    before = sorted(tmp_path.rglob("*"))
    done = tool("tools/train_net.py", *words)
    assert done.returncode == 0 and text in done.stdout
    done = tool("tools/train_net.py", *words[:3], "gone.pth")
    assert done.returncode == 2 and "error: there is no such file: got 'gone.pth'; allowed: a replay_" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert f"iteration {BAD} on rank 0: loss_cls" in text and "modules whose output is not finite: none" in text


def test_the_replay_names_the_first_module_that_is_wrong(classifier_cfg, tmp_path):
    cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT)
    run, _ = run_in_process("plain", cfg)
    names = [name for name, module in run.model.named_modules() if isinstance(module, nn.Conv2d)]
    name = next(name for name in names if name.startswith("backbone.res3"))
    broken = Run(*finalize(cfg))
    broken.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * float("nan"))
    found = replay(broken, tmp_path / "run/model_0000001.pth")
    assert found["outputs"][0].startswith("backbone.res3") and "head" in " ".join(found["outputs"])


def test_the_verdict_finds_what_is_not_finite_and_hands_the_signal_on():
    one, large = torch.tensor(1.0), torch.full((4,), 3e38)  # whose squares are not finite
    assert verdict({"a": one}, []).tolist() == [0, 0] and verdict({"a": one}, [large, one], 15).tolist() == [0, 15]
    for bad in (torch.tensor(float("nan")), torch.tensor([1.0, float("-inf")])):
        assert verdict({"a": one}, [one, bad]).tolist() == [1, 0]
        assert verdict({"a": bad.sum()}, [one], 2).tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_read_one_step_later_the_verdict_changes_nothing_else(kind, poison, classifier_cfg, monkeypatch):
    """As on a GPU: the optimizer obeys the verdict on the device, the host reads it with the next step."""

    def skipping(late):
        poison("gradient", at=(0, BAD))  # the first step too: no state is there yet
        cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT, "SOLVER.OPTIMIZER", kind, "SOLVER.BASE_LR", 0.01)
        cfg.merge_from_list(
            ["SOLVER.NON_FINITE", "skip", "SOLVER.EMA.ENABLED", True, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_{late}"]
        )
        run = Run(*finalize(cfg))
        assert run.step.late is False and can_be_masked(run.step.optimizer)
        run.step.late = late
        values = [run.step(batch, i) and run.step.skipped for i, batch in enumerate(run.batches())]
        run.step.settle()
        return run, values

    monkeypatch.setattr(optimizers, "_fused", lambda name, groups: {"fused": True})
    (early, at_once), (late, later) = skipping(False), skipping(True)
    assert at_once == [1, 1, 1, 2, 2, 2] and later == [0, 1, 1, 1, 2, 2]
    ours, theirs = early.checkpoint(5), late.checkpoint(5)
    for part in ("model", "live"):
        assert same(ours[part], theirs[part])
    assert _plain(ours["optimizer"]) == _plain(theirs["optimizer"]) and ours["scheduler"] == theirs["scheduler"]
    assert ours["average_updates"] == theirs["average_updates"] == 4


def _plain(state):
    return {name: {key: value.tolist() for key, value in row.items()} for name, row in state["state"].items()}


def test_a_late_verdict_stops_at_the_same_place(poison, classifier_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "_fused", lambda name, groups: {"fused": True})
    monkeypatch.setattr(step, "can_be_masked", lambda optimizer: True)
    make = step.TrainStep.__init__

    def as_on_a_gpu(self, *rest, **more):
        make(self, *rest, **more)
        self.late = True

    monkeypatch.setattr(step.TrainStep, "__init__", as_on_a_gpu)
    for bad in (2, BAD):  # iteration 3 saves: the file waits for its verdict
        folder = tmp_path / f"bad{bad}"
        poison("gradient", at=(bad,))
        with pytest.raises(ValueError, match=rf"not finite at iteration {bad} "):
            run_in_process("builtin", classifier_cfg("mobilenet_v1_0.25", *SHORT, "OUTPUT_DIR", str(folder)))
        assert sorted(p.name for p in folder.glob("*.pth")) == ["model_0000001.pth", f"replay_{bad:07d}.pth"]
        state = torch.load(folder / f"replay_{bad:07d}.pth", weights_only=True)
        assert state["iteration"] == bad - 1 and state["scheduler"]["last_epoch"] == bad
