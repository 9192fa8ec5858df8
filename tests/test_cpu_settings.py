"""Precision and memory format on CPUs: the rule, what the user states, and that both loops stay exact with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import lines_of
from detectron2.config import CfgNode

import imgcls
from imgcls.config import load_config
from imgcls.engine import ClsTrainer, Run, finalize, train
from imgcls.engine.machine import cpu_settings
from imgcls.engine.machine.cpu_settings import LEAST_WORK, Layers, decide_cpu_settings, layers_of, rule
from imgcls.engine.measuring import tuning
from imgcls.modeling import family_of


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has it."""
    for module in (cpu_settings, tuning):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda: True)


def config_of(variant: str, size: int, batch: int, *words: object) -> CfgNode:
    return imgcls.get_config(
        "Base-ClsNet.yaml",
        [
            *("MODEL.BACKBONE.VARIANT", variant, "MODEL.BACKBONE.NAME", family_of(variant).builder),
            *("MODEL.DEVICE", "cpu", "MODEL.HEAD.NUM_CLASSES", 10, "INPUT.TRAIN_SIZE", size),
            *("SOLVER.IMS_PER_BATCH", batch, *words),
        ],
    )


def settings_of(cfg: CfgNode) -> tuple[bool, bool]:
    return cfg.SOLVER.AMP.ENABLED, cfg.MODEL.CHANNELS_LAST


# bfloat16 and channels last, as measured on a CPU with AVX512-BF16 (docs/training-speed.md).
@pytest.mark.parametrize(
    ("variant", "size", "batch", "expected"),
    [
        ("resnet18", 224, 16, (True, True)),
        ("resnet18", 32, 8, (False, False)),
        ("mobilenet_v2_1.0", 224, 16, (True, True)),
        ("mobilenet_v2_1.0", 64, 32, (False, True)),
        ("mobilenet_v1_0.25", 224, 16, (False, True)),
        ("vit_s_16", 224, 4, (True, False)),
    ],
)
@pytest.mark.usefixtures("fast_bfloat16")
def test_the_rule_takes_what_was_measured_to_be_faster(
    variant: str, size: int, batch: int, expected: tuple[bool, bool]
) -> None:
    cfg = config_of(variant, size, batch)
    decide_cpu_settings(cfg)
    assert settings_of(cfg) == expected
    assert ("bfloat16" if expected[0] else "float16") == cfg.SOLVER.AMP.DTYPE
    assert cfg.SOLVER.CPU_SETTINGS == "decided"


def test_the_work_of_a_layer_is_counted_by_hand() -> None:
    """ResNet-18 at 224 pixels: 1.814 billion multiply-adds (He et al. 2015: 1.8), 21 layers with weights."""
    layers = layers_of(config_of("resnet18", 224, 4, "SOLVER.ACCUMULATE", 2))
    assert layers is not None
    assert layers.work == pytest.approx(2 * 1.8136e9 / 21, rel=1e-3)
    assert layers.spatial and not layers.depthwise


def test_without_hardware_for_bfloat16_the_order_alone_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "has_fast_bfloat16", lambda: False)
    for variant, expected in (("resnet18", (False, False)), ("mobilenet_v2_1.0", (False, True))):
        cfg = config_of(variant, 224, 16)
        decide_cpu_settings(cfg)
        assert settings_of(cfg) == expected
    work = Layers(work=LEAST_WORK, intensity=500, spatial=True, depthwise=False, side=64)
    assert rule(work, fast_bfloat16=True) == (True, True) and rule(work, fast_bfloat16=False) == (False, False)


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize(
    "words",
    [
        "SOLVER.CPU_SETTINGS off",
        "SOLVER.CPU_SETTINGS decided",
        "SOLVER.AMP.ENABLED False",
        "MODEL.CHANNELS_LAST False",
        "MODEL.DEVICE cuda",
        "INPUT.TRAIN_SIZE 31",
    ],
)
def test_what_is_stated_stands(words: str) -> None:
    cfg = config_of("resnet18", 224, 16, *words.split())
    before = settings_of(cfg)
    decide_cpu_settings(cfg)
    assert settings_of(cfg) == before == (False, False)


