"""Optimizers against their libraries used directly; groups, depth decay, overrides, scaling and adaptive clipping."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from imgcls.config import all_problems
from imgcls.config.checks import CLASSIFIER
from imgcls.modeling import make_classifier, plain
from imgcls.solver import build_optimizer, clip_gradients, scale_learning_rate
from imgcls.solver.groups import depth_factors, parameter_groups
from imgcls.solver.optimizers import OPTIMIZERS
from imgcls.structures import PreprocessingContract

CONTRACT = PreprocessingContract("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), 32, 32, "bilinear")


class Small(nn.Module):
    """A matrix, a norm and biases; ``backbone`` because a classifier has one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def solver(cfg: CfgNode, **keys: Any) -> CfgNode:
    cfg.MODEL.META_ARCHITECTURE = "ClsNet"
    for key, value in {
        "BASE_LR": 0.01,
        "WEIGHT_DECAY": 0.05,
        "MOMENTUM": 0.8,
        "WEIGHT_DECAY_NORM": 0.05,
        **keys,
    }.items():
        assert key in cfg.SOLVER
        cfg.SOLVER[key] = value
    return cfg


def trained(build: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = Small()
    optimizer = build(net)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(6, 3, 8, 8)), torch.arange(6) % 5).backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


BETAS = (0.85, 0.95)
LIBRARIES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.05, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, betas=BETAS, weight_decay=0.05, eps=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, betas=BETAS, weight_decay=0.05, eps=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, betas=BETAS, weight_decay=0.05, eps=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01, betas=BETAS, weight_decay=0.05, eps=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.05, eps=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.7, momentum=0.8, weight_decay=0.05, eps=1e-3),
    "RMSpropTF": lambda p: timm.optim.RMSpropTF(p, 0.01, alpha=0.7, momentum=0.8, weight_decay=0.05, eps=1e-3),
    "LAMB": lambda p: timm.optim.Lamb(p, 0.01, betas=BETAS, weight_decay=0.05, eps=1e-3),
    "LARS": lambda p: timm.optim.Lars(p, 0.01, momentum=0.8, weight_decay=0.05, nesterov=True, eps=1e-3),
    "Lion": lambda p: timm.optim.Lion(p, 0.01, betas=BETAS, weight_decay=0.05),
    "Muon": lambda p: timm.optim.Muon(p, 0.01, momentum=0.8, weight_decay=0.05, nesterov=True, betas=BETAS, eps=1e-3),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_is_its_librarys(name: str, plain_cfg: CfgNode) -> None:
    keys = {"BETAS": list(BETAS), "SQUARE_DECAY": 0.7, "NESTEROV": True, "OPTIMIZER": name}
    keys |= {} if name in ("SGD", "Lion") else {"EPS": 1e-3}
    cfg = solver(plain_cfg, **keys)
    ours = trained(lambda net: build_optimizer(cfg, net))
    theirs = trained(lambda net: LIBRARIES[name](net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    wrong = trained(lambda net: torch.optim.SGD(net.parameters(), 0.011, momentum=0.8, weight_decay=0.05))
    assert not any(torch.equal(a, b) for a, b in zip(ours, wrong, strict=True))


def test_every_name_may_stand_in_a_config_and_is_tested_here() -> None:
    assert CLASSIFIER["SOLVER.OPTIMIZER"].allowed == ", ".join(OPTIMIZERS) == ", ".join(LIBRARIES)


def by_name(groups: list[dict[str, Any]], net: nn.Module) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in net.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def test_norms_and_biases_without_decay(plain_cfg: CfgNode) -> None:
    net = Small()
    cfg = solver(plain_cfg, WEIGHT_DECAY_NORM=0.0, WEIGHT_DECAY_BIAS=0.0, BIAS_LR_FACTOR=2.0)
    assert by_name(parameter_groups(cfg, net), net) == {
        "backbone.0.weight": (0.01, 0.05),
        "backbone.0.bias": (0.02, 0.0),
        "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.02, 0.0),
        "head.weight": (0.01, 0.05),
        "head.bias": (0.02, 0.0),
    }
    assert len(parameter_groups(cfg, net)) == 3


def test_overrides_by_pattern(plain_cfg: CfgNode) -> None:
    net = Small()
    net.backbone[1].weight.requires_grad_(False)
    rows = [["head.*", {"lr_factor": 10.0}], ["*.bias", {"weight_decay": 0.0}], ["head.bias", {"weight_decay": 0.3}]]
    assert by_name(parameter_groups(solver(plain_cfg, PARAM_OVERRIDES=rows), net), net) == {
        "backbone.0.weight": (0.01, 0.05),
        "backbone.0.bias": (0.01, 0.0),
        "backbone.1.bias": (0.01, 0.0),
        "head.weight": (0.1, 0.05),
        "head.bias": (0.1, 0.3),
    }
    with pytest.raises(ValueError, match=r"no trainable parameter has a name like this: got 'backbone.1.weight'"):
        parameter_groups(solver(plain_cfg, PARAM_OVERRIDES=[["backbone.1.weight", {"lr_factor": 1.0}]]), net)


@pytest.mark.parametrize(
    "row", ["head", ["head"], [3, {"lr_factor": 1.0}], ["head", {}], ["head", {"lr": 1.0}], ["head", {"lr_factor": -1}]]
)
def test_a_wrong_override_is_found_before_anything_is_built(row: Any, plain_cfg: CfgNode) -> None:
    cfg = solver(plain_cfg, PARAM_OVERRIDES=[["*", {"weight_decay": 0}], row])
    (problem,) = [problem for problem in all_problems(cfg) if problem.key == "SOLVER.PARAM_OVERRIDES"]
    assert "allowed: [pattern, {lr_factor and/or weight_decay: a number >= 0}]" in str(problem)


def test_depth_decay_of_a_vit_is_detectron2s() -> None:
    """Its rates for ViTDet: block k of 12 has 0.7 ** (12 - k), patches and positions 0.7 ** 13."""
    net = make_classifier(plain("vit_ti_16"), 5, CONTRACT)
    factors = depth_factors(net, 0.7)
    backbone = {name.removeprefix("backbone."): factor for name, factor in factors.items()}
    assert len(backbone) == len(list(net.backbone.parameters()))
    compared = 0
    for name, factor in backbone.items():
        if "blocks." in name or "patch_embed" in name or "pos_embed" in name:
            theirs = get_vit_lr_decay_rate(
                f"backbone.net.{name.removeprefix('body.')}", lr_decay_rate=0.7, num_layers=12
            )
            assert factor == pytest.approx(theirs), name
            compared += 1
    assert compared > 100


def test_depth_decay_of_a_resnet_counts_blocks() -> None:
    net = make_classifier(plain("resnet18"), 5, CONTRACT)
    factors = depth_factors(net, 0.5)
    assert factors["backbone.stem.conv1.weight"] == 0.5**9  # eight blocks stand between the stem and the head
    assert factors["backbone.res2.0.conv1.weight"] == 0.5**8
    assert factors["backbone.res5.1.conv2.weight"] == 0.5
    assert not any(name.startswith("head") for name in factors) and depth_factors(net, 1.0) == {}


@pytest.mark.parametrize(("rule", "rate"), [("linear", 0.04), ("sqrt", 0.02)])
def test_the_rate_follows_the_batch(
    rule: str, rate: float, plain_cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = solver(plain_cfg, LR_FOR_BATCH=256, LR_SCALING=rule, IMS_PER_BATCH=1024, BASE_LR_END=0.001)
    with caplog.at_level(logging.INFO, "imgcls"):
        scale_learning_rate(cfg)
        scale_learning_rate(cfg)  # once
    scaled = [cfg.SOLVER.BASE_LR, cfg.SOLVER.BASE_LR_END]
    assert scaled == pytest.approx([rate, rate / 10])
    lines = [record.message for record in caplog.records if record.name.startswith("imgcls")]
    assert lines == [f"SOLVER.BASE_LR 0.01 for 256 images a step becomes {rate} for 1024 ({rule} scaling)"]


@pytest.mark.parametrize("share", [0.01, 10.0])
def test_adaptive_clipping_is_timms(share: float, plain_cfg: CfgNode) -> None:
    node = plain_cfg.SOLVER.CLIP_GRADIENTS
    node.ENABLED, node.CLIP_TYPE, node.CLIP_VALUE = True, "adaptive", share
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(Small())
        nn.functional.cross_entropy(nets[-1](torch.randn(6, 3, 8, 8)), torch.arange(6) % 5).backward()
    before = [parameter.grad.clone() for parameter in nets[0].parameters()]
    clip_gradients(plain_cfg, list(nets[0].parameters()))
    adaptive_clip_grad(nets[1].parameters(), clip_factor=share)
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        if ours.dim() > 1:  # of a vector timm takes the whole, the paper each unit
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
        else:
            most = share * ours.abs().clamp(min=1e-3)
            assert (ours.grad.abs() <= most * (1 + 1e-6)).all()
    changed = [not torch.equal(a, b.grad) for a, b in zip(before, nets[0].parameters(), strict=True)]
    assert any(changed) if share < 1 else not changed[0]
