"""The losses against their papers' formulas, one number after another in Python floats, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from imgcls.config import add_imgcls_config
from imgcls.modeling import LOSS_REGISTRY, build_loss
from imgcls.modeling.losses import BCE, Asymmetric, CrossEntropy, SigmoidFocal, SoftmaxFocal, check_loss

N, K = 6, 5
WEIGHTS = [0.2, 1.0, 3.0, 0.7, 1.3]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def slow_ce(logits, targets, smoothing=0.0, weights=None):
    weights, total, norm = weights or [1.0] * K, 0.0, 0.0
    for row, target in zip(logits, targets, strict=True):
        for w, p, t in zip(weights, softmax(row), target, strict=True):
            total -= w * (t * (1 - smoothing) + smoothing / K) * math.log(p)
            norm += w * t
    return total / norm


def slow_softmax_focal(logits, targets, gamma, weights=None):
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for w, p, t in zip(weights or [1.0] * K, softmax(row), target, strict=True):
            total -= w * t * (1 - p) ** gamma * math.log(p)
    return total / len(logits)


def slow_bce(logits, targets, smoothing=0.0, weights=None):
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for w, x, t in zip(weights or [1.0] * K, row, target, strict=True):
            t = t * (1 - smoothing) + smoothing / K
            total -= w * t * math.log(sigmoid(x)) + (1 - t) * math.log(1 - sigmoid(x))
    return total / (len(logits) * K)


def slow_sigmoid_focal(logits, targets, gamma, alpha):
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for x, t in zip(row, target, strict=True):
            p_t, alpha_t = (sigmoid(x), alpha) if t else (1 - sigmoid(x), 1 - alpha)
            total -= alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    return total / len(logits)


def slow_asymmetric(logits, targets, gamma_pos, gamma_neg, clip):
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for x, t in zip(row, target, strict=True):
            p_m = max(sigmoid(x) - clip, 0.0)
            total -= (1 - sigmoid(x)) ** gamma_pos * math.log(sigmoid(x)) if t else p_m**gamma_neg * math.log(1 - p_m)
    return total / len(logits)


CASES = {
    "ce": (CrossEntropy(), slow_ce),
    "ce smoothed": (CrossEntropy(0.1), lambda x, y: slow_ce(x, y, 0.1)),
    "ce weighted": (CrossEntropy(0.1, WEIGHTS), lambda x, y: slow_ce(x, y, 0.1, WEIGHTS)),
    "softmax focal": (SoftmaxFocal(), lambda x, y: slow_softmax_focal(x, y, 2.0)),
    "softmax focal weighted": (SoftmaxFocal(0.5, WEIGHTS), lambda x, y: slow_softmax_focal(x, y, 0.5, WEIGHTS)),
    "bce": (BCE(), slow_bce),
    "bce smoothed weighted": (BCE(0.1, WEIGHTS), lambda x, y: slow_bce(x, y, 0.1, WEIGHTS)),
    "focal": (SigmoidFocal(), lambda x, y: slow_sigmoid_focal(x, y, 2.0, 0.25)),
    "focal 0.5": (SigmoidFocal(0.5, 0.6), lambda x, y: slow_sigmoid_focal(x, y, 0.5, 0.6)),
    "asymmetric": (Asymmetric(), lambda x, y: slow_asymmetric(x, y, 0.0, 4.0, 0.05)),
    "asymmetric unclipped": (Asymmetric(1.0, 3.0, 0.0), lambda x, y: slow_asymmetric(x, y, 1.0, 3.0, 0.0)),
}
OF_ONE = [name for name in CASES if name.startswith(("ce", "softmax"))]


def examples(name, seed=0):
    """Logits, and targets as vectors: one class a row for losses through a softmax, any number for the others."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, K, generator=generator, dtype=torch.float64)
    if name in OF_ONE:
        return logits, F.one_hot(torch.randint(0, K, (N,), generator=generator), K).double()
    targets = (torch.rand(N, K, generator=generator) < 0.4).double()
    assert targets[0].sum() != 1 or targets[1].sum() != 1
    return logits, targets


