"""Where a run comes from: config.yaml and environment.txt in its OUTPUT_DIR."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info

import imgcls
from imgcls.checkpoint import write_whole

CONFIG, ENVIRONMENT = "config.yaml", "environment.txt"
_GIT_SECONDS = 0.5  # that each question to git may take


def describe(cfg: CfgNode, start: int = 0, notes: str = "") -> None:
    """Write config.yaml into OUTPUT_DIR and add a section to environment.txt, each whole or not at all.

    start: the iteration that the run goes on with. A config.yaml that says something else stays as
    ``config_<start>.yaml``: it is what the iterations before ``start`` were trained with. notes: further lines.
    """
    folder = Path(cfg.OUTPUT_DIR)
    _keep_old_config(folder, cfg.dump(), start)
    write_whole(folder / CONFIG, cfg.dump())
    environment = folder / ENVIRONMENT
    before = environment.read_text(encoding="utf-8", errors="replace") if environment.exists() else ""
    write_whole(environment, before + ("\n" if before else "") + section(cfg, start, notes))


def section(cfg: CfgNode, start: int, notes: str = "") -> str:
    """What environment.txt says of one start of a run."""
    lines = [
        f"=== {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}, iteration {start} of {cfg.SOLVER.MAX_ITER}",
        f"command: {command()}",
        f"folder: {Path.cwd()} (git: {revision(Path.cwd())})",
        f"imgcls: {imgcls.__version__} (git: {_own_revision()})",
        f"host: {socket.gethostname()}, {comm.get_world_size()} ranks on {cfg.MODEL.DEVICE}",
        *notes.splitlines(),
        collect_env_info(),
    ]
    return "\n".join(lines) + "\n"


def command() -> str:
    """The command line of this process, to be typed again in a shell."""
    # "imgcls train" is what python -m imgcls train calls itself.
    program = ["-m", *sys.argv[0].split()] if sys.argv[0].startswith("imgcls ") else sys.argv[:1]
    return shlex.join([sys.executable, *program, *sys.argv[1:]])


def revision(folder: Path) -> str:
    """The git commit of the repository that ``folder`` lies in, and whether tracked files differ from it."""
    found = _git(folder, "describe", "--always", "--dirty= with changes", "--abbrev=40", "--exclude=*")
    return found or "no repository, or no git"


def _own_revision() -> str:
    package = Path(imgcls.__file__).resolve().parent
    # An installed package may lie in somebody else's repository, as a virtual environment often does.
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    return revision(package) if tracked else "installed, no checkout"


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where it fails, takes long or is absent. It changes nothing and runs no hook."""
    asked = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _keep_old_config(folder: Path, text: str, start: int) -> None:
    path, aside = folder / CONFIG, folder / f"config_{start:07d}.yaml"
    if not start or not path.exists() or aside.exists():
        # What is there already: a run that changed twice at one iteration was trained with the first of them.
        return
    before = path.read_text(encoding="utf-8", errors="replace")
    if before != text:
        write_whole(aside, before)
