"""ClsNet: one forward for tensors and dicts, one normalisation, losses only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch.nn import functional as F

from imgcls.modeling import ClsNet
from imgcls.structures import Batch


@pytest.fixture
def model(classifier_cfg):
    torch.manual_seed(0)
    return build_model(classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", 7)).eval()


def images(count=3, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def test_it_is_registered_and_its_keys_are_backbone_and_head(model):
    assert META_ARCH_REGISTRY.get("ClsNet") is ClsNet
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "head"}


def test_tensors_dicts_and_batches_give_the_same_logits(model):
    x = images()
    with torch.no_grad():
        from_tensor = model(x)
        from_dicts = model([{"image": image} for image in x])
        from_batch = model(Batch(x))
    assert from_tensor.shape == (3, 7)
    assert torch.equal(from_tensor, torch.stack([row["logits"] for row in from_dicts]))
    assert torch.equal(from_tensor, from_batch)


def test_evaluation_of_dicts_gives_scores_and_class(model):
    rows = model([{"image": image} for image in images()])
    for row in rows:
        assert set(row) == {"logits", "scores", "pred_class"}
        assert row["scores"].sum().item() == pytest.approx(1.0, abs=1e-5)
        assert row["pred_class"] == int(row["logits"].argmax())
        assert isinstance(row["pred_class"], int)


def test_training_returns_losses_and_nothing_else(model):
    model.train()
    losses = model(images(), torch.tensor([0, 1, 6]))
    assert list(losses) == ["loss_cls"] and losses["loss_cls"].dim() == 0 and losses["loss_cls"].requires_grad
    same = model([{"image": i, "label": y} for i, y in zip(images(), [0, 1, 6], strict=True)])
    assert torch.equal(losses["loss_cls"], same["loss_cls"])


def test_hard_soft_and_smoothed_targets_against_the_formula(classifier_cfg):
    overrides = ("MODEL.HEAD.NUM_CLASSES", 7, "MODEL.LOSS.LABEL_SMOOTHING", 0.1)
    net = build_model(classifier_cfg("mobilenet_v1_0.25", *overrides)).train()
    x, hard = images(), torch.tensor([0, 3, 6])
    logits = net.logits(x).detach()
    log_probabilities = logits - logits.exp().sum(dim=1, keepdim=True).log()
    smooth = torch.full((3, 7), 0.1 / 7)
    smooth[range(3), hard] += 0.9
    expected = -(smooth * log_probabilities).sum(dim=1).mean()
    assert net(x, hard)["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-4)
    one_hot = F.one_hot(hard, 7).float()
    assert net(x, one_hot)["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(net(x, hard.roll(1))["loss_cls"].item() - expected.item()) > 1e-6


def test_soft_labels_in_dicts(model):
    model.train()
    soft = torch.softmax(torch.randn(7), dim=0)
    loss = model([{"image": image, "label": soft} for image in images()])["loss_cls"]
    assert torch.equal(loss, model(images(), soft.repeat(3, 1))["loss_cls"])


def test_images_of_different_sizes_get_the_logits_they_would_get_alone(model):
    sizes = [(32, 32), (48, 40), (32, 32), (40, 48)]
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    with torch.no_grad():
        together = model([{"image": picture} for picture in pictures])
        for picture, row in zip(pictures, together, strict=True):
            alone = model([{"image": picture}])[0]["logits"]
            assert (row["logits"] - alone).abs().max() <= 1e-5 * alone.abs().max()
        padded = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
        padded[0, :, :40, :] = pictures[3]
        far = (model(padded)[0] - together[3]["logits"]).abs().max()
        assert far > 1e-3 * together[3]["logits"].abs().max()


def test_normalisation_is_that_of_the_contract_and_happens_once(model):
    x = images(2)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    by_hand = (x.float() - mean) / std
    assert (model.normalize(x) - by_hand).abs().max() < 1e-5
    with torch.no_grad():
        logits = model(x)
        assert (model(by_hand, normalized=True) - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert (model(x.flip(1)) - logits).abs().max() > 1e-3 * logits.abs().max()


def test_the_callers_images_are_left_alone(model):
    x = images().float()
    before = x.clone()
    with torch.no_grad():
        model(x)
    assert torch.equal(x, before)


def test_float_and_uint8_agree(model):
    with torch.no_grad():
        assert torch.equal(model(images()), model(images().float()))


@pytest.mark.parametrize("wrong", ["scaled", "normalised", "black"])
def test_a_float_batch_that_was_scaled_or_normalised_is_refused(model, wrong):
    x = images().float()
    batch = {"scaled": x / 255, "normalised": (x - 120) / 58, "black": torch.zeros(1, 3, 32, 32)}[wrong]
    with pytest.raises(ValueError, match=r"float images lie in .*expected RGB values in 0..255.*normalized=True"):
        model(batch)
    model(batch, normalized=True)


def test_a_float_batch_just_outside_the_suspicious_range_passes(model):
    model(torch.full((1, 3, 32, 32), 10.5))
    with pytest.raises(ValueError, match=r"0\.\.255"):
        model(torch.full((1, 3, 32, 32), 10.0))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(N, C, H, W\).*\(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), r"takes 3 channels.*\(1, 1, 32, 32\)"),
        (np.zeros((1, 3, 32, 32)), r"tensor .* or a list of dicts.*ndarray"),
        ([], r"tensor .* or a list of dicts.*list"),
        ([torch.zeros(3, 32, 32)], r"list of dicts.*list"),
    ],
)
def test_what_is_no_batch_is_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(inputs)


def test_training_without_targets_is_refused(model):
    model.train()
    with pytest.raises(ValueError, match=r"training needs targets.*label"):
        model(images())
    with pytest.raises(ValueError, match="training needs targets"):
        model([{"image": image} for image in images()])


def test_bgr_and_a_missing_number_of_classes_are_refused(classifier_cfg):
    with pytest.raises(ValueError, match=r"RGB only: got 'BGR'.*INPUT.FORMAT"):
        build_model(classifier_cfg("resnet18", "INPUT.FORMAT", "BGR", "MODEL.HEAD.NUM_CLASSES", 2))
    with pytest.raises(ValueError, match=r"number of classes is not set.*MODEL.HEAD.NUM_CLASSES"):
        build_model(classifier_cfg("resnet18"))


def test_channels_last_changes_nothing_but_the_order_in_memory(classifier_cfg):
    nets = []
    for flag in (False, True):
        torch.manual_seed(3)
        cfg = classifier_cfg("resnet18", "MODEL.HEAD.NUM_CLASSES", 7, "MODEL.CHANNELS_LAST", flag)
        nets.append(build_model(cfg).double().eval())
    seen = []
    nets[1].backbone.res2.register_forward_hook(
        lambda m, i, o: seen.append(o.is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        a, b = (net(images()) for net in nets)
    assert (a - b).abs().max() <= 1e-10 * a.abs().max() and seen == [True]


def test_dropout_drops_in_training_only(classifier_cfg):
    net = build_model(classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", 7, "MODEL.HEAD.DROPOUT", 0.5))
    features = torch.ones(1, 256, 2, 2)
    net.eval()
    assert torch.equal(net.head(features), net.head(features))
    net.train()
    assert not torch.equal(net.head(features), net.head(features))


def test_detectron2s_own_predictor_runs_it(classifier_cfg, model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "net.pth")
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.HEAD.NUM_CLASSES", 7, "MODEL.WEIGHTS", str(tmp_path / "net.pth"))
    cfg.DATASETS.TEST = ("digits_val",)
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 32
    bgr = images(1)[0].flip(0).permute(1, 2, 0).numpy()
    row = DefaultPredictor(cfg)(bgr)
    with torch.no_grad():
        assert torch.equal(row["logits"], model(images(1))[0])
