"""Every schedule against torch's own, or a closed form from its paper, at every iteration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch.optim import lr_scheduler

from imgcls.config import all_problems, resolve_durations
from imgcls.config.checks import CLASSIFIER
from imgcls.data import Source
from imgcls.data.datasets import ArraySource
from imgcls.engine import Run, setup, train
from imgcls.engine.output.output_dir import release
from imgcls.engine.setup import Data
from imgcls.solver import build_schedule
from imgcls.solver.schedules import SCHEDULES, PlateauMultiplier, apply_current, check_schedule

STEPS, BASE = 60, 0.4
Torch = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (BASE,)]
    return torch.optim.SGD(groups)


def solver(cfg: CfgNode, name: str, **keys: object) -> CfgNode:
    node = cfg.SOLVER
    node.LR_SCHEDULER_NAME, node.MAX_ITER, node.BASE_LR, node.WARMUP_ITERS = name, STEPS, BASE, 0
    for key, value in keys.items():
        assert key in node
        node[key] = value
    return cfg


def sequence(scheduler: lr_scheduler.LRScheduler, steps: int = STEPS) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


TORCH: dict[str, tuple[dict[str, object], Torch]] = {
    "WarmupMultiStepLR": (
        {"STEPS": (20, 45), "GAMMA": 0.1},
        lambda o: lr_scheduler.MultiStepLR(o, [20, 45], gamma=0.1),
    ),
    "WarmupStepLR": ({"DECAY_ITERS": 7, "GAMMA": 0.5}, lambda o: lr_scheduler.StepLR(o, 7, gamma=0.5)),
    "WarmupExponentialLR": (
        {"DECAY_ITERS": 1, "GAMMA": 0.93},
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.93),
    ),
    "WarmupPolynomialLR": (
        {"POLYNOMIAL_POWER": 2.0},
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=2.0),
    ),
    "WarmupLinearLR": (
        {"BASE_LR_END": 0.1},
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=STEPS),
    ),
    "WarmupCosineLR": (
        {"BASE_LR_END": 0.02},
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.02),
    ),
    # 1 + 2 + 4 parts of 60 / 7 iterations are no whole numbers; 4 equal cycles are.
    "WarmupCosineRestartsLR": (
        {"RESTART_CYCLES": 4, "RESTART_GROWTH": 1.0, "BASE_LR_END": 0.02},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 15, eta_min=0.02),
    ),
    "WarmupConstantLR": ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
}


@pytest.mark.parametrize("name", TORCH)
def test_the_sequence_is_torchs(name: str, plain_cfg: CfgNode) -> None:
    keys, theirs = TORCH[name]
    ours = sequence(build_schedule(solver(plain_cfg, name, **keys), optimizer()))
    assert ours == pytest.approx(sequence(theirs(optimizer())), rel=1e-9, abs=1e-12)
    assert (len(set(ours)) > 1) == (name != "WarmupConstantLR")


def test_growing_restarts_are_torchs(plain_cfg: CfgNode) -> None:
    cfg = solver(plain_cfg, "WarmupCosineRestartsLR", MAX_ITER=70, RESTART_CYCLES=3, RESTART_GROWTH=2.0)
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), 10, T_mult=2)
    assert sequence(build_schedule(cfg, optimizer()), 70) == pytest.approx(sequence(theirs, 70), rel=1e-9, abs=1e-12)


def test_fixed_gamma_spreads_its_decays_evenly(plain_cfg: CfgNode) -> None:
    cfg = solver(plain_cfg, "WarmupStepWithFixedGammaLR", NUM_DECAYS=3, GAMMA=0.1)
    expected = [BASE * 0.1 ** (step // 15) for step in range(STEPS)]
    assert sequence(build_schedule(cfg, optimizer())) == pytest.approx(expected)


def test_one_cycle_goes_up_and_down_in_cosines(plain_cfg: CfgNode) -> None:
    """Smith & Topin 2018; torch's class reaches its ends one iteration earlier, so the formula stands here."""
    cfg = solver(plain_cfg, "OneCycleLR", WARMUP_ITERS=18, WARMUP_FACTOR=0.04, BASE_LR_END=BASE * 1e-4)

    def rate(step: int) -> float:
        start, end, done = (0.04, 1.0, step / 18) if step < 18 else (1.0, 1e-4, (step - 18) / 42)
        return BASE * (end + (start - end) * (1 + math.cos(math.pi * done)) / 2)

    assert sequence(build_schedule(cfg, optimizer())) == pytest.approx([rate(step) for step in range(STEPS)])
    theirs = lr_scheduler.OneCycleLR(
        optimizer(), BASE, total_steps=STEPS, pct_start=0.3, div_factor=25, final_div_factor=400, cycle_momentum=False
    )
    ours = sequence(build_schedule(cfg, optimizer()))
    assert all(abs(a - b) < 0.1 * BASE for a, b in zip(ours, sequence(theirs), strict=False))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupPolynomialLR", "WarmupExponentialLR"])
