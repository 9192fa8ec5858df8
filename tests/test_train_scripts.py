"""The command lines that scripts/train_net.sh and train_net_builtin.sh hand to torchrun."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CONDA_PREFIX")


def start(tool: str, folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a python that answers 3 to a question and otherwise shows its arguments."""
    python = folder / "an env" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || { echo 3; exit; }\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return subprocess.run(
        [shutil.which("sh") or "sh", str(ROOT / "scripts" / f"{tool}.sh"), *arguments],
        cwd=folder,
        env=clean | {"VIRTUAL_ENV": str(folder / "an env")} | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("tool", ["train_net", "train_net_builtin"])
def test_one_machine(tool: str, tmp_path: Path) -> None:
    told = start(tool, tmp_path, "my config.yaml", "--resume", "SOLVER.BASE_LR", "0.1", NPROC="2")
    assert told.stdout.splitlines() == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "tools" / f"{tool}.py"),
        "--config-file",
        "my config.yaml",
        "--resume",
        "SOLVER.BASE_LR",
        "0.1",
    ]
    assert (ROOT / "tools" / f"{tool}.py").is_file()


def test_the_number_of_processes_is_asked_of_torch(tmp_path: Path) -> None:
    assert "--nproc_per_node=3" in start("train_net", tmp_path, "a.yaml").stdout.splitlines()


def test_several_machines(tmp_path: Path) -> None:
    told = start("train_net", tmp_path, "a.yaml", NPROC="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert told.stdout.splitlines()[2:7] == [
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--master_port=29500",
        "--nproc_per_node=8",
    ]
    assert "--standalone" not in told.stdout


@pytest.mark.parametrize("tool", ["train_net", "train_net_builtin"])
def test_no_arguments(tool: str, tmp_path: Path) -> None:
    told = start(tool, tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("usage: ") and f"{tool}.sh CONFIG" in told.stderr


def test_an_incomplete_rendezvous_is_refused(tmp_path: Path) -> None:
    told = start("train_net", tmp_path, "a.yaml", NPROC="1", NNODES="2", NODE_RANK="0")
    assert (told.returncode, told.stdout) == (2, "")
    assert "NNODES=2 needs NODE_RANK (0 .. NNODES-1) and MASTER_ADDR" in told.stderr


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    told = start("train_net", tmp_path, "a.yaml", VIRTUAL_ENV=str(tmp_path / "gone"))
    assert told.returncode == 1
    assert "run sh scripts/setup_env.sh first" in told.stderr
