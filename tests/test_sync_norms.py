"""``MODEL.BACKBONE.NORM SyncBN`` where it needs more than a name: foreign backbones, and CPUs."""

from __future__ import annotations

import pytest
import torch
from conftest import lines_of
from torch import nn

from imgcls.engine import Run, finalize
from imgcls.engine.ranks import sync_norms
from imgcls.structures import Batch


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
    with lines_of("imgcls.engine.ranks.sync_norms") as lines:
        sync_norms.synchronise_norms(classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", norm), net)
    assert type(net.trunk[1]) is nn.BatchNorm2d
    assert [line.partition(":")[0] for line in lines] == (["trunk.1"] if norm == "SyncBN" else [])


def test_syncbn_trains_on_a_cpu_alone(classifier_cfg):
    run = Run(*finalize(classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "SyncBN")))
    assert run.model.backbone.architecture.norm == "naiveSyncBN"
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert run.step(Batch(images, torch.arange(4), torch.arange(4)), 0)["loss_cls"].isfinite()
