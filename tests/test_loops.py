"""Both loops: the same losses and weights, each resuming the other's checkpoint, alone and on two ranks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from imgcls.engine import ClsTrainer, Run, finalize, train
from imgcls.engine.output.output_dir import release
from imgcls.engine.setup import setup

LOOPS = {"plain": "tools/train_net.py", "builtin": "tools/train_net_builtin.py"}
SMALL = (
    *("INPUT.TRAIN_SIZE", 32, "INPUT.TEST_SIZE", 32, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.LOG_PERIOD", 1),
    *("SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.CHECKPOINT_KEEP", 9, "TEST.EVAL_PERIOD", 4, "MODEL.HEAD.DROPOUT", 0.2),
    *("SOLVER.WARMUP_ITERS", 2, "TEST.IMS_PER_BATCH", 500),
    *("SOLVER.EMA.ENABLED", True, "SOLVER.ACCUMULATE", 2, "INPUT.MIXUP_ALPHA", 0.2),
)


def run_in_process(loop, cfg, *, resume=False):
    cfg, data = setup(cfg, resume=resume)
    try:
        if loop == "builtin":
            trainer = ClsTrainer(cfg, data)
            trainer.resume_or_load(resume=resume)
            return trainer.run, trainer.train()
        run = Run(cfg, data)
        run.start(resume=resume)
        return run, train(run)
    finally:
        release(cfg.OUTPUT_DIR)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def weights(folder, name="model_final.pth"):
    """The weights, and where an average is kept both it and what training goes on with."""
    content = torch.load(folder / name, weights_only=True)
    return content["model"] | {f"live.{key}": value for key, value in content.get("live", {}).items()}


def in_all(ids):
    """The samples of all ranks together."""
    return sorted(i for rank in ids for i in rank)


def trace(folder):
    """The samples of each iteration: a list for each rank."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    return [line["ids"] for line in lines]


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of each loop, alone and on two ranks, through the commands that people type."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    root, out = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("loops")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for ranks in (1, 2):
        for loop, tool in LOOPS.items():
            words = [tool, "--config-file", "configs/quick/digits_mobilenet_v1.yaml", "--num-gpus", ranks]
            folder = out / f"{loop}{ranks}"
            words += ["--output", folder, *SMALL, "SOLVER.MAX_ITER", 8, "MODEL.DEVICE", "cpu"]
            words += ["DATALOADER.TRACE", folder / "trace.jsonl"]
            done = subprocess.run(
                [sys.executable, *map(str, words)], cwd=root, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-2000:]
            if ranks == 2:
                assert "starting 2 processes on the CPU (gloo)" in done.stderr or torch.cuda.is_available()
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_loops_give_identical_losses_and_weights(runs, ranks):
    plain, builtin = runs / f"plain{ranks}", runs / f"builtin{ranks}"
    assert sorted(losses(plain)) == list(range(8))
    assert losses(plain) == losses(builtin)
    assert same(weights(plain), weights(builtin))
    optimizers = [torch.load(f / "model_final.pth", weights_only=True)["optimizer"]["state"] for f in (plain, builtin)]
    assert all(
        torch.equal(optimizers[0][i]["momentum_buffer"], optimizers[1][i]["momentum_buffer"]) for i in optimizers[0]
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_one_rank_goes_on_with_the_samples_of_two(runs, loop, tmp_path, classifier_cfg):
    """And with all of their state: each iteration has the same set of samples as without the change."""
    two = trace(runs / f"{loop}2")
    assert [in_all(ids) for ids in two] == [in_all(ids) for ids in trace(runs / f"{loop}1")]
    assert all(len(ids) == 2 and len(ids[0]) == len(ids[1]) == 4 for ids in two) and len(two) == 8
    folder = tmp_path / "resumed"
    shutil.copytree(runs / f"{loop}2", folder)
    for gone in folder.glob("model_[!0]*"):
        gone.unlink()
    overrides = ("SOLVER.MAX_ITER", 8, "OUTPUT_DIR", str(folder), "DATALOADER.TRACE", str(folder / "trace.jsonl"))
    run, _ = run_in_process(loop, classifier_cfg("mobilenet_v1_0.25", *SMALL, *overrides), resume=True)
    assert run.start_iter == 6 and run.checkpoint(7)["average_updates"] == 8
    resumed = trace(folder)
    assert resumed[:6] == two[:6] and [len(ids) for ids in resumed[6:]] == [1, 1]
    assert [in_all(ids) for ids in resumed] == [in_all(ids) for ids in two]


def test_the_comparison_would_see_a_difference(runs):
    assert losses(runs / "plain1") != losses(runs / "plain2")
    assert not same(weights(runs / "plain1"), weights(runs / "plain2"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reported_figures_are_those_of_the_saved_file(runs, ranks, classifier_cfg):
    """On two ranks this needs running statistics that were averaged before both."""
    folder = runs / f"plain{ranks}"
    cfg = classifier_cfg("mobilenet_v1_0.25", *SMALL[:4], "MODEL.WEIGHTS", str(folder / "model_final.pth"))
    cfg, data = finalize(cfg, eval_only=True)
    run = Run(cfg, data)
    run.load_initial(cfg.MODEL.WEIGHTS)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    reported = next(line for line in reversed(lines) if "classification/top1" in line)
    found = run.evaluate()["classification"]
    assert found["top1"] == reported["classification/top1"] and found["top5"] == reported["classification/top5"]
    assert found["loss"] == pytest.approx(reported["classification/loss"], rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [("plain", "builtin"), ("builtin", "plain"), ("plain", "plain")])
def test_each_loop_resumes_the_others_checkpoint_exactly(runs, tmp_path, classifier_cfg, first, second):
    """From iteration 3 of one loop's run to the end with the other: as if nothing had happened."""
    folder = tmp_path / "resumed"
    shutil.copytree(runs / f"{first}1", folder)
    for gone in folder.glob("model_*"):
        if not gone.name.startswith("model_0000002"):
            gone.unlink()
    cfg = classifier_cfg("mobilenet_v1_0.25", *SMALL, "SOLVER.MAX_ITER", 8, "OUTPUT_DIR", str(folder))
    run, _ = run_in_process(second, cfg, resume=True)
    assert run.start_iter == 3
    assert same(weights(folder), weights(runs / f"{first}1"))
    assert losses(folder) == losses(runs / f"{first}1")


def test_a_finished_run_goes_on_when_the_length_grows(classifier_cfg):
    run_in_process("plain", classifier_cfg())
    cfg = classifier_cfg("mobilenet_v1_0.25", "SOLVER.MAX_ITER", 6)
    run, results = run_in_process("builtin", cfg, resume=True)
    assert run.start_iter == 4 and results["classification"]["top1"] >= 0
    run, results = run_in_process("plain", cfg, resume=True)
    assert run.start_iter == 6 and "classification" in results


def test_a_run_that_chose_its_seed_keeps_it_on_resume(classifier_cfg):
    import yaml

    cfg = classifier_cfg("mobilenet_v1_0.25", "SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 2)
    run, _ = run_in_process("plain", cfg)
    folder = run._folder
    straight = weights(folder)
    (folder / "model_final.pth").unlink()
    seed = yaml.safe_load((folder / "config.yaml").read_text())["SEED"]
    assert seed >= 0
    again, _ = run_in_process("builtin", cfg, resume=True)
    assert seed == again.cfg.SEED and again.start_iter == 2
    assert same(weights(folder), straight)


def test_lists_of_dicts_train_to_the_same_weights_as_tensors(classifier_cfg, tmp_path):
    states = []
    for packing in ("tensors", "dicts"):
        overrides = ("DATALOADER.PACKING", packing, "OUTPUT_DIR", str(tmp_path / packing))
        run, _ = run_in_process("plain", classifier_cfg("mobilenet_v1_0.25", *overrides))
        states.append(run.model.state_dict())
    assert same(*states)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0], r"PIXEL_MEAN is \[0.0, 0.0, 0.0\] in the config, the weights need \[123"),
        ("MODEL.BACKBONE.STEM", "small", r"STEM is 'small' in the config, the weights need 'standard'"),
    ],
)
def test_weights_are_not_used_with_another_input_or_stem(classifier_cfg, key, value, message):
    cfg = classifier_cfg()
    run, _ = run_in_process("plain", cfg)
    other = classifier_cfg("mobilenet_v1_0.25", key, value)
    with pytest.raises(ValueError, match=rf"cannot go on with another {key}: .* -> "):
        run_in_process("plain", other, resume=True)
    with pytest.raises(ValueError, match=message):
        Run(*finalize(other)).load_initial(str(run._folder / "model_final.pth"))


