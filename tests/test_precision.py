"""``SOLVER.TF32``: how GPUs multiply float32."""

from __future__ import annotations

import pytest
import torch
from conftest import lines_of

from imgcls.engine.machine.precision import set_float32_precision
from imgcls.engine.output.output_dir import release
from imgcls.engine.setup import setup


@pytest.fixture
def switches(monkeypatch):
    """``switches()``: whether matrix products and convolutions may be TF32; put back after the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield lambda: (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("wanted", [True, False])
def test_both_kinds_of_product_follow_the_key(switches, classifier_cfg, wanted):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = not wanted, not wanted
    set_float32_precision(classifier_cfg("mobilenet_v1_0.25", "SOLVER.TF32", wanted))
    assert switches() == (wanted, wanted)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # the newer name of the same switch
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == wanted


def test_the_log_says_what_the_key_does_not_do_on_a_cpu(switches, classifier_cfg):
    with lines_of("imgcls.engine.machine.precision") as lines:
        set_float32_precision(classifier_cfg("mobilenet_v1_0.25", "SOLVER.TF32", True))
        set_float32_precision(classifier_cfg("mobilenet_v1_0.25", "SOLVER.TF32", False))
        set_float32_precision(classifier_cfg("mobilenet_v1_0.25", "MODEL.DEVICE", "cuda"))
    assert len(lines) == 2
    assert "SOLVER.TF32 changes nothing on cpu" in lines[0] and "multiplied exactly" in lines[1]


def test_training_sets_the_switches(switches, classifier_cfg):
    cfg = classifier_cfg("mobilenet_v1_0.25", "SOLVER.TF32", True)
    setup(cfg)
    release(cfg.OUTPUT_DIR)
    assert switches() == (True, True)