def test_the_schedule_begins_with_the_warm_up_or_after_it(name: str, after: bool, plain_cfg: CfgNode) -> None:
    keys = {"WARMUP_FACTOR": 0.1, "RESCALE_INTERVAL": after, "DECAY_ITERS": 5, "GAMMA": 0.9}
    bare = sequence(build_schedule(solver(plain_cfg, name, **keys), optimizer()))
    warm = sequence(build_schedule(solver(plain_cfg, name, WARMUP_ITERS=12), optimizer()))
    reached = BASE if after else bare[12]
    assert warm[:12] == pytest.approx([0.1 * BASE + (reached - 0.1 * BASE) * step / 12 for step in range(12)])
    if after:
        assert warm[12] == pytest.approx(BASE) and warm[-1] != bare[-1]
        assert warm[36] == pytest.approx(bare[30])  # half of each
    else:
        assert warm[12:] == pytest.approx(bare[12:])


def test_the_groups_keep_their_ratio(plain_cfg: CfgNode) -> None:
    schedule = build_schedule(solver(plain_cfg, "WarmupPolynomialLR"), optimizer(0.4, 0.1))
    for _ in range(30):
        schedule.optimizer.step()
        schedule.step()
    assert [group["lr"] for group in schedule.optimizer.param_groups] == pytest.approx([0.2, 0.05])


def plateau(cfg: CfgNode) -> PlateauMultiplier:
    schedule = build_schedule(solver(cfg, "PlateauLR", GAMMA=0.5, PLATEAU_PATIENCE=1, BASE_LR_END=0.1), optimizer())
    assert isinstance(schedule, PlateauMultiplier)
    return schedule


def rates_at(schedule: PlateauMultiplier, values: list[float]) -> list[float]:
    rates = []
    for value in values:
        schedule.evaluated(value)
        schedule.optimizer.step()
        schedule.step()
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    return rates


