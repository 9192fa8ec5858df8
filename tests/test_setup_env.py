"""What scripts/setup_env.sh decides, with a recorder in the place of pip and everything else real.

The environment that runs the tests is the one examined; scripts/test.sh has completed it by then.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"

RECORDER = """#!/bin/sh
# A python whose pip writes down what it is told, keeps the files it is given, and does nothing.
if [ "$1 $2" = "-m pip" ]; then
    printf '%s\\n' "$*" >>"{log}/calls"
    option=
    for argument; do
        case $option in
        -c) cp "$argument" "{log}/constraints" ;;
        -r) cp "$argument" "{log}/requirements" ;;
        esac
        option=$argument
    done
    exit {status}
fi
exec "{python}" "$@"
"""


def write_recorder(python: Path, log: Path, status: int = 0) -> None:
    python.parent.mkdir(parents=True, exist_ok=True)
    log.mkdir(exist_ok=True)
    python.write_text(RECORDER.format(log=log, status=status, python=sys.executable), encoding="utf-8")
    python.chmod(0o755)


def clean_environ(**extra: str) -> dict[str, str]:
    ours = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "IMGCLS_CONSTRAINTS")
    return {key: value for key, value in os.environ.items() if key not in ours} | extra


def setup_env(root: Path, **environ: str) -> tuple[int, str]:
    command = [shutil.which("sh") or "sh", str(root / "scripts" / "setup_env.sh")]
    result = subprocess.run(command, cwd="/", env=clean_environ(**environ), capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


def copy_checkout(folder: Path, **replaced: str) -> Path:
    """The files that the script reads, in a folder whose name has a space; setup.py with ranges replaced."""
    root = folder / "a checkout"
    for part in ("scripts", "requirements"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name, requirement in replaced.items():
        text, count = re.subn(rf'"{name}[<>=~][^"]*"', f'"{requirement}"', text)
        assert count == 1, name
    (root / "setup.py").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def planner() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("env_plan", ROOT / "scripts" / "env_plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as its main() does: a noisy import is no failed import
        yield module


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script: Path, shell: str) -> None:
    result = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_wheel_is_named_with_its_hash() -> None:
    lines = (ROOT / "requirements" / "detectron2.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        f"sal-detectron2==0.7.2 --hash=sha256:{WHEEL_SHA256}"
    ]


def test_every_requirement_has_a_pin_that_its_range_allows(planner: ModuleType) -> None:
    pins = planner.read_pins(ROOT / "requirements" / "constraints.txt")
    ranges, _ = planner.read_ranges(ROOT / "setup.py")
    for requirement in ranges:
        (pin,) = pins[planner.name_of(requirement)].specifier
        assert pin.operator == "=="
        assert not planner.is_outside(requirement, pin.version), requirement


def test_nothing_is_installed_where_nothing_is_missing(tmp_path: Path, planner: ModuleType) -> None:
    if not planner.installed_from(ROOT):
        pytest.fail("imgcls is not installed from this checkout as it is now: run sh scripts/setup_env.sh first")
    write_recorder(tmp_path / "env" / "bin" / "python", tmp_path / "log")
    status, output = setup_env(ROOT, VIRTUAL_ENV=str(tmp_path / "env"))
    assert status == 0, output
    assert not (tmp_path / "log" / "calls").exists(), (tmp_path / "log" / "calls").read_text()
    assert "setup_env: detectron2 in use: " in output
    assert output.splitlines()[-1].startswith("setup_env: ready: ")


def test_a_missing_package_is_added_and_nothing_else_may_move(tmp_path: Path) -> None:
    root = copy_checkout(tmp_path, yacs="surely-not-there>=1")
    write_recorder(tmp_path / "env" / "bin" / "python", tmp_path / "log", status=1)
    status, output = setup_env(root, VIRTUAL_ENV=str(tmp_path / "env"))
    calls = (tmp_path / "log" / "calls").read_text().splitlines()
    assert status == 1
    assert "pip failed; its reason stands above" in output
    assert len(calls) == 2  # with the pins of the dev tools, then with whatever fits
    assert not [call for call in calls if re.search(r"torch|numpy|detectron2|--upgrade|-U", call)]
    assert (tmp_path / "log" / "requirements").read_text() == "surely-not-there\n"
    held = (tmp_path / "log" / "constraints").read_text().splitlines()
    # In a process of its own: setuptools, once imported, puts its vendored packages on the path of this one.
    code = "import json, runpy; print(json.dumps(runpy.run_path('scripts/env_plan.py')['read_installed']()))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert held == sorted(f"{name}=={version}" for name, version in json.loads(fresh.stdout).items())
    assert {"torch", "torchvision", "numpy"} <= {line.split("==")[0] for line in held}


def test_a_version_outside_the_range_is_printed_and_kept(tmp_path: Path, planner: ModuleType) -> None:
    root = copy_checkout(tmp_path, numpy="numpy>=99", tqdm="tqdm<1")
    plan = planner.Plan(root, ROOT / "requirements" / "constraints.txt", own=False)
    said = "\n".join(plan.report)
    assert re.search(r"^numpy \S+ is outside the range that was tried, >=99; it stays as it is$", said, re.M)
    assert re.search(r"^tqdm \S+ is outside the range that was tried, <1; it stays as it is$", said, re.M)
    assert (plan.torch, plan.rest, plan.detectron2, plan.stop) == ([], [], [], [])


def test_our_own_venv_follows_the_pins_but_keeps_what_imports(tmp_path: Path, planner: ModuleType) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy==0.1\ntqdm==0.1\nyacs==0.1; python_version < '3'\n", encoding="utf-8")
    plan = planner.Plan(ROOT, pins, own=True)
    assert "tqdm==0.1" in plan.rest
    assert not [line for line in plan.torch + plan.rest if line.startswith(("numpy", "yacs"))]
    installed = planner.read_installed()
    assert plan.constraints()["numpy"] == f"numpy=={installed['numpy']}"
    assert plan.constraints()["tqdm"] == "tqdm==0.1"
    assert "yacs" not in plan.constraints()


def test_detectron2_is_installed_only_where_it_is_missing(
    planner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pins = ROOT / "requirements" / "constraints.txt"
    assert planner.Plan(ROOT, pins, own=False).detectron2 == []
    monkeypatch.setitem(sys.modules, "detectron2", None)  # Python's way of saying: not importable
    plan = planner.Plan(ROOT, pins, own=False)
    assert len(plan.detectron2) == 1 and plan.stop == []
    assert plan.rest == []


def test_a_users_detectron2_that_does_not_import_is_not_replaced(
    planner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "detectron2" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('undefined symbol')\n", encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    plan = planner.Plan(ROOT, ROOT / "requirements" / "constraints.txt", own=False)
    assert plan.detectron2 == []
    (stop,) = plan.stop
    assert str(broken.parent) in stop and "undefined symbol" in stop


@pytest.mark.parametrize(("version", "refused"), [("2.13.0+cpu", True), ("2.13.0", False)])
def test_a_torch_from_another_index_needs_its_torchvision_from_there(
    version: str, refused: bool, planner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "ModuleNotFoundError: No module named 'torchvision'"
    monkeypatch.setattr(planner, "import_error", lambda module: missing if module == "torchvision" else "")
    monkeypatch.setattr(planner, "read_installed", lambda: {"torch": version, "numpy": "2.0.0"})
    plan = planner.Plan(ROOT, ROOT / "requirements" / "constraints.txt", own=False)
    assert [line.split("  # ")[0] for line in plan.torch] == ["torchvision>=0.21"]
    assert plan.constraints()["torch"] == f"torch=={version}"
    assert ["/whl/cpu" in line for line in plan.stop] == ([True] if refused else [])


def test_the_wheel_is_placed_without_its_library_and_its_stray_package(tmp_path: Path, planner: ModuleType) -> None:
    stage, site = tmp_path / "stage", tmp_path / "site"
    info = "sal_detectron2-0.7.2.dist-info"
    files = ["detectron2/__init__.py", "detectron2/_C.cpython-310-x86_64-linux-gnu.so", "tools/train_net.py"]
    for name in [*files, f"{info}/RECORD"]:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text("new", encoding="utf-8")
    (stage / info / "RECORD").write_text("".join(f"{name},,\n" for name in files), encoding="utf-8")
    (site / "tools").mkdir(parents=True)
    (site / "tools" / "mine.py").write_text("mine", encoding="utf-8")
    planner.place(stage, site)
    left = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    assert left == ["detectron2/__init__.py", f"{info}/RECORD", "tools/mine.py"]
    assert (site / info / "RECORD").read_text(encoding="utf-8") == "detectron2/__init__.py,,\n"


def test_a_half_made_venv_is_made_again(tmp_path: Path) -> None:
    root = copy_checkout(tmp_path)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(tmp_path / "gone")
    base = tmp_path / "base"
    no_venv = 'if [ "$1 $2" = "-m venv" ]; then echo "made: $*"; exit 1; fi'
    base.write_text(f'#!/bin/sh\n{no_venv}\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    base.chmod(0o755)
    status, output = setup_env(root, PYTHON=str(base))
    assert status == 1
    assert f"made: -m venv --clear {root}/.venv" in output
    assert f"could not make {root}/.venv" in output


def test_an_unsuitable_python_is_named(tmp_path: Path) -> None:
    root = copy_checkout(tmp_path)
    status, output = setup_env(root, PYTHON="/nowhere/python3")
    assert status == 1
    assert "PYTHON=/nowhere/python3 does not run, is not Python 3.10 to 3.13" in output
    status, output = setup_env(root, PATH=str(tmp_path / "bin"))  # no python on it, and no dirname
    assert status != 0
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname") or "dirname")
    old = tmp_path / "bin" / "python3"  # one that answers every question with no, as Python 3.9 would
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    status, output = setup_env(root, PATH=str(tmp_path / "bin"))
    assert status == 1
    assert "no Python 3.10 to 3.13 with the venv module is on PATH" in output
    assert not (root / ".venv").exists()


def test_a_dead_active_environment_is_named(tmp_path: Path) -> None:
    status, output = setup_env(ROOT, VIRTUAL_ENV=str(tmp_path / "gone"))
    assert status == 1
    assert f"the active environment {tmp_path / 'gone'} has no working bin/python" in output