def value_of(loss, logits, targets):
    (value,) = loss.double()(logits, targets).values()
    return value


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_the_papers(name):
    loss, slow = CASES[name]
    logits, targets = examples(name)
    expected = slow(logits.tolist(), targets.tolist())
    assert value_of(loss, logits, targets).item() == pytest.approx(expected, rel=1e-6)
    assert value_of(loss, -logits, targets).item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_papers_formula(name):
    """Central differences of the slow formula; away from the corner at p = clip they are exact to 1e-8."""
    loss, slow = CASES[name]
    logits, targets = examples(name, seed=1)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(value_of(loss, logits, targets), logits)
    step = 1e-5
    for i in range(N):
        for k in range(K):
            moved = [logits.detach().clone(), logits.detach().clone()]
            moved[0][i, k] += step
            moved[1][i, k] -= step
            up, down = (slow(one.tolist(), targets.tolist()) for one in moved)
            assert gradient[i, k].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_extreme_logits_give_finite_values_and_gradients(name, size):
    loss, _ = CASES[name]
    for seed in range(3):
        logits, targets = examples(name, seed)
        logits = (logits.sign() * size).float().requires_grad_()
        (value,) = loss.float()(logits, targets.float()).values()
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_logits_are_taken_in_full_precision(name, dtype):
    loss, _ = CASES[name]
    logits, targets = examples(name)
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        (value,) = loss.float()(logits, targets.to(dtype)).values()
    (exact,) = loss.float()(logits.float(), targets.float()).values()
    assert value.dtype == torch.float32 and torch.equal(value, exact)


@pytest.mark.parametrize("name", CASES)
def test_an_index_is_the_vector_with_a_single_one(name):
    loss, _ = CASES[name]
    logits, _ = examples(name)
    labels = torch.arange(N) % K
    hard, soft = value_of(loss, logits, labels), value_of(loss, logits, F.one_hot(labels, K).double())
    assert hard.item() == pytest.approx(soft.item(), rel=1e-12)
    assert hard.item() != pytest.approx(value_of(loss, logits, labels.roll(1)).item(), rel=1e-3)


def test_mixed_targets_are_the_mix_of_the_losses():
    """Cross-entropy and BCE are linear in the targets, which is what mixup relies on (Zhang et al. 2018)."""
    for loss in (CrossEntropy(0.1), BCE(0.1, WEIGHTS)):
        logits, _ = examples("ce")
        a, b = (F.one_hot(torch.arange(N).roll(shift) % K, K).double() for shift in (0, 1))
        expected = 0.3 * value_of(loss, logits, a) + 0.7 * value_of(loss, logits, b)
        assert value_of(loss, logits, 0.3 * a + 0.7 * b).item() == pytest.approx(expected.item(), rel=1e-12)


def test_both_classes_of_a_mixed_picture_are_there_for_a_threshold():
    """The rows of a CutMix whose boxes cover 0, 0.1, 0.2, 0.5, 0.7 and 0.9: below the threshold nobody is."""
    logits, _ = examples("bce")
    a, b = (F.one_hot(torch.arange(N).roll(shift) % K, K).double() for shift in (0, 1))
    share = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.7, 0.9], dtype=torch.float64)[:, None]
    mixed, there = (1 - share) * a + share * b, a.clone()
    there[3:5] = a[3:5] + b[3:5]
    there[5] = b[5]
    expected = slow_bce(logits.tolist(), there.tolist(), 0.1)
    assert value_of(BCE(0.1, (), 0.2), logits, mixed).item() == pytest.approx(expected, rel=1e-9)
    assert value_of(BCE(0.1), logits, mixed).item() != pytest.approx(expected, rel=1e-3)
    timms = pytest.importorskip("timm.loss").BinaryCrossEntropy(target_threshold=0.2)(logits, mixed)
    assert value_of(BCE(0.0, (), 0.2), logits, mixed).item() == pytest.approx(timms.item(), rel=1e-9)
    labels = torch.arange(N) % K  # no picture is mixed: nothing to decide
    assert torch.equal(value_of(BCE(0.0, (), 0.2), logits, labels), value_of(BCE(), logits, labels))


def test_torch_and_torchvision_agree():
    logits, targets = examples("bce")
    labels, weights = torch.arange(N) % K, torch.tensor(WEIGHTS, dtype=torch.float64)
    theirs = F.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1)
    assert value_of(CrossEntropy(0.1, WEIGHTS), logits, labels).item() == pytest.approx(theirs.item(), rel=1e-6)
    theirs = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    assert value_of(BCE(0.0, WEIGHTS), logits, targets).item() == pytest.approx(theirs.item(), rel=1e-6)
    for alpha in (0.25, -1):
        theirs = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=2.0).sum() / N
        assert value_of(SigmoidFocal(2.0, alpha), logits, targets).item() == pytest.approx(theirs.item(), rel=1e-9)


