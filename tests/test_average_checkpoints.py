"""The mean of checkpoints: its arithmetic, what is refused, and that the result is taken wherever weights are."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_cfg
from test_loops import run_in_process

from imgcls.checkpoint import average_checkpoints, is_whole, load_weights, read_checkpoint
from imgcls.engine import Run, finalize
from imgcls.engine.precise_bn import recompute_statistics
from imgcls.transfer import convert, read_handover

FAST = ("DATALOADER.NUM_WORKERS", 0, "TEST.IMS_PER_BATCH", 500, "SOLVER.CHECKPOINT_KEEP", 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three iterations, a checkpoint after each."""
    cfg = tiny_cfg(tmp_path_factory.mktemp("soup") / "run", *FAST, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1)
    return run_in_process("plain", cfg)[0]


@pytest.fixture
def files(run):
    folder = run._folder
    return [folder / name for name in ("model_0000000.pth", "model_0000001.pth", "model_final.pth")]


@pytest.mark.parametrize("shares", [(), (1.0, 0.0, 3.0)], ids=["equal", "given"])
def test_the_mean_is_that_in_double_precision(files, shares):
    models = [read_checkpoint(path)["model"] for path in files]
    found = average_checkpoints(files, shares)
    weights = [share / sum(shares) for share in shares] or [1 / 3] * 3
    assert list(found["model"]) == list(models[0])
    for name, value in found["model"].items():
        if name.endswith("num_batches_tracked"):
            assert value == models[2][name] != models[0][name]
            continue
        mean = sum(weight * model[name].double() for weight, model in zip(weights, models, strict=True))
        assert value.dtype == models[0][name].dtype
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=0, atol=0)
    assert not torch.equal(found["model"]["head.fc.weight"], models[2]["head.fc.weight"])
    assert [each["share"] for each in found["averaged"]] == pytest.approx(weights)
    digest = json.loads(files[0].with_name(files[0].name + ".json").read_text())["sha256"]
    assert found["averaged"][0]["sha256"] == digest
    assert "optimizer" not in found and "metrics" not in found


def test_the_command_writes_what_everybody_takes(files, run, tool, tmp_path):
    output = tmp_path / "mean.pth"
    done = tool("tools/average_checkpoints.py", *files, "--output", output)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "0.3333 of model_0000000.pth"), done.stderr
    assert is_whole(output) and json.loads((tmp_path / "mean.pth.json").read_text())["iteration"] == -1
    # By a run, as weights to evaluate or to begin with ...
    judge = Run(*finalize(tiny_cfg(tmp_path / "run", *FAST, "MODEL.WEIGHTS", str(output)), eval_only=True))
    judge.load_initial(str(output))
    assert torch.equal(judge.model.head.fc.weight, average_checkpoints(files)["model"]["head.fc.weight"])
    assert judge.evaluate()["classification"]["top1"] >= 0
    # ... by the hand-over, but not as a run to go on with.
    convert(output, tmp_path / "backbone.pth")
    assert read_handover(tmp_path / "backbone.pth").classes == run.data.classes
    with pytest.raises(ValueError, match="no state of an imgcls run"):
        run_in_process("plain", tiny_cfg(tmp_path / "on", *FAST), resume=output)
    again = tool("tools/average_checkpoints.py", *files, "--output", output)
    assert again.returncode == 2 and "mean.pth exists; choose another --output, or add --overwrite" in again.stderr


def test_statistics_are_computed_anew_where_asked(files, run, tool, tmp_path):
    config = tmp_path / "short.yaml"
    config.write_text(f"_BASE_: {files[0].with_name('config.yaml')}\nTEST:\n  PRECISE_BN:\n    NUM_ITER: 2\n")
    words = (*files, "--output", tmp_path / "mean.pth", "--recompute-statistics", "--config-file", config)
    done = tool("tools/average_checkpoints.py", *words)
    assert done.returncode == 0 and "running statistics: computed anew" in done.stdout, done.stderr
    found, plain = read_checkpoint(tmp_path / "mean.pth")["model"], average_checkpoints(files)["model"]
    fresh = Run(*finalize(tiny_cfg(tmp_path / "run", *FAST)))
    load_weights(fresh.model, plain)
    recompute_statistics(fresh.cfg, fresh.model, fresh.data.train, iterations=2)
    for name, value in found.items():
        assert torch.equal(value, fresh.model.state_dict()[name])
        assert torch.equal(value, plain[name]) == ("running" not in name)


def rewritten(path, tmp_path, name, **changes):
    content = {key: value for key, value in read_checkpoint(path).items() if key != "digest"}
    torch.save({**content, **changes}, tmp_path / name)
    return tmp_path / name


def test_checkpoints_that_have_no_mean_are_refused(files, run, tmp_path):
    def refused(message, *others, shares=()):
        with pytest.raises(ValueError, match=message):
            average_checkpoints([files[0], *others], shares)

    content = read_checkpoint(files[1])
    refused("two checkpoints at least; got 1")
    refused(r"shares do not fit: got \[1.0\]; allowed: 2 numbers >= 0", files[1], shares=(1.0,))
    refused(r"shares do not fit: got \[1.0, -1.0\]", files[1], shares=(1.0, -1.0))
    refused(r"shares do not fit: got \[0.0, 0.0\]", files[1], shares=(0.0, 0.0))
    refused(r"shares do not fit: got \[nan, 1.0\]", files[1], shares=(float("nan"), 1.0))
    refused(r"there is no file none.pth", "none.pth")
    other = rewritten(files[1], tmp_path, "classes.pth", classes=content["classes"][::-1])
    refused(r"classes.pth has another classes than .*another order", other)
    contract = {**content["contract"], "pixel_mean": [0.0] * 3}
    other = rewritten(files[1], tmp_path, "contract.pth", contract=contract)
    refused(r"contract.pth has another contract .*\{'pixel_mean': \[0.0, 0.0, 0.0\]\} to \{'pixel_mean': \[123", other)
    architecture = {**content["architecture"], "stem": "small"}
    other = rewritten(files[1], tmp_path, "stem.pth", architecture=architecture)
    refused(r"another architecture .*\{'stem': 'small'\} to \{'stem': 'standard'\}", other)
    model = {name: value for name, value in content["model"].items() if name != "head.fc.bias"}
    refused(r"less.pth has other tensors .*: head.fc.bias;", rewritten(files[1], tmp_path, "less.pth", model=model))
    model = {**content["model"], "head.fc.bias": torch.zeros(11)}
    refused(r"other tensors than .*: head.fc.bias;", rewritten(files[1], tmp_path, "more.pth", model=model))
    convert(files[1], tmp_path / "backbone.pth")
    refused(r"backbone.pth is no checkpoint of an imgcls classifier \(it has no", tmp_path / "backbone.pth")
    model = {**content["model"], "head.fc.bias": torch.full((10,), float("nan"))}
    refused(r"nan.pth holds NaN in head.fc.bias", rewritten(files[1], tmp_path, "nan.pth", model=model))