def test_a_file_of_weights_alone_cannot_be_resumed(classifier_cfg):
    from pathlib import Path

    cfg = classifier_cfg()
    Path(cfg.OUTPUT_DIR).mkdir()
    torch.save({"model": {}}, Path(cfg.OUTPUT_DIR) / "model_final.pth")
    with pytest.raises(ValueError, match=r"no state of an imgcls run.*MODEL.WEIGHTS"):
        run_in_process("plain", cfg, resume=True)


def test_learning_rate_zero_moves_no_weight_and_another_does(classifier_cfg):
    cfg = classifier_cfg("mobilenet_v1_0.25", "SOLVER.BASE_LR", 0.0)
    start = {k: v.clone() for k, v in Run(*finalize(cfg)).model.state_dict().items()}
    run, _ = run_in_process("plain", cfg)
    moved = [k for k, v in run.model.named_parameters() if not torch.equal(v, start[k])]
    assert moved == []
    run, _ = run_in_process("plain", classifier_cfg("mobilenet_v1_0.25", "OUTPUT_DIR", cfg.OUTPUT_DIR + "2"))
    assert all(not torch.equal(v, start[k]) for k, v in run.model.named_parameters())


def test_it_learns_real_digits_and_not_shuffled_ones(classifier_cfg, tmp_path, monkeypatch):
    import numpy as np

    from imgcls.data.datasets import ArraySource, catalog

    overrides = (
        *("SOLVER.MAX_ITER", 120, "SOLVER.IMS_PER_BATCH", 64, "SOLVER.BASE_LR", 0.1, "MODEL.BACKBONE.STEM", "small"),
        *("INPUT.TRAIN_TRANSFORMS", [["resize"]]),
    )
    _, results = run_in_process("plain", classifier_cfg("mobilenet_v1_0.25", *overrides))
    assert results["classification"]["top1"] > 80

    def shuffled(root):
        source = catalog.SETS["digits_val"](root)
        order = np.random.default_rng(0).permutation(len(source))
        return ArraySource("shuffled", source.pixels, source.labels[order], source.classes)

    monkeypatch.setitem(catalog.SETS, "shuffled_train", shuffled)
    cfg = classifier_cfg("mobilenet_v1_0.25", *overrides, "DATASETS.TRAIN", ("shuffled_train",))
    cfg.OUTPUT_DIR = str(tmp_path / "shuffled")
    _, results = run_in_process("plain", cfg)
    assert results["classification"]["top1"] < 25