def test_special_cases_of_the_asymmetric_loss():
    logits, targets = examples("asymmetric")
    bce = K * value_of(BCE(), logits, targets)
    assert value_of(Asymmetric(0.0, 0.0, 0.0), logits, targets).item() == pytest.approx(bce.item(), rel=1e-12)
    focal = value_of(SigmoidFocal(2.0, -1.0), logits, targets)
    assert value_of(Asymmetric(2.0, 2.0, 0.0), logits, targets).item() == pytest.approx(focal.item(), rel=1e-12)
    easy = torch.full((1, K), math.log(0.04 / 0.96), dtype=torch.float64, requires_grad=True)
    value = value_of(Asymmetric(), easy, torch.zeros(1, K))
    (gradient,) = torch.autograd.grad(value, easy)
    assert value.item() == 0.0 and not gradient.any()  # below the clip


@pytest.mark.parametrize("name", CASES)
def test_targets_of_another_number_of_classes_are_refused(name):
    with pytest.raises(ValueError, match=rf"targets have the shape \(6, 4\), the logits \(6, {K}\)"):
        CASES[name][0](torch.zeros(N, K), torch.zeros(N, 4))


def test_weights_move_with_the_network_and_are_in_no_checkpoint():
    for loss in (CrossEntropy(0.0, WEIGHTS), BCE(0.0, WEIGHTS), SoftmaxFocal(2.0, WEIGHTS)):
        assert not loss.state_dict() and len(list(loss.buffers())) == 1
        assert next(loss.double().buffers()).dtype == torch.float64


# ------------------------------------------------------------------------------------------------- from the config


def config(**keys) -> CfgNode:
    cfg = add_imgcls_config(get_cfg())
    cfg.MODEL.META_ARCHITECTURE = "ClsNet"
    for key, value in keys.items():
        cfg.MODEL.LOSS[key] = value
    return cfg


def test_the_losses_are_these():
    assert {name for name, _ in LOSS_REGISTRY} >= {"CrossEntropy", "SoftmaxFocal", "BCE", "SigmoidFocal", "Asymmetric"}


def test_each_loss_takes_the_keys_that_it_names():
    loss = build_loss(config(NAME="Asymmetric", GAMMA_POS=1.0, GAMMA_NEG=3.0, CLIP=0.1).MODEL.LOSS)
    assert (type(loss), loss.gamma_pos, loss.gamma_neg, loss.clip) == (Asymmetric, 1.0, 3.0, 0.1)
    loss = build_loss(config(NAME="SigmoidFocal", GAMMA=1.5, ALPHA=-1.0).MODEL.LOSS)
    assert (type(loss), loss.gamma, loss.alpha) == (SigmoidFocal, 1.5, -1.0)
    loss = build_loss(config(NAME="SoftmaxFocal", GAMMA=1.5, CLASS_WEIGHTS=WEIGHTS).MODEL.LOSS)
    assert (type(loss), loss.gamma, loss.class_weights.tolist()) == (SoftmaxFocal, 1.5, pytest.approx(WEIGHTS))
    node = config(NAME="BCE", LABEL_SMOOTHING=0.1, POS_WEIGHTS=WEIGHTS, TARGET_THRESHOLD=0.2).MODEL.LOSS
    loss = build_loss(node)
    assert (type(loss), loss.label_smoothing, loss.pos_weights.tolist()) == (BCE, 0.1, pytest.approx(WEIGHTS))
    assert loss.target_threshold == 0.2
    loss = build_loss(config().MODEL.LOSS)
    assert (type(loss), loss.label_smoothing, loss.class_weights) == (CrossEntropy, 0.0, None)


def test_the_defaults_of_the_keys_are_those_of_the_constructors():
    node = config().MODEL.LOSS
    for name, kind in LOSS_REGISTRY:
        node.NAME = name
        ours, theirs = (
            {key: value for key, value in vars(loss).items() if key[0] != "_"} for loss in (build_loss(node), kind())
        )
        assert ours == theirs


def test_an_unknown_loss_and_a_key_that_it_does_not_read_are_problems():
    (problem,) = check_loss(config(NAME="Focal"))
    assert "no such loss: got 'Focal'; allowed: CrossEntropy, SoftmaxFocal, BCE" in str(problem)
    (problem,) = check_loss(config(NAME="Asymmetric", LABEL_SMOOTHING=0.1))
    assert str(problem) == (
        "Asymmetric does not read this key: got 0.1; allowed: 0.0, its default; change MODEL.LOSS.LABEL_SMOOTHING"
    )
    (problem,) = check_loss(config(POS_WEIGHTS=["balanced"]))
    assert problem.key == "MODEL.LOSS.POS_WEIGHTS"
    assert check_loss(config(NAME="BCE", POS_WEIGHTS=["balanced"])) == []


def test_weights_that_nobody_has_counted_are_refused():
    with pytest.raises(ValueError, match=r"not counted yet: got \['balanced'\].*MODEL.LOSS.CLASS_WEIGHTS"):
        build_loss(config(CLASS_WEIGHTS=["balanced"]).MODEL.LOSS)
