"""Which words of a command line are configs, a checkpoint, or KEY VALUE pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.commands import plot_schedule
from imgcls.commands.arguments import parse, training_parser


@pytest.mark.parametrize(
    "words",
    [
        "--config-file a.yaml b.yml c.yaml SEED 1 --resume",
        "--resume --config-file a.yaml b.yml c.yaml SEED 1",
        "--config-file a.yaml --resume b.yml c.yaml SEED 1",
        "--config-file a.yaml b.yml --resume c.yaml --num-gpus 1 SEED 1",
        "--config-file=a.yaml b.yml --num-gpus 1 c.yaml --resume SEED 1",
        "--conf a.yaml b.yml c.yaml SEED --res 1",
    ],
)
def test_configs_stand_behind_the_first(words: str) -> None:
    args = parse(training_parser(""), words.split())
    assert (args.config_file, args.resume, args.opts) == (["a.yaml", "b.yml", "c.yaml"], True, ["SEED", "1"])


def test_a_value_may_be_called_like_a_config() -> None:
    args = parse(training_parser(""), ["--config-file", "a.yaml", "OUTPUT_DIR", "b.yaml", "--dist-url", "c.yaml"])
    assert (args.config_file, args.opts, args.dist_url) == (["a.yaml"], ["OUTPUT_DIR", "b.yaml"], "c.yaml")


@pytest.mark.parametrize(
    ("words", "resume", "opts"),
    [
        ("--resume out/model_0000099.pth SEED 1", "out/model_0000099.pth", ["SEED", "1"]),
        ("SEED 1 --resume=here", "here", ["SEED", "1"]),
        ("--resume model_final.pth", "model_final.pth", []),
        ("--resume odd_name SEED 1", "odd_name", ["SEED", "1"]),  # a file that is there
        ("--resume out/nothing SEED 1", "out/nothing", ["SEED", "1"]),  # no KEY has a slash
        ("--resume no_name 1", True, ["no_name", "1"]),
        ("--resume SEED 1", True, ["SEED", "1"]),
        ("--resume --eval-only", True, []),
        ("SEED 1 --resume", True, ["SEED", "1"]),
        ("SEED 1", False, ["SEED", "1"]),
    ],
)
def test_what_resume_takes(
    words: str, resume: bool | str, opts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_name").touch()
    monkeypatch.chdir(tmp_path)
    args = parse(training_parser(""), words.split())
    assert (args.resume, args.opts) == (resume, opts)


def test_each_curve_of_a_plot_has_its_own_configs() -> None:
    words = "--config-file a.yaml b.yaml --config-file c.yaml --images 9 d.yaml SEED 1"
    args = parse(plot_schedule.parser(), words.split())
    assert (args.config_file, args.images, args.opts) == (
        [["a.yaml", "b.yaml"], ["c.yaml", "d.yaml"]],
        9,
        ["SEED", "1"],
    )