# The second evaluation without a better value halves the rate, which never goes below its end.
VALUES = [10.0, 20.0, 20.0, 19.0, 30.0, 30.0, 30.0, 1.0, 1.0, 1.0, 1.0]
RATES = [0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_a_plateau_lowers_the_rate(plain_cfg: CfgNode) -> None:
    assert rates_at(plateau(plain_cfg), VALUES) == pytest.approx(RATES)


@pytest.mark.parametrize("cut", range(1, len(VALUES)))
def test_a_plateau_is_remembered_over_a_restart(cut: int, plain_cfg: CfgNode) -> None:
    first = plateau(plain_cfg)
    rates_at(first, VALUES[:cut])
    second = plateau(plain_cfg)
    second.load_state_dict(first.state_dict())
    apply_current(second)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(RATES[cut - 1])
    assert rates_at(second, VALUES[cut:]) == pytest.approx(RATES[cut:])


def test_every_name_may_stand_in_a_config_and_is_tested_here(plain_cfg: CfgNode) -> None:
    limit = CLASSIFIER["SOLVER.LR_SCHEDULER_NAME"]
    assert limit.allowed == ", ".join(SCHEDULES)
    assert set(SCHEDULES) == {*TORCH, "WarmupStepWithFixedGammaLR", "OneCycleLR", "PlateauLR"}


def test_an_end_above_the_base_rate_is_refused(plain_cfg: CfgNode) -> None:
    cfg = solver(plain_cfg, "WarmupCosineLR", BASE_LR_END=0.5)
    cfg.MODEL.META_ARCHITECTURE = "ClsNet"
    assert any("the schedule ends above its base rate: got 0.5; allowed: at most" in str(p) for p in all_problems(cfg))
    cfg.SOLVER.BASE_LR_END = 0.4
    assert not any(problem.key == "SOLVER.BASE_LR_END" for problem in all_problems(cfg))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SOLVER.GAMMA": 1.0}, "a plateau would not lower the rate: got 1.0; .*SOLVER.GAMMA"),
        ({"TEST.EVAL_PERIOD": 0}, "the schedule has no evaluations to look at: got 'PlateauLR'"),
        ({"DATASETS.TEST": ()}, "the schedule has no evaluations to look at: got 'PlateauLR'"),
    ],
    ids=["gamma", "period", "data"],
)
def test_a_plateau_that_could_never_lower_the_rate_is_refused(
    change: dict[str, Any], said: str, plain_cfg: CfgNode
) -> None:
    cfg = solver(plain_cfg, "PlateauLR", GAMMA=0.5)
    sound = ["MODEL.META_ARCHITECTURE", "ClsNet", "DATASETS.TEST", ("digits_val",), "TEST.EVAL_PERIOD", 5]
    cfg.merge_from_list(sound)
    assert check_schedule(cfg) == []
    cfg.merge_from_list([word for pair in change.items() for word in pair])
    (problem,) = check_schedule(cfg)
    assert re.match(said, str(problem))


def test_decay_in_epochs(plain_cfg: CfgNode) -> None:
    """MobileNetV1's 0.98 an epoch, EfficientNet's 0.97 every 2.4 epochs."""
    cfg = solver(plain_cfg, "WarmupExponentialLR", DECAY_EPOCHS=2.4, IMS_PER_BATCH=10, GAMMA=0.97)
    resolve_durations(cfg, 100)
    assert cfg.SOLVER.DECAY_ITERS == 24
    assert sequence(build_schedule(cfg, optimizer()))[24] == pytest.approx(BASE * 0.97)


def test_a_run_lowers_its_rate_when_evaluations_stall(classifier_cfg: Callable[..., CfgNode]) -> None:
    """Nothing is learnt with a rate of almost 0: every evaluation after the first is a bad one."""
    cfg = classifier_cfg("mobilenet_v1_0.25", "SOLVER.LR_SCHEDULER_NAME", "PlateauLR", "SOLVER.PLATEAU_PATIENCE", 0)
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e-12, "SOLVER.GAMMA", 0.5, "TEST.EVAL_PERIOD", 1, "SOLVER.WARMUP_ITERS", 0])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.BASE_LR_END", 0.0])
    cfg, data = setup(cfg)
    run = Run(cfg, Data(data.train, few(data.test), data.classes))
    run.start(resume=False)
    train(run)
    release(cfg.OUTPUT_DIR)
    assert isinstance(run.step.schedule, PlateauMultiplier)
    assert run.step.schedule.factor == 0.5**3  # four evaluations, the first of which set the mark
    assert run.step.optimizer.param_groups[0]["lr"] == pytest.approx(1e-12 / 8)


def few(source: Source | None) -> ArraySource:
    assert isinstance(source, ArraySource)
    return ArraySource("few", source.pixels[::50], source.labels[::50], source.classes)
