"""TF32 on GPUs, and norms over the ranks."""

from __future__ import annotations

import pytest
import torch
from conftest import lines_of
from torch import nn

from imgcls.engine import Run, finalize, sync_norms
from imgcls.engine.output_dir import release
from imgcls.engine.precision import set_float32_precision
from imgcls.engine.setup import setup
from imgcls.structures import Batch


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
    with lines_of("imgcls.engine.precision") as lines:
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


class Foreign(nn.Module):
    """A network with a norm of torch's own, one that says something else, and one that is synchronised."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3))
        self.other, self.done = nn.GroupNorm(2, 4), nn.SyncBatchNorm(4)


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(sync_norms.comm, "get_world_size", lambda: 2)


def test_a_norm_that_nobody_synchronised_becomes_torchs(two_ranks, classifier_cfg):
    """Its state, its constants and the other norms stay."""
    net = Foreign()
    with torch.no_grad():
        net.trunk[1].running_mean.fill_(3.0)
    names, done = list(net.state_dict()), net.done
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "SyncBN", "MODEL.DEVICE", "cuda")
    sync_norms.synchronise_norms(cfg, net)
    made = net.trunk[1]
    assert type(made) is nn.SyncBatchNorm and made.eps == 1e-3 and bool((made.running_mean == 3.0).all())
    assert net.done is done and type(net.other) is nn.GroupNorm and list(net.state_dict()) == names


@pytest.mark.parametrize("norm", ["SyncBN", "BN"])
def test_on_cpus_a_line_says_which_norms_stay(two_ranks, classifier_cfg, norm):
    net = Foreign()
    with lines_of("imgcls.engine.sync_norms") as lines:
        sync_norms.synchronise_norms(classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", norm), net)
    assert type(net.trunk[1]) is nn.BatchNorm2d
    assert [line.partition(":")[0] for line in lines] == (["trunk.1"] if norm == "SyncBN" else [])


def test_syncbn_trains_on_a_cpu_alone(classifier_cfg):
    run = Run(*finalize(classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "SyncBN")))
    assert run.model.backbone.architecture.norm == "naiveSyncBN"
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert run.step(Batch(images, torch.arange(4), torch.arange(4)), 0)["loss_cls"].isfinite()
