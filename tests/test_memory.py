"""Memory that is used up: one line with advice, and the largest batch that fits."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from imgcls.commands.arguments import one_line_errors
from imgcls.engine import Data, finalize
from imgcls.engine.machine import memory
from imgcls.engine.machine.memory import MIB, available_memory, is_out_of_memory, out_of_memory
from imgcls.engine.measuring import batch_size
from imgcls.engine.measuring.batch_size import Trial, advice_of, largest, trials
from imgcls.engine.setup import _not_a_user_error

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux limits and accounts for memory")


def all_there_is() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def cuda_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def python_error() -> None:
    raise MemoryError


def failing(error: Callable[[], None]) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as info:
        error()
    return info.value


@pytest.mark.parametrize("error", [all_there_is, cuda_error, python_error], ids=lambda error: error.__name__)
def test_the_end_of_the_memory_is_one_line_with_advice(
    error: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        one_line_errors(error)()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: out of memory: ")
    for advice in ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "MODEL.BACKBONE.CHECKPOINT", "--find-batch-size"):
        assert advice in said


def test_the_advice_begins_with_what_was_asked_for() -> None:
    assert "you tried to allocate 1125899906842624 bytes. Lower" in str(out_of_memory(failing(all_there_is)))
    assert str(out_of_memory(failing(cuda_error))).startswith("out of memory: CUDA out of memory. Lower")


@LINUX
def test_the_peak_is_this_processes() -> None:
    if not torch.cuda.is_available():
        assert memory.peak_memory() == pytest.approx(memory.peak_resident() / MIB, rel=0.1)


def test_detectron2s_loop_prints_no_traceback_of_it() -> None:
    def record(error: Exception) -> logging.LogRecord:
        return logging.LogRecord("", logging.ERROR, "", 0, "Exception during training:", (), (type(error), error, None))

    assert not _not_a_user_error(record(failing(all_there_is)))
    assert _not_a_user_error(record(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_another_error_stays_what_it_is() -> None:
    def bug() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    assert not is_out_of_memory(failing(bug))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        one_line_errors(bug)()


@LINUX
def test_control_groups_and_limits_bound_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    for folder, most, now in ((group, "max", "5"), (group.parent, str(700 * MIB), str(300 * MIB))):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(now + "\n")
    (group.parent / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MIB}\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert memory._left_in_groups(tmp_path, own) == [500 * MIB]
    free = available_memory()
    assert free > 0
    monkeypatch.setattr(memory, "_left_in_groups", lambda: [123])
    assert available_memory() == 123


@LINUX
def test_of_version_1_the_memory_controller_counts(tmp_path: Path) -> None:
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("1000")
    (tmp_path / "memory" / "job" / "memory.usage_in_bytes").write_text("400")
    own = tmp_path / "cgroup"
    own.write_text("3:cpu:/job\n2:memory:/job\n")
    assert memory._left_in_groups(tmp_path, own) == [600]


@LINUX
def test_more_memory_fits_a_larger_batch(classifier_cfg: Callable[..., CfgNode]) -> None:
    """Of 32 x 32 pictures the uint8 pixels alone are 3 KiB; the maps of this network about 300 KiB."""
    cfg, data = finalize(classifier_cfg())
    few, many = ([*trials(cfg, data, memory=size * MIB)] for size in (80, 240))
    assert [trial.batch for trial in few] == [2**power for power in range(1, len(few) + 1)]
    for tried in (few, many):
        assert all(not trial.said for trial in tried[:-1]) and tried[-1].said
    assert 2 <= largest(few) < largest(many) <= 4096
    # Which of them it is depends on whether torch, oneDNN or the C library is refused first.
    for tried in (few, many):
        assert any(words in tried[-1].said for words in ("can't allocate", "could not create", "the process ended"))


@LINUX
def test_it_ends_where_the_set_does_and_other_errors_are_told(classifier_cfg: Callable[..., CfgNode]) -> None:
    cfg, data = finalize(classifier_cfg())
    assert [(trial.batch, trial.said) for trial in trials(cfg, data, most=7)] == [(2, ""), (4, "")]
    with pytest.raises(ValueError, match=r"not even 2 images fit: .*MODEL.BACKBONE.VARIANT"):
        largest([*trials(cfg, data, memory=MIB)])
    cfg.MODEL.LOSS.NAME = "NoSuchLoss"
    with pytest.raises(KeyError, match="NoSuchLoss"):
        next(trials(cfg, data))


def test_micro_batches_of_one_are_not_tried(
    classifier_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, data = finalize(classifier_cfg())
    cfg.SOLVER.ACCUMULATE = 3
    shares = []

    def pretend(processes: object, cfg: CfgNode, data: Data, batch: int, share: int) -> Trial:
        shares.append(share)
        return Trial(batch, said="" if batch < 32 else "full")

    monkeypatch.setattr(batch_size, "_try", pretend)
    monkeypatch.setattr(batch_size, "available_memory", lambda: 1000)
    tried = [*trials(cfg, data, ranks=3)]
    assert [trial.batch for trial in tried] == [8, 16, 32] and set(shares) == {300}
    assert advice_of(tried, 3) == "largest power of two that fits: SOLVER.IMS_PER_BATCH 48 (16 on each of 3 ranks)"
    assert "no more" in advice_of(tried[:-1], 1)


@LINUX
def test_a_trial_that_does_not_end_is_ended(
    classifier_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "PATIENCE", 0)
    cfg, data = finalize(classifier_cfg())
    (trial,) = trials(cfg, data, memory=100 * MIB)
    assert trial.said == "2 steps take longer than 0 seconds"


def test_a_process_that_was_killed_is_no_fit() -> None:
    assert batch_size._how_it_ended(-9) == "the process ended with SIGKILL"
    assert batch_size._how_it_ended(1).endswith("exit code 1")
