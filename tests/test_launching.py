"""The launcher, with real ranks and real signals: how each case ends, how soon, with which words, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_cases import children_left

from imgcls.checkpoint import read_checkpoint
from imgcls.commands.arguments import parse, training_parser
from imgcls.engine.ranks import launching
from imgcls.engine.ranks.distributed import fault_of_another
from imgcls.engine.ranks.launching import RUNNING, launch_ranks

ROOT = Path(__file__).resolve().parents[1]
TOGETHER_WITH_IT = "; the other ranks were ended with it; --resume goes on from the last checkpoint"

# case -> exit code, its line on stderr
CASES: dict[str, tuple[int, str]] = {
    "fine": (0, ""),
    "all exit 2": (2, ""),  # a mistake that every rank has found and said
    "killed": (137, "rank 1 was ended by SIGKILL at iteration 3, as the system does when memory runs out"),
    "exit 7": (7, "rank 1 ended with exit code 7 at iteration 3"),
    "exit 0": (1, "rank 1 ended at iteration 3 before its work was done"),
    "raise": (1, "rank 1 ended with exit code 1 at iteration 3"),
    "stopped": (124, "rank 1 did not answer for 1.5 s (--dist-timeout); all ranks were ended."),
    "loop": (124, "rank 1 did not answer for 1.5 s (--dist-timeout); all ranks were ended."),
    "SIGTERM to launcher": (143, ""),
    "SIGINT to launcher": (130, ""),
    "SIGUSR1 to launcher": (143, ""),
    "SIGTERM twice": (143, "a second signal came: the ranks were killed before they had saved"),
    "SIGTERM ignored": (143, "rank 1 did not end after SIGTERM: killed"),
}
TRAINING = (
    "SOLVER.MAX_ITER 6 SOLVER.IMS_PER_BATCH 8 SOLVER.CHECKPOINT_PERIOD 100 SOLVER.LOG_PERIOD 1 SOLVER.WRITERS () "
    "INPUT.TRAIN_SIZE 32 INPUT.TEST_SIZE 32 DATASETS.TEST () MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 1 "
    "--config-file configs/quick/digits_mobilenet_v1.yaml"
)


def started(*cases: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    words = [sys.executable, str(ROOT / "tests" / "launch_cases.py"), *cases]
    # Files, not pipes: a rank that outlives its launcher would keep a pipe open.
    return subprocess.Popen(words, cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def outcomes(*cases: str) -> dict[str, dict[str, Any]]:
    """By case: code, seconds, left, how; and what was said, without what torch's C++ says."""
    _, told = started(*cases, environment={"LAUNCH_CASES": f"{os.getpid()}-{time.monotonic_ns()}"}).communicate(
        timeout=200
    )
    found: dict[str, dict[str, Any]] = {}
    said: list[str] = []
    for line in told.splitlines():
        if line.startswith('{"case"'):
            outcome = json.loads(line)
            found[outcome["case"]] = {**outcome, "said": said}
            said = []
        else:
            said.append(line)
    assert len(found) == len(cases), told
    return found


@pytest.fixture(scope="module")
def ended() -> dict[str, dict[str, Any]]:
    return outcomes(*CASES)