@pytest.mark.usefixtures("fast_bfloat16")
def test_float16_that_a_file_states_stays(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("SOLVER:\n  AMP:\n    ENABLED: True\n")
    assert load_config(file).SOLVER.CPU_SETTINGS == "off"
    assert load_config(file, ["SOLVER.CPU_SETTINGS", "auto"]).SOLVER.CPU_SETTINGS == "auto"
    file.write_text("MODEL:\n  CHANNELS_LAST: True\n")
    assert load_config(file).SOLVER.CPU_SETTINGS == "auto"


def test_flags_of_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor : 1\nflags : fpu\n")
    assert cpu_settings._flags(file) == {"fpu", "avx512f", "avx512_bf16"}
    assert cpu_settings._flags(tmp_path / "none") == set()


def test_older_processors_have_no_fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert cpu_settings.has_fast_bfloat16()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu_settings.has_fast_bfloat16()


@pytest.mark.usefixtures("fast_bfloat16")
def test_both_loops_and_a_resumed_run_agree_to_the_bit(
    classifier_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under what was decided: bfloat16 and channels last."""
    monkeypatch.setattr(cpu_settings, "rule", lambda layers, fast_bfloat16: (True, True))
    monkeypatch.setattr(cpu_settings, "LEAST_PIXELS", 0)

    def config(name: str) -> CfgNode:
        words = ("OUTPUT_DIR", str(tmp_path / name), "MODEL.CHANNELS_LAST", False, "DATASETS.TEST", ())
        return classifier_cfg("mobilenet_v1_0.25", *words, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0)

    weights = {}
    cfg, data = finalize(config("plain"))
    assert settings_of(cfg) == (True, True)
    run = Run(cfg, data)
    train(run)
    weights["plain"] = run.model.state_dict()
    trainer = ClsTrainer(*finalize(config("builtin")))
    trainer.train()
    weights["builtin"] = trainer.run.model.state_dict()
    again = Run(cfg, data)
    again.resume_from(tmp_path / "plain" / "model_0000001.pth")
    assert again.start_iter == 2
    train(again)
    weights["resumed"] = again.model.state_dict()
    off = config("off")
    off.SOLVER.CPU_SETTINGS = "off"
    other = Run(*finalize(off))
    train(other)
    for name, value in weights["plain"].items():
        assert torch.equal(value, weights["builtin"][name]) and torch.equal(value, weights["resumed"][name]), name
    # The twin: another precision is seen.
    assert any(not torch.equal(value, weights["plain"][name]) for name, value in other.model.state_dict().items())


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], (True, True)),
        ([1.0, 2.0, 3.0, 4.0], (False, False)),
        ([1.02, 1.0, 2.0, 2.0], (False, False)),
    ],
    ids=["last", "stated", "hardly faster"],
)
def test_tune_writes_the_fastest(
    classifier_cfg: Callable[..., CfgNode], seconds: list[float], expected: tuple[bool, bool]
) -> None:
    cfg, data = finalize(classifier_cfg("mobilenet_v1_0.25", "MODEL.CHANNELS_LAST", False))
    cfg.SOLVER.CPU_SETTINGS = "auto"

    def measure(candidates: list[tuning.Candidate]) -> None:
        for candidate, value in zip(candidates, seconds, strict=True):
            candidate.seconds = [value]

    with lines_of("imgcls.engine.measuring.tuning") as lines:
        tuning.tune(cfg, data, measure)
    assert settings_of(cfg) == expected and cfg.SOLVER.CPU_SETTINGS == "decided"
    assert "bfloat16, channels last" in lines[0] and lines[0].count("chosen") == 1


@pytest.mark.usefixtures("fast_bfloat16")
def test_tune_measures_each_candidate_and_leaves_what_is_stated(classifier_cfg: Callable[..., CfgNode]) -> None:
    cfg, data = finalize(
        classifier_cfg("mobilenet_v1_0.25", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    )
    found = tuning.tune(cfg, data)
    assert [(one.bfloat16, one.channels_last) for one in found] == [(False, True)]  # both are stated
    assert all(len(one.seconds) == tuning.STEPS for one in found)
    cfg.SOLVER.CPU_SETTINGS = "off"
    with pytest.raises(ValueError, match=r"--tune may not change what is stated: got 'off'.*SOLVER.CPU_SETTINGS"):
        tuning.tune(cfg, data)
