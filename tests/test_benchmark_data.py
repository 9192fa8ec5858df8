"""tools/benchmark_data.py: stages and pipelines on a few pictures; what is missing, said in a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Done

from imgcls.commands import data_pipelines
from imgcls.commands.benchmark_data import Rate, _rate_table, generate
from imgcls.commands.data_pipelines import OTHERS, Work, dali_pipeline_of
from imgcls.data import open_source
from imgcls.data.photo_like import SIZES, jpeg_of, photo_like

Tool = Callable[..., Done]
SCRIPT = "tools/benchmark_data.py"
SMALL = ("--repeats", 2, "--images", 8, "--batch", 4, "--size", 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(6):
        path = root / ("ant", "bee")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg_of(photo_like(90 + index, 70, np.random.default_rng(index))))
    return root


def test_stages_and_pipelines_side_by_side(photos: Path, tool: Tool, tmp_path: Path) -> None:
    done = tool(
        SCRIPT,
        "--data",
        photos,
        *SMALL,
        "--workers",
        0,
        "--with",
        "torchvision",
        "exact",
        "--json",
        tmp_path / "b.json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    assert [rate["name"] for rate in report["rates"]] == ["imgcls", "torchvision", "exact"]
    for rate in report["rates"]:
        assert len(rate["repeats"]) == 2 and min(rate["repeats"]) > 0
        assert min(rate["repeats"]) <= rate["median"] <= max(rate["repeats"])
        assert f"\n{rate['name']} " in done.stdout and f" {rate['median']:.0f} " in done.stdout
    spent = report["stages"]
    assert {"read", "decode", "augment", "collate"} <= set(spent) and min(spent.values()) > 0
    assert all(f"\n{name} " in done.stdout for name in (*spent, "transfer"))
    assert report["work"]["images"] == 8 and report["machine"]["cores"] >= 1
    assert report["data"].startswith("6 files of ") and str(photos) in report["data"]


def test_timm_and_shards(photos: Path, tool: Tool, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("webdataset")
    packed = tool("tools/pack_dataset.py", "--data", f"folder:{photos}", "--output", tmp_path / "shards")
    assert packed.returncode == 0, packed.stderr
    done = tool(SCRIPT, "--data", photos, *SMALL, "--workers", 1, "--with", "timm", "--shards", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {"imgcls", "imgcls, shards", "timm"} <= set(names)


def test_without_data_pictures_are_generated_and_that_is_said(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("imgcls.commands.benchmark_data.GENERATED", 4)
    done = tool(SCRIPT, *SMALL, "--workers", 0, "--with")
    assert done.returncode == 0, done.stderr
    assert "4 files" in done.stdout and "generated noise that resembles photographs (no --data)" in done.stdout
    sizes = {
        sample["file_name"]: Path(sample["file_name"]).stat().st_size
        for sample in open_source(f"folder:{generate(tmp_path)}")
    }
    assert len(sizes) == 4
    assert 60_000 < np.mean(list(sizes.values())) < 200_000  # ImageNet's have 110 kB in the mean


def test_noise_that_resembles_photographs() -> None:
    """Its amplitudes fall as 1/f: halving the size leaves the contrast between neighbours nearly as it was."""
    pixels = photo_like(256, 256, np.random.default_rng(0)).astype(float)
    white = np.random.default_rng(0).integers(0, 256, pixels.shape).astype(float)

    def contrast(picture: np.ndarray) -> float:
        return float(np.abs(np.diff(picture, axis=1)).mean())

    def halved(picture: np.ndarray) -> np.ndarray:
        return (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2]) / 4

    assert 0.7 < contrast(halved(pixels)) / contrast(pixels) < 1.3
    assert contrast(halved(white)) / contrast(white) < 0.6
    assert max(SIZES)[0] < 1000


def test_ratios_are_of_runs_beside_each_other() -> None:
    """A machine that was busy during one repeat slows both runs of it, and no ratio."""
    ours, other = Rate("imgcls", [100.0, 20.0, 110.0]), Rate("timm", [50.0, 10.0, 55.0])
    assert ours.times(other) == 2.0
    assert other.median == 50.0
    table = _rate_table([ours, other])
    assert "imgcls is times" in table.splitlines()[1]
    assert table.splitlines()[-1].split() == ["timm", "50", "10-55", "2.00"]


def fake_dali(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, str, str]) -> list[list[str]]:
    """Answers (exit code, stdout, stderr) of the interpreters that are started, whose commands are kept."""
    started: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Done:
        started.append(command)
        return Done(*answers[len(started) - 1])

    monkeypatch.setattr(data_pipelines.subprocess, "run", run)
    return started


WORK = Work(Path("/photos"), images=128, batch=64, workers=2, size=224)


def test_dali_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake_dali(
        monkeypatch, (0, "", ""), (0, "a line of DALI's\n1234.5\n", ""), (1, "", "Traceback\nRuntimeError: no")
    )
    run = dali_pipeline_of(WORK, "/elsewhere/python")
    assert run() == 1234.5
    command = started[1]
    assert command[0] == "/elsewhere/python" and command[1].endswith("dali_pipeline.py") and command[2] == "/photos"
    assert dict(zip(command[3::2], command[4::2], strict=True)) == {
        **{"--batch": "64", "--threads": "2", "--size": "224"},
        **{"--warm-up": str(data_pipelines.WARM_UP), "--batches": "2"},
    }
    with pytest.raises(ValueError, match="DALI failed: RuntimeError: no"):
        run()


def test_the_dali_script_asks_for_dali_only() -> None:
    """It runs where imgcls and torch are not installed."""
    text = Path(data_pipelines.dali_pipeline.__file__).read_text(encoding="utf-8")
    imports = {
        line.split()[1].split(".")[0] for line in text.splitlines() if line.lstrip().startswith(("import ", "from "))
    }
    assert imports == {"__future__", "argparse", "time", "nvidia"}


MISTAKES = {
    "no repeats": (["--repeats", 0], "--repeats"),
    "no images": (["--images", -1], "there is nothing to measure with so many images: got -1; allowed: >= 1"),
    "no such folder": (["--data", "/nowhere"], "there is no folder /nowhere"),
    "no such shards": (["--shards", "/nowhere"], "/nowhere"),
    "no such pipeline": (["--with", "ffcv"], "invalid choice: 'ffcv'"),
    "no DALI": (
        ["--with", "dali"],
        f"{sys.executable} cannot import nvidia.dali: pip install nvidia-dali-cuda130 (no GPU",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_missing_is_said_before_anything_is_measured(
    case: str, photos: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = MISTAKES[case]
    if case == "no DALI":
        fake_dali(monkeypatch, (1, "", ""))
    done = tool(SCRIPT, "--data", photos, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pipelines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'imgcls\[timm\]'"):
        OTHERS["timm"](WORK, None, "")  # type: ignore[arg-type]
