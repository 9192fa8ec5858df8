"""Early stopping: when it stops, that both loops stop alike and exactly there, and that a kill changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_cfg
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from test_loops import run_in_process, same

from imgcls.checkpoint import newest_whole
from imgcls.config.checks import require_sound
from imgcls.engine import ClsTrainer, Run
from imgcls.engine.early_stop import EarlyStop

NAN = float("nan")


def stopped_at(values: list[float], **options: Any) -> int:
    """The number of values after which it is over; -1: it never is."""
    stop = EarlyStop("top1", **{"smaller": False, "patience": 2, **options})
    for number, value in enumerate(values, start=1):
        stop.evaluated(value, number)
        # Whatever the moment, a copy from the checkpoint goes on alike.
        stop, before = EarlyStop("top1", **{"smaller": False, "patience": 2, **options}), stop
        stop.load_state_dict(json.loads(json.dumps(before.state_dict())))
        if stop.over:
            return number
    return -1


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([10, 20, 30, 40], {}, -1),
        ([10, 20, 20, 20], {}, 4),  # as good is not better
        ([10, 20, 19, 21, 20, 20.5], {}, 6),  # a better one begins anew
        ([10, 20, 19, 18], {"patience": 3}, -1),
        ([10, 20, 19, 18], {"patience": 0}, -1),
        ([10, 10.5, 11, 11.5], {"min_delta": 1.0}, 3),  # 11 beats 10 by no more than 1
        ([10, 10.5, 11.1, 11.5], {"min_delta": 1.0}, -1),  # 11.1 does
        ([3.0, 2.0, 2.5, 2.1], {"smaller": True}, 4),
        ([3.0, 2.0, 2.5, 1.9], {"smaller": True}, -1),
        ([NAN, NAN], {}, 2),
        ([NAN, 5, NAN, 6], {}, -1),
    ],
)
def test_it_stops_after_so_many_evaluations_without_a_gain(
    values: list[float], options: dict[str, Any], expected: int
) -> None:
    assert stopped_at(values, **options) == expected


def test_another_metric_begins_anew() -> None:
    stop, other = (EarlyStop(metric, smaller=False, patience=1) for metric in ("top1", "top5"))
    for value in (10.0, 9.0):
        stop.evaluated(value, 0)
    other.load_state_dict(stop.state_dict())
    assert stop.over and not other.over and other.best is None


def test_it_needs_evaluations(classifier_cfg: Callable[..., CfgNode]) -> None:
    words = ("SOLVER.EARLY_STOP.PATIENCE", 2)
    for none in (("TEST.EVAL_PERIOD", 0), ("TEST.EVAL_PERIOD", 1, "DATASETS.TEST", ())):
        with pytest.raises(ValueError, match=r"no evaluations to look at: got 2; .*SOLVER.EARLY_STOP.PATIENCE"):
            require_sound(classifier_cfg("mobilenet_v1_0.25", *words, *none))
    for some in (("TEST.EVAL_PERIOD", 1), ("TEST.EVAL_EPOCHS", 1.0)):
        require_sound(classifier_cfg("mobilenet_v1_0.25", *words, *some))


# -- runs: top-1 is made up, a value for each evaluation of a run that would take 12 iterations --------------------

FIGURES = {1: 50.0, 3: 60.0, 5: 55.0, 7: 60.0, 9: 70.0, 11: 80.0}  # not better than 60 twice in a row at 7
WORDS = (
    *("SOLVER.MAX_ITER", 12, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 99),
    *("SOLVER.EARLY_STOP.PATIENCE", 2, "TEST.IMS_PER_BATCH", 500),
)


def made_up(run: Run, evaluator: Any = None) -> dict[str, Any]:
    """Evaluates without looking at a picture."""
    run.results = {"classification": {"top1": FIGURES.get(run.step.schedule.last_epoch - 1, -1.0), "loss": 1.0}}
    return run.results


@pytest.fixture(scope="module", autouse=True)
def _made_up_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "evaluate", made_up)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_in_process("plain", tiny_cfg(folder, *WORDS))
    return folder


def final(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "model_final.pth", weights_only=True)
    return content


def written(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]


def test_a_run_ends_where_it_stopped_and_saves_there(straight: Path) -> None:
    content = final(straight)
    assert content["iteration"] == 7 and newest_whole(straight) == straight / "model_final.pth"
    assert content["early_stop"] == {"metric": "top1", "best": 60.0, "iteration": 3, "waited": 2}
    assert content["metrics"]["top1"] == 60.0 and content["best"]["iteration"] == 3
    assert written(straight) == list(range(8)) and not list(straight.glob("model_0000007.pth"))


def test_without_patience_it_goes_on(tmp_path: Path) -> None:
    words = (*WORDS, "SOLVER.EARLY_STOP.PATIENCE", 3, "SOLVER.CHECKPOINT_PERIOD", 99)
    run_in_process("plain", tiny_cfg(tmp_path, *words))
    assert final(tmp_path)["iteration"] == 11


@pytest.mark.parametrize(("loop", "done"), [("builtin", 0), ("plain", 5), ("builtin", 7)])
def test_a_kill_before_the_end_changes_nothing(
    loop: str, done: int, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """done: iterations of the checkpoint that is gone on from."""
    folder = tmp_path / "resumed"
    shutil.copytree(straight, folder)
    for path in folder.glob("model_*"):
        if not path.name.startswith(f"model_{done - 1:07d}"):
            path.unlink()
    run, results = run_in_process(loop, tiny_cfg(folder, *WORDS, "SOLVER.CHECKPOINT_PERIOD", 99), resume=True)
    assert run.start_iter == done and results["classification"]["top1"] == 60.0
    ours, theirs = final(folder), final(straight)
    assert ours["early_stop"] == theirs["early_stop"] and ours["iteration"] == 7
    assert same(ours["model"], theirs["model"]) and written(folder) == list(range(8))
    said = capsys.readouterr().out
    assert (
        "did not beat top1 60.0000 of iteration 3; the run ends after iteration 7" in said and "Exception" not in said
    )


@pytest.mark.parametrize("loop", ["plain", "builtin"])
def test_nothing_is_left_of_a_run_that_stopped_unless_patience_grows(
    loop: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(straight, folder)
    run_in_process(loop, tiny_cfg(folder, *WORDS), resume=True)
    left = (
        "nothing is left to train: early stopping: 2 evaluations in a row did not beat top1 60.0000 of iteration 3; a"
    )
    assert left in capsys.readouterr().out
    assert final(folder)["iteration"] == 7
    run, _ = run_in_process(loop, tiny_cfg(folder, *WORDS, "SOLVER.EARLY_STOP.PATIENCE", 3), resume=True)
    assert run.start_iter == 8 and final(folder)["iteration"] == 11


def test_hooks_of_ones_own_see_the_end(tmp_path: Path) -> None:
    """What detectron2's look at: the last iteration and the end of the run."""
    seen: list[tuple[int, int]] = []

    class Note(HookBase):
        def after_step(self) -> None:
            seen.append((self.trainer.iter, self.trainer.max_iter))

        def after_train(self) -> None:
            seen.append((self.trainer.iter, self.trainer.max_iter))

    trainer = ClsTrainer(tiny_cfg(tmp_path, *WORDS, "SOLVER.CHECKPOINT_PERIOD", 99))
    trainer.register_hooks([Note()])
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert seen == [*((i, 12) for i in range(7)), (7, 8), (8, 8)]
