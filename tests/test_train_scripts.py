"""The command lines that scripts/train_net.sh, train_net_builtin.sh and slurm.sh hand to torchrun."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CONDA_PREFIX")


def start(tool: str, folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout."""
    return run_with_fake_python(folder, ROOT / "scripts" / f"{tool}.sh", arguments, environ)


def run_with_fake_python(
    folder: Path, script: Path, arguments: Sequence[str], environ: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """With a python that answers 3 to a question and otherwise shows its arguments."""
    python = folder / "an env" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || { echo 3; exit; }\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return subprocess.run(
        [shutil.which("sh") or "sh", str(script), *arguments],
        cwd=folder,
        env=clean | {"VIRTUAL_ENV": str(folder / "an env")} | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("tool", ["train_net", "train_net_builtin"])
def test_on_one_machine_torchrun_stands_alone(tool: str, tmp_path: Path) -> None:
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
def test_without_arguments_the_usage_is_shown(tool: str, tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------------------------------- Slurm

JOB = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}


def submit(folder: Path, *arguments: str, srun: str = ":", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run slurm.sh as its batch job with stand-ins for scontrol and srun.

    srun starts the two tasks one after the other, each with its number, and ends with the lines ``srun``.
    """
    commands = folder / "cluster"
    commands.mkdir(exist_ok=True)
    tasks = 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; echo "srun $1"; (shift; "$@"); done'
    scontrol = 'echo "scontrol $*" >>calls\n[ "$1" != show ] || printf "gpu07\\ngpu08\\n"'
    for name, body in {"srun": f"{tasks}\n{srun}", "scontrol": scontrol}.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    (folder / "scripts").mkdir(exist_ok=True)
    for name in ("train_net.sh", "train_net_builtin.sh", "torchrun.sh", "env.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    # As Slurm does: a copy of the file, somewhere else, in the folder that sbatch was called in.
    copied = shutil.copy(ROOT / "scripts" / "slurm.sh", folder / "cluster" / "job_script")
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "SLURM_SUBMIT_DIR": str(folder), **JOB, **environ}
    return run_with_fake_python(folder, copied, arguments, settings)


def test_a_slurm_job_runs_torchrun_on_every_machine(tmp_path: Path) -> None:
    told = submit(tmp_path, "base.yaml", "my model.yaml", "SOLVER.BASE_LR", "0.1")
    assert told.returncode == 0, told.stderr
    command = ["-m", "torch.distributed.run", "--nnodes=2", "--node_rank=%d", "--master_addr=gpu07"]
    command += ["--master_port=21234", "--nproc_per_node=3", f"{tmp_path}/tools/train_net.py", "--config-file"]
    command += ["base.yaml", "my model.yaml", "SOLVER.BASE_LR", "0.1"]
    nodes = [[word.replace("%d", str(rank)) for word in command] for rank in (0, 1)]
    assert told.stdout.splitlines() == [word for node in nodes for word in ("srun --kill-on-bad-exit=1", *node)]
    assert (tmp_path / "calls").read_text() == "scontrol show hostnames gpu[07-08]\n"


def test_a_slurm_job_that_starts_again_resumes(tmp_path: Path) -> None:
    told = submit(tmp_path, "a.yaml", SLURM_RESTART_COUNT="1", IMGCLS_SCRIPT="train_net_builtin.sh", MASTER_PORT="7")
    assert told.stdout.splitlines()[-4:] == [
        f"{tmp_path}/tools/train_net_builtin.py",
        "--config-file",
        "a.yaml",
        "--resume",
    ]
    assert "--master_port=7" in told.stdout.splitlines()


WAIT = 'trap "exit 143" TERM; kill -%s $PPID; while :; do sleep 0.05; done'


@pytest.mark.parametrize(
    ("end", "code", "requeued"), [(WAIT % "USR1", 143, True), (WAIT % "TERM", 143, False), ("exit 7", 7, False)]
)
def test_the_end_of_a_slurm_job(end: str, code: int, requeued: bool, tmp_path: Path) -> None:
    """Out of time: the run is told, and the job queued again. Cancelled: told. Failed: its code."""
    told = submit(tmp_path, "a.yaml", srun=end)
    assert told.returncode == code
    assert ("scontrol requeue 41234\n" in (tmp_path / "calls").read_text()) == requeued


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ((), {}, "usage: sbatch scripts/slurm.sh CONFIG"),
        (("a.yaml",), {"SLURM_JOB_ID": ""}, "submit it: sbatch scripts/slurm.sh a.yaml"),
        (("a.yaml",), {"IMGCLS_ROOT": "/nowhere"}, "there is no /nowhere/scripts/train_net.sh"),
    ],
)
def test_a_slurm_job_that_cannot_run(
    arguments: tuple[str, ...], environ: dict[str, str], message: str, tmp_path: Path
) -> None:
    told = submit(tmp_path, *arguments, **environ)
    assert (told.returncode, told.stdout) == (2, "") and message in told.stderr
