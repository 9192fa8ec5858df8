"""The training step, the optimizers and the schedules, against slow references."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from imgcls.engine import TrainStep
from imgcls.layers import average_running_statistics
from imgcls.solver import build_optimizer, build_schedule, clip_gradients
from imgcls.structures import Batch


@pytest.fixture
def make_step(classifier_cfg):
    def make(*overrides):
        cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", 4, *overrides)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        return TrainStep.from_cfg(cfg, model, optimizer, build_schedule(cfg, optimizer))

    return make


def batch(seed=0, count=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 4, torch.arange(count))


def test_one_step_is_sgd_by_hand(make_step):
    """v = m v + (g + wd w), nesterov: w -= lr (g + wd w + m v); twice, with the cosine's rates."""
    overrides = ("SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.BASE_LR", 0.1)
    step, reference = make_step(*overrides), make_step(*overrides)
    step.model.double(), reference.model.double()
    velocities: dict[str, torch.Tensor] = {}
    for iteration in range(2):
        step(batch(), iteration)
        reference.model.zero_grad()
        reference.model(batch().images, batch().targets)["loss_cls"].backward()
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * iteration / 4))
        with torch.no_grad():
            for name, parameter in reference.model.named_parameters():
                decay = 0.0 if ".norm." in name else 0.01
                gradient = parameter.grad + decay * parameter
                velocities[name] = 0.9 * velocities.get(name, 0) + gradient
                parameter -= lr * (gradient + 0.9 * velocities[name])
        assert step.last_lr == pytest.approx(lr, rel=1e-6)
    for ours, theirs in zip(step.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_dropout_draws_from_the_iteration_and_nothing_else(make_step):
    def losses(disturb):
        step = make_step("MODEL.HEAD.DROPOUT", 0.5, "SOLVER.BASE_LR", 0.0)
        if disturb:
            torch.rand(1000)
        return [step(batch(), iteration)["loss_cls"].item() for iteration in (5, 6, 5)]

    first, again = losses(False), losses(True)
    assert first == again
    assert first[0] != first[1]


def test_a_model_in_eval_mode_is_refused(make_step):
    step = make_step()
    step.model.eval()
    with pytest.raises(RuntimeError, match=r"eval mode; call model.train\(\)"):
        step(batch(), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp_runs_in_the_narrow_type_and_still_learns(make_step, dtype):
    step = make_step("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype, "SOLVER.MAX_ITER", 100)
    seen = set()
    step.model.backbone.res3.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    values = [step(batch(), iteration)["loss_cls"].item() for iteration in range(40)]
    assert seen == {getattr(torch, dtype)}
    assert values[-1] < 0.5 * values[0]
    assert all(p.dtype == torch.float32 for p in step.model.parameters())
    assert step.scaler.is_enabled() == (dtype == "float16")


def test_state_comes_back(make_step):
    step = make_step()
    for iteration in range(2):
        step(batch(), iteration)
    model_state = {k: v.clone() for k, v in step.model.state_dict().items()}
    state = copy.deepcopy(step.state_dict())
    other = make_step()
    other.model.load_state_dict(model_state)
    other.load_state_dict(state)
    step(batch(), 2)
    other(batch(), 2)
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), other.model.parameters(), strict=True))
    fresh = make_step()
    fresh.model.load_state_dict(model_state)
    fresh(batch(), 2)
    assert not torch.equal(fresh.model.head.fc.weight, step.model.head.fc.weight)


def test_nothing_changes_when_the_loss_is_not_finite(make_step):
    step = make_step()
    with torch.no_grad():
        step.model.head.fc.bias[0] = float("nan")
    before = {k: v.clone() for k, v in step.model.named_parameters()}
    with pytest.raises(ValueError, match=r"not finite at iteration 7.*loss_cls nan.*samples 0, 1, 2"):
        step(batch(), 7)
    for name, parameter in step.model.named_parameters():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(before[name]))
    assert step.schedule.last_epoch == 0


FLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")


