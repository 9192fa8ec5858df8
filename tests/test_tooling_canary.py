"""Each check of scripts/test.sh can fail: a planted fault is found, its clean twin passes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "pyproject.toml"

CLEAN = '''"""A clean module."""


def double(number: int) -> int:
    return 2 * number
'''


def run_tool(tool: str, *arguments: str | Path, cwd: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", tool, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


def run_on(folder: Path, tool: str, source: str) -> tuple[int, str]:
    """One tool over one file, with the settings of this repository."""
    file = folder / "test_planted.py"
    file.write_text(source, encoding="utf-8")
    if tool == "lint":
        return run_tool("ruff", "check", "--no-cache", "--config", SETTINGS, file, cwd=folder)
    if tool == "format":
        return run_tool("ruff", "format", "--check", "--no-cache", "--config", SETTINGS, file, cwd=folder)
    if tool == "mypy":
        return run_tool("mypy", "--config-file", SETTINGS, "--cache-dir", folder / "cache", file, cwd=folder)
    assert tool == "pytest"
    return run_tool("pytest", "-c", SETTINGS, "--rootdir", folder, "-p", "no:cacheprovider", file, cwd=folder)


FAULTS = {
    "unused import": ("lint", "import os\n\n" + CLEAN, "F401"),
    "shared default": ("lint", CLEAN + "\n\ndef add(to: list = []) -> list:\n    return to\n", "B006"),
    "long line": ("lint", CLEAN + f"\n\nLONG = {'1 + ' * 40}1\n", "E501"),
    "single quotes": ("format", CLEAN + "\n\nNAME = 'x'\n", "would be reformatted"),
    "wrong type": ("mypy", CLEAN + '\n\ndouble("2")\n', "arg-type"),
    "untyped function": ("mypy", CLEAN + "\n\ndef half(number):\n    return number / 2\n", "no-untyped-def"),
    "unused ignore": ("mypy", CLEAN + "\n\ndouble(2)  # type: ignore\n", "unused-ignore"),
    "false assertion": ("pytest", CLEAN + "\n\ndef test_it():\n    assert double(2) == 5\n", "1 failed"),
    "own warning": (
        "pytest",
        "import warnings\n\n\ndef test_it():\n    warnings.warn('ours', UserWarning)\n",
        "UserWarning: ours",
    ),
    "unknown mark": (
        "pytest",
        "import pytest\n\n\n@pytest.mark.slwo\ndef test_it():\n    pass\n",
        "'slwo' not found in `markers` configuration option",
    ),
    "no parameters": (
        "pytest",
        "import pytest\n\n\n@pytest.mark.parametrize('x', [])\ndef test_it(x):\n    pass\n",
        "Empty parameter set in 'test_it'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    tool, source, message = FAULTS[fault]
    status, output = run_on(tmp_path, tool, source)
    assert status != 0, output
    assert message in output


@pytest.mark.parametrize("tool", ["lint", "format", "mypy", "pytest"])
def test_the_clean_twin_passes(tool: str, tmp_path: Path) -> None:
    source = CLEAN + "\n\ndef test_it() -> None:\n    assert double(2) == 4\n"
    status, output = run_on(tmp_path, tool, source)
    assert status == 0, output


def test_noise_of_others_is_no_failure(tmp_path: Path) -> None:
    source = "def test_it() -> None:\n    import detectron2.modeling  # noqa: F401\n"
    status, output = run_on(tmp_path, "pytest", source)
    assert status == 0, output