@pytest.mark.parametrize("loop", ["plain", "builtin"])
def test_a_broken_image_ends_training_with_its_name(loop, classifier_cfg, tmp_path):
    from conftest import write_image_folder

    root = write_image_folder(tmp_path / "data", {"ant": 12, "bee": 12})
    bad = root / "bee" / "003.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    cfg = classifier_cfg("mobilenet_v1_0.25", "DATASETS.TRAIN", (f"folder:{root}",), "DATASETS.TEST", ())
    with pytest.raises(ValueError, match=r"cannot read the image .*bee/003.png"):
        run_in_process(loop, cfg)


@pytest.mark.parametrize("loop", ["plain", "builtin"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_takes_it(loop, classifier_cfg):
    message = r"a loss or gradient is not finite at iteration \d+ .*on rank 0.*samples \d+.*BASE_LR"
    with pytest.raises(ValueError, match=message):
        run_in_process(loop, classifier_cfg("mobilenet_v1_0.25", "SOLVER.BASE_LR", 1e30, "SOLVER.MAX_ITER", 50))


def test_ones_own_trainer_may_add_hooks_as_in_detectron2(classifier_cfg):
    from detectron2.engine import HookBase

    seen = []

    class Note(HookBase):
        def after_step(self):
            seen.append(self.trainer.iter)

    trainer = ClsTrainer(classifier_cfg())
    trainer.register_hooks([Note()])
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert seen == [0, 1, 2, 3]
    assert trainer.scheduler.last_epoch == 4


def test_a_checkpoint_hook_of_detectron2s_writes_what_can_be_resumed(classifier_cfg):
    from detectron2.engine import hooks

    cfg = classifier_cfg()
    trainer = ClsTrainer(cfg)
    trainer.register_hooks([hooks.PeriodicCheckpointer(trainer.checkpointer, 3)])
    trainer.resume_or_load(resume=False)
    trainer.train()
    folder = trainer.run._folder
    straight = weights(folder)
    (folder / "model_final.pth").unlink()
    run, _ = run_in_process("plain", cfg, resume=True)
    assert run.start_iter == 3
    assert same(weights(folder), straight)