def test_a_step_left_out_for_its_loss_leaves_the_scaler_ready(make_step):
    """Or its next unscaling is an error, for it waits to be told of the last; the scale halves as at any such step."""
    step = make_step(*FLOAT16, "SOLVER.NON_FINITE", "skip")
    step(batch(), 0)
    scale, bias = step.scaler.get_scale(), step.model.head.fc.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("nan")
    step(batch(), 1)
    assert step.skipped == 1 and step.scaler.get_scale() == scale / 2
    with torch.no_grad():
        bias.copy_(before)
    for iteration in range(2, 8):  # the first of them may be left out by the scaler
        step(batch(), iteration)
    assert step.skipped == 1 and not torch.equal(bias, before)


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(make_step):
    """A scaler alone would leave steps out for ever, and the run come to its end untrained."""
    step = make_step(*FLOAT16, "SOLVER.MAX_ITER", 100)
    step.model.head.fc.bias.register_hook(lambda gradient: gradient * float("nan"))
    before = step.model.head.fc.weight.detach().clone()
    halvings = int(math.log2(step.scaler.get_scale()))
    for iteration in range(halvings):
        step(batch(), iteration)
    with pytest.raises(ValueError, match=rf"not finite at iteration {halvings} "):
        step(batch(), halvings)
    assert step.scaler.get_scale() == 1.0 and torch.equal(step.model.head.fc.weight, before)


@pytest.mark.parametrize(("kind", "value"), [("value", 0.01), ("norm", 0.1), ("full_model", 0.1)])
def test_clipping_is_what_its_name_says(classifier_cfg, kind, value):
    cfg = classifier_cfg("resnet18", "SOLVER.CLIP_GRADIENTS.ENABLED", True)
    cfg.merge_from_list(["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", value])
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    gradients = [torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 12.0])]
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    clip_gradients(cfg, parameters)
    total = math.sqrt(25 + 144)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        expected = {
            "value": gradient.clamp(-value, value),
            "norm": gradient * value / gradient.norm(),
            "full_model": gradient * value / total,
        }[kind]
        assert torch.allclose(parameter.grad, expected, rtol=1e-4)
    assert parameters[2].grad is None


def test_an_unknown_way_to_clip_or_optimizer_is_refused(classifier_cfg):
    cfg = classifier_cfg("resnet18", "SOLVER.CLIP_GRADIENTS.ENABLED", True)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "l1"
    with pytest.raises(ValueError, match=r"way to clip: got 'l1'.*full_model.*CLIP_TYPE"):
        clip_gradients(cfg, [])
    cfg.SOLVER.OPTIMIZER = "Adamw"
    with pytest.raises(ValueError, match=r"no such optimizer: got 'Adamw'.*SGD, AdamW.*SOLVER.OPTIMIZER"):
        build_optimizer(cfg, nn.Linear(2, 2))


def test_adamw_takes_betas_and_decay(classifier_cfg):
    cfg = classifier_cfg("resnet18", "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BETAS", [0.8, 0.95], "SOLVER.BASE_LR", 1e-3)
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.AdamW
    assert all(g["betas"] == (0.8, 0.95) and g["lr"] == 1e-3 for g in optimizer.param_groups)


def test_frozen_parameters_are_left_out(classifier_cfg):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].requires_grad_(False)
    optimizer = build_optimizer(classifier_cfg(), net)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2
    assert all(g["weight_decay"] == 0.0 for g in optimizer.param_groups)


def test_warm_up_and_cosine_against_the_closed_form(classifier_cfg):
    cfg = classifier_cfg("resnet18", "SOLVER.MAX_ITER", 100, "SOLVER.WARMUP_ITERS", 10, "SOLVER.BASE_LR", 0.4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = build_schedule(cfg, optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    cosine = [0.4 * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    start, end = 0.4 * 0.01, cosine[10]
    warm = [start + (end - start) * i / 10 for i in range(10)]
    assert rates == pytest.approx(warm + cosine[10:], rel=1e-5)


def test_running_statistics_are_left_alone_on_one_rank():
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 2, 2))
    before = norm.running_mean.clone()
    average_running_statistics(norm)
    assert torch.equal(norm.running_mean, before) and before.abs().max() > 0
