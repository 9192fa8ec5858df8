"""Epochs into iterations: typed-in values, a slow stream as oracle, and schedules that do not fit."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg

from imgcls.config.defaults import add_imgcls_config
from imgcls.config.durations import iterations_for, resolve_durations
from imgcls.config.loading import load_config


def config(**solver: Any) -> CfgNode:
    """100 images at batch 10 make an epoch of 10 iterations."""
    cfg = add_imgcls_config(get_cfg())
    cfg.SOLVER.IMS_PER_BATCH = 10
    for key, value in solver.items():
        group = cfg.TEST if key.startswith("EVAL") else cfg.SOLVER
        assert key in group
        group[key] = value
    return cfg


# ------------------------------------------------------------------------------------------------- one length

BY_HAND = [
    (1, 100, 32, 4),  # 3.125
    (10, 100, 32, 32),  # 31.25: batches cross the ends of epochs, or it would be 40
    (90, 1_281_167, 256, 450_411),  # ImageNet: 450410.27
    (90, 1_281_167, 1024, 112_603),  # 112602.57
    (2, 64, 64, 2),
    (0.5, 64, 64, 1),
    (0.001, 64, 64, 1),
    (1, 1, 64, 1),
    (3, 1, 2, 2),
    (0, 100, 10, 0),
]


@pytest.mark.parametrize(("epochs", "images", "batch", "iterations"), BY_HAND)
def test_lengths_worked_out_by_hand(epochs: float, images: int, batch: int, iterations: int) -> None:
    assert iterations_for(epochs, images, batch) == iterations


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "iterations"), [(1.1, 100, 10, 11), (0.1, 30, 3, 1), (0.07, 100, 1, 7)]
)
def test_epochs_count_as_the_decimal_that_is_written(epochs: float, images: int, batch: int, iterations: int) -> None:
    assert iterations_for(epochs, images, batch) == iterations


def test_twin_binary_arithmetic_adds_an_iteration() -> None:
    assert math.ceil(1.1 * 100 / 10) == 12 and math.ceil(0.07 * 100 / 1) == 8


def fewest_showings(iterations: int, images: int, batch: int) -> int:
    """How often the least shown image appears: the stream, walked one image at a time."""
    shown = Counter(position % images for position in range(iterations * batch))
    return min(shown[image] for image in range(images))


def cases() -> Iterator[tuple[int, int, int]]:
    draw = random.Random(0)
    for _ in range(200):
        yield draw.randint(1, 6), draw.randint(1, 40), draw.randint(1, 50)


def test_a_run_shows_every_image_once_an_epoch_and_is_no_longer_than_needed() -> None:
    for epochs, images, batch in cases():
        iterations = iterations_for(epochs, images, batch)
        assert fewest_showings(iterations, images, batch) >= epochs
        assert fewest_showings(iterations - 1, images, batch) < epochs


def test_part_of_an_epoch_more_costs_no_whole_one() -> None:
    for epochs, images, batch in cases():
        iterations = iterations_for(epochs + 0.5, images, batch)
        assert fewest_showings(iterations, images, batch) >= epochs
        assert (iterations - 1) * batch < (epochs + 0.5) * images


def test_twin_rounding_down_leaves_images_out() -> None:
    short = [case for case in cases() if fewest_showings(case[0] * case[1] // case[2], *case[1:]) < case[0]]
    assert len(short) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 100, 10), r"got -1; allowed: a finite number >= 0"),
        ((math.nan, 100, 10), r"got nan; allowed: a finite number"),
        ((math.inf, 100, 10), r"got inf; allowed: a finite number"),
        (("3", 100, 10), r"got '3'; allowed: a finite number"),
        ((1, 0, 10), r"no images to train on: got 0; allowed: 1 or more; change DATASETS\.TRAIN"),
        ((1, 100, 0), r"batch is empty: got 0; allowed: 1 or more; change SOLVER\.IMS_PER_BATCH"),
    ],
)
def test_no_length_from_nonsense(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iterations_for(*arguments)


# ------------------------------------------------------------------------------------------- a whole schedule


def test_every_length_in_epochs_is_written_in_iterations() -> None:
    cfg = config(MAX_EPOCHS=9.0, WARMUP_EPOCHS=0.5, STEPS_EPOCHS=[3, 6.05], CHECKPOINT_EPOCHS=1.0, EVAL_EPOCHS=0.01)
    resolve_durations(cfg, 100)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS) == (90, 5, (30, 61))
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (10, 1)


def test_a_second_call_changes_nothing() -> None:
    for cfg in (
        config(MAX_EPOCHS=9.0, WARMUP_EPOCHS=0.5, STEPS_EPOCHS=[3]),
        config(MAX_ITER=3, STEPS_EPOCHS=[3]),
    ):
        resolve_durations(cfg, 100)
        once = cfg.clone()
        resolve_durations(cfg, 100)
        assert cfg == once
        resolve_durations(cfg, 50)  # the twin: another data set does change it
        assert (cfg != once) == (cfg.SOLVER.MAX_EPOCHS > 0)


def test_without_epochs_the_iterations_stand(log: list[str]) -> None:
    cfg = config(MAX_ITER=50, WARMUP_ITERS=49, STEPS=(20, 50), CHECKPOINT_PERIOD=7, EVAL_PERIOD=0)
    before = cfg.clone()
    resolve_durations(cfg, 100)
    assert cfg == before and log == []


def test_a_stock_config_needs_none_of_our_keys(log: list[str]) -> None:
    cfg = get_cfg()
    resolve_durations(cfg, 100)
    assert cfg == get_cfg() and log == []


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"MAX_EPOCHS": -1.0}, r"got -1\.0; allowed: a finite number >= 0; change SOLVER\.MAX_EPOCHS"),
        ({"EVAL_EPOCHS": math.nan}, r"got nan; .* change TEST\.EVAL_EPOCHS"),
        ({"STEPS_EPOCHS": [1, -2]}, r"got -2; .* change SOLVER\.STEPS_EPOCHS"),
    ],
)
def test_a_length_that_is_none_is_refused(solver: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_durations(config(**solver), 100)


@pytest.mark.parametrize(
    ("solver", "warmup", "steps", "said"),
    [
        ({"WARMUP_EPOCHS": 5.0}, 49, (), "warm-up cut from 50 to 49 iterations: the run has 50"),
        ({"WARMUP_ITERS": 1000}, 49, (), "warm-up cut from 1000 to 49 iterations: the run has 50"),
        ({"WARMUP_ITERS": 0, "STEPS_EPOCHS": [3, 5.01]}, 0, (30,), "steps [51] dropped: the run has 50 iterations"),
    ],
)
def test_what_does_not_fit_into_the_run_is_cut_and_said(
    solver: dict[str, Any], warmup: int, steps: tuple[int, ...], said: str, log: list[str]
) -> None:
    cfg = config(MAX_EPOCHS=5.0, **{"STEPS": (), **solver})
    resolve_durations(cfg, 100)
    assert (warmup, steps, 50) == (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    assert log == [said]


def test_the_longest_warmup_and_the_latest_step_that_fit() -> None:
    cfg = config(MAX_EPOCHS=5.0, WARMUP_EPOCHS=4.9, STEPS_EPOCHS=[5])
    resolve_durations(cfg, 100)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == (49, (50,), 50)


def test_three_iterations_of_a_recipe_of_ninety_epochs(log: list[str]) -> None:
    recipe = config(MAX_EPOCHS=90.0, WARMUP_EPOCHS=5.0, STEPS_EPOCHS=[30, 60])
    with_override = load_config([], ["SOLVER.MAX_ITER", "3"], cfg=recipe)
    resolve_durations(with_override, 100)
    assert (with_override.SOLVER.MAX_ITER, with_override.SOLVER.WARMUP_ITERS) == (3, 2)
    assert with_override.SOLVER.STEPS == ()
    assert log[-2:] == [
        "warm-up cut from 50 to 2 iterations: the run has 3",
        "steps [300, 600] dropped: the run has 3 iterations",
    ]
    resolve_durations(recipe, 100)  # the twin: without the override nothing is cut
    assert (recipe.SOLVER.MAX_ITER, recipe.SOLVER.WARMUP_ITERS, recipe.SOLVER.STEPS) == (900, 50, (300, 600))


def test_one_iteration_has_no_warmup() -> None:
    cfg = config(MAX_ITER=1)
    resolve_durations(cfg, 100)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS) == (0, ())


def test_late_steps_in_iterations_are_dropped_also_from_a_run_in_epochs(log: list[str]) -> None:
    cfg = config(MAX_EPOCHS=5.0, WARMUP_ITERS=0, STEPS=(20, 50, 51))
    resolve_durations(cfg, 100)
    assert cfg.SOLVER.STEPS == (20, 50) and log == ["steps [51] dropped: the run has 50 iterations"]


def test_the_steps_of_another_schedule_do_not_matter(log: list[str]) -> None:
    cfg = config(MAX_EPOCHS=5.0, WARMUP_ITERS=0, LR_SCHEDULER_NAME="WarmupCosineLR")
    resolve_durations(cfg, 100)
    assert cfg.SOLVER.STEPS == (30000,) and log == []