@pytest.mark.parametrize("case", CASES)
def test_each_end_has_its_code_and_its_line_and_leaves_no_process(case: str, ended: dict[str, dict[str, Any]]) -> None:
    code, words = CASES[case]
    outcome = ended[case]
    assert outcome["how"] == "fork" or torch.cuda.is_available()
    assert outcome["code"] == code, outcome
    assert outcome["left"] == [] and outcome["seconds"] < 10
    errors = [line for line in outcome["said"] if line.startswith("error: ")]
    assert errors == ([] if not words else errors[:1]) and (not words or errors[0].startswith(f"error: {words}"))
    if code in (137, 7, 1):
        assert errors[0].endswith(TOGETHER_WITH_IT)
    tracebacks = [line for line in outcome["said"] if line.startswith("Traceback")]
    assert len(tracebacks) == (case == "raise")  # the fault's own, and none of those who suffer it
    waited = [line for line in outcome["said"] if "no answer from another rank within --dist-timeout" in line]
    assert len(waited) == (code == 124) and all(line.startswith("error (rank 0): ") for line in waited)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Two ranks: one run straight through, one stopped and resumed, and again without its ranks' own statistics."""
    root = tmp_path_factory.mktemp("trained")
    asked, builtin = "SIGTERM_to_launcher", "SIGINT_to_launcher"
    first = outcomes(
        f"training {root}/straight -1 fine {TRAINING}",
        f"training {root}/stopped 2 {asked} {TRAINING}",
        f"training {root}/builtin 2 {builtin} {TRAINING}",
        f"training {root}/hung 2 stopped --dist-timeout 3 {TRAINING}",
    )
    shutil.copytree(root / "stopped", root / "averaged", ignore=shutil.ignore_patterns(".lock"))
    second = outcomes(
        f"training {root}/stopped -1 fine --resume {TRAINING}",
        f"training {root}/averaged -1 fine --resume {TRAINING}",
    )
    return root, {case.split("/")[-1]: outcome for case, outcome in [*first.items(), *second.items()]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(folder / "model_final.pth")["model"])


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_training_is_stopped_and_goes_on_as_if_it_had_not_been(
    trained: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    root, outcome = trained
    stopped = outcome["stopped 2 SIGTERM_to_launcher"]
    assert stopped["code"] == 143 and stopped["left"] == [] and stopped["seconds"] < 30
    saved = [path.name for path in (root / "stopped").glob("model_0*.pth")]
    assert saved in (["model_0000002.pth"], ["model_0000003.pth"], ["model_0000004.pth"])
    assert outcome["stopped -1 fine --resume"]["code"] == 0
    assert same(weights(root / "stopped"), weights(root / "straight"))
    builtin = outcome["builtin 2 SIGINT_to_launcher"]
    assert builtin["code"] == 130 and builtin["left"] == []
    assert list((root / "builtin").glob("model_0*.pth"))


def test_the_average_of_the_ranks_statistics_would_not_do(trained: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = trained
    assert not same(weights(root / "averaged"), weights(root / "straight"))


def test_a_training_with_a_silent_rank_ends(trained: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    outcome = trained[1]["hung 2 stopped --dist-timeout 3"]
    assert outcome["code"] == 124 and outcome["left"] == [] and outcome["seconds"] < 30
    assert any(line.startswith("error: rank 1 did not answer for 3 s") for line in outcome["said"])
    assert not any(line.startswith("Traceback") for line in outcome["said"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_no_rank_outlives_its_launcher(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, which nobody can hand on; ranks that talk for ever, so they would live for ever."""
    mark = f"{os.getpid()}-{method}"
    process = started("for ever", environment={"LAUNCH_CASES": mark, "LAUNCH_METHOD": method})
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("rank 1 talks"):
            break
    monkeypatch.setenv("LAUNCH_CASES", mark)
    assert len(children_left()) >= 3
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while children_left() and time.monotonic() < end:
        time.sleep(0.05)
    process.stderr.close()
    assert children_left() == []


# ------------------------------------------------------------------------------------------------------- small things


def test_fork_only_where_nothing_can_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launching.os, "listdir", lambda folder: ["1"])
    assert launching.start_method() == "fork"
    monkeypatch.setattr(launching.os, "listdir", lambda folder: ["1", "2"])
    assert launching.start_method() == "spawn"
    monkeypatch.setattr(launching.os, "listdir", lambda folder: ["1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launching.start_method() == "spawn"


def test_several_machines_need_an_address() -> None:
    with pytest.raises(ValueError, match="--dist-url auto is for one machine; give the address of the first"):
        launch_ranks(lambda: None, lambda rank, world, url: None, ranks=1, machines=2)


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (RuntimeError("[/gloo/pair.cc:545] Read error [127.0.0.1]:27: Connection reset by peer"), "LOST_ANOTHER"),
        (RuntimeError("[/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:2."), "LOST_ANOTHER"),
        (RuntimeError("[/gloo/unbound_buffer.cc:78] Timed out waiting 4000ms for recv"), "WAITED_IN_VAIN"),
        (torch.distributed.DistStoreError("Timed out after 5 seconds waiting for clients."), "WAITED_IN_VAIN"),
        (RuntimeError("the download timed out"), "RUNNING"),
        (ValueError("gloo: connection closed by peer"), "RUNNING"),
    ],
    ids=["reset", "closed", "silent", "never came", "another's", "a user's"],
)
def test_whose_fault_an_error_is(error: Exception, how: str) -> None:
    assert fault_of_another(error) == getattr(launching, how) and RUNNING == 0


@pytest.mark.parametrize("word", ["0", "-3", "soon", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(training_parser(""), ["--dist-timeout", "2.5"]).dist_timeout == 2.5
    with pytest.raises(SystemExit):
        parse(training_parser(""), [f"--dist-timeout={word}"])
    assert f"{word!r} is no number of seconds above 0" in capsys.readouterr().err
