"""Who may import whom: imports go down only, and packages of one level do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [
    {"structures"},
    {"config"},
    {"layers", "solver"},
    {"modeling", "data", "evaluation", "checkpoint"},
    {"engine"},
    {"methods", "export", "transfer"},
    {"commands"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
NAMELESS = {"utils", "misc", "common", "helpers"}


def imported_packages(source: str) -> list[str]:
    """The packages of imgcls that ``source`` imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "imgcls":
                modules = [f"imgcls.{alias.name}" for alias in node.names]
        else:
            continue
        found += [module.split(".")[1] for module in modules if module.startswith("imgcls.")]
    return [name for name in found if name in LEVEL_OF]


def complaints(package: str, source: str) -> list[str]:
    """Imports of ``source``, a file of ``package``, that go up or sideways; layers may import structures only."""
    out = []
    for other in imported_packages(source):
        if other == package:
            continue
        if LEVEL_OF[other] >= LEVEL_OF[package] or (package == "layers" and other != "structures"):
            out.append(f"{package} imports {other}")
    return out


def test_every_package_has_a_level():
    packages = {path.parent.name for path in (ROOT / "imgcls").glob("*/__init__.py")}
    assert packages and packages <= set(LEVEL_OF)


def test_imports_go_down_only():
    found = []
    for path in (ROOT / "imgcls").glob("*/**/*.py"):
        package = path.relative_to(ROOT / "imgcls").parts[0]
        found += [f"{path.name}: {text}" for text in complaints(package, path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("data", "from imgcls.modeling import ClsNet"),
        ("data", "import imgcls.engine.step"),
        ("checkpoint", "def f():\n    from imgcls.transfer import verify"),
        ("layers", "from imgcls.config import load_config"),
        ("layers", "from imgcls import solver"),
        ("structures", "from imgcls import config"),
    ],
)
def test_a_forbidden_import_is_seen(package, source):
    assert len(complaints(package, source)) == 1


def test_a_permitted_import_is_not_complained_of():
    assert complaints("engine", "from imgcls.data import Source\nimport imgcls.structures.batch\nimport torch") == []


def test_no_file_has_a_name_that_says_nothing():
    assert [p for p in (ROOT / "imgcls").rglob("*.py") if p.stem in NAMELESS] == []


def test_backward_and_optimizer_steps_are_in_one_file():
    """Exactly one training step exists; what the benchmark compares it with is used by the benchmark alone."""
    calls = {}
    for path in (ROOT / "imgcls").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "backward":
                calls.setdefault(path.name, []).append(node.lineno)
    assert sorted(calls) == ["step.py", "training_loops.py"]
    users = [p.name for p in (ROOT / "imgcls").rglob("*.py") if "training_loops" in p.read_text()]
    assert users == ["benchmark_train.py"]


def test_importing_adds_little_to_detectron2():
    """Nothing heavy at import: what is loaded lazily must not be there."""
    import subprocess
    import sys

    lazy = ("mlxtend", "matplotlib.pyplot", "timm", "tensorboard")
    code = f"import imgcls, sys; print([name for name in {lazy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
