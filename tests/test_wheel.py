"""The wheel carries all of imgcls and its configs, and works from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "imgcls", "configs")
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.egg-info")


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_BEHIND)
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel; run_installed() puts it first on the path."""
    target = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


def run_installed(target: Path, cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with imgcls from the wheel; cwd should be empty, so that no checkout helps."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def relative_files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in files}


def test_the_wheel_carries_the_package_and_the_configs(wheel: Path) -> None:
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    configs = {f"imgcls/configs/{name}" for name in relative_files(ROOT / "configs")}
    package = {f"imgcls/{name}" for name in relative_files(ROOT / "imgcls")}
    assert len(configs) > 0 and "imgcls/__main__.py" in package
    assert carried == package | configs


def test_the_wheel_is_pure_and_licensed(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_installed_wheel_is_the_one_imported(installed_wheel: Path, tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('imgcls').origin)"
    found = run_installed(installed_wheel, tmp_path, "-c", code)
    assert Path(found.stdout.strip()) == installed_wheel / "imgcls" / "__init__.py", found.stderr


# Commands of the installed package, each from an empty folder. ----------------------------------------------


def test_help_from_an_empty_folder(installed_wheel: Path, tmp_path: Path) -> None:
    told = run_installed(installed_wheel, tmp_path, "-m", "imgcls", "--help")
    assert told.returncode == 0, told.stderr
    assert "usage: python -m imgcls" in told.stdout


def test_train_convert_and_verify_from_an_empty_folder(installed_wheel: Path, tmp_path: Path) -> None:
    """The whole job with the wheel alone; the configs are found by name."""
    small = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "8", "INPUT.TRAIN_SIZE", "32", "MODEL.DEVICE", "cpu"]
    trained = run_installed(
        installed_wheel,
        tmp_path,
        *("-m", "imgcls", "train", "--config-file", "quick/digits_mobilenet_v1.yaml", "--output", "run", *small),
    )
    assert trained.returncode == 0, trained.stderr
    converted = run_installed(
        installed_wheel,
        tmp_path,
        *("-m", "imgcls", "convert", "--weights", "run/model_final.pth", "--output", "backbone.pth"),
    )
    assert converted.returncode == 0, converted.stderr
    verify = ("-m", "imgcls", "verify", "--weights", "backbone.pth", "--classifier", "run/model_final.pth")
    verify = (*verify, "--config-file", "detection/mobilenet_v1_retinanet_fpn.yaml")
    good = run_installed(installed_wheel, tmp_path, *verify, "MODEL.BACKBONE.VARIANT", "mobilenet_v1_0.25")
    assert good.returncode == 0 and "OK: 135 of 135 tensors arrived bit for bit" in good.stdout, good.stderr
    bad = run_installed(installed_wheel, tmp_path, *verify)
    assert bad.returncode == 1 and "VARIANT is 'mobilenet_v1_1.0' in the config" in bad.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"run", "backbone.pth", "backbone.yaml"}


def test_a_config_is_there_by_name(installed_wheel: Path, tmp_path: Path) -> None:
    code = "import imgcls; print(imgcls.get_config('quick/digits_mobilenet_v1.yaml').MODEL.BACKBONE.VARIANT)"
    found = run_installed(installed_wheel, tmp_path, "-W", "ignore", "-c", code)
    assert found.stdout.strip() == "mobilenet_v1_0.25", found.stderr
