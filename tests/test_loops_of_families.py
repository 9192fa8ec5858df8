"""Both loops on networks unlike MobileNetV1: without norms, with a class token, with auxiliary heads."""

from __future__ import annotations

import pytest
import torch
from test_loops import losses, run_in_process, same, weights

CASES = {
    "squeezenet1_1": (),
    "vit_ti_16": ("MODEL.BACKBONE.PRETRAIN_SIZE", 32, "MODEL.BACKBONE.DROP_PATH", 0.2),
    "googlenet": ("INPUT.TRAIN_SIZE", 64, "INPUT.TEST_SIZE", 64, "MODEL.HEAD.AUX_WEIGHT", 0.3),
}
SHORT = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0)


def run(loop, classifier_cfg, variant, folder, *words):
    cfg = classifier_cfg(variant, *SHORT, *CASES[variant], "DATASETS.TEST", (), "OUTPUT_DIR", str(folder), *words)
    return run_in_process(loop, cfg)[0]


@pytest.mark.parametrize("variant", CASES)
def test_both_loops_train_the_same_two_steps(variant, classifier_cfg, tmp_path):
    runs = {loop: run(loop, classifier_cfg, variant, tmp_path / loop) for loop in ("plain", "builtin")}
    plain, builtin = tmp_path / "plain", tmp_path / "builtin"
    assert sorted(losses(plain)) == [0, 1]
    assert losses(plain) == losses(builtin)
    assert same(weights(plain), weights(builtin))
    auxiliary = [name for name in weights(plain) if name.startswith("head.auxiliary.")]
    assert bool(auxiliary) == (variant == "googlenet")
    assert any("cls_token" in name for name in weights(plain)) == (variant == "vit_ti_16")
    assert runs["plain"].start_iter == 0


@pytest.mark.parametrize("variant", CASES)
def test_twin_another_seed_trains_otherwise(variant, classifier_cfg, tmp_path):
    run("plain", classifier_cfg, variant, tmp_path / "one")
    run("builtin", classifier_cfg, variant, tmp_path / "other", "SEED", 7)
    assert losses(tmp_path / "one") != losses(tmp_path / "other")
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def test_auxiliary_heads_learn(classifier_cfg, tmp_path):
    trained = run("plain", classifier_cfg, "googlenet", tmp_path / "run", "SOLVER.BASE_LR", 0.1).model
    idle = run("plain", classifier_cfg, "googlenet", tmp_path / "idle", "SOLVER.BASE_LR", 0.0).model
    moved = [
        name
        for (name, ours), theirs in zip(trained.named_parameters(), idle.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    ]
    assert [name for name in moved if name.startswith("head.auxiliary.")]
    assert len(moved) > 0.9 * len(list(idle.parameters()))
