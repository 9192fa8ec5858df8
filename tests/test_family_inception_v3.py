"""Inception v3: the paper's sizes, its auxiliary head, and torchvision's way of training and normalising it."""

from __future__ import annotations

import torch
from detectron2.modeling import build_model
from torch import nn

from imgcls.checkpoint import write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.transfer import convert, read_handover
from imgcls.transfer.parity import NEUTRAL, import_into, randomise
from imgcls.transfer.references import build_reference


def torchvisions(**options):
    torch.manual_seed(0)
    source = family_of("inception_v3").sources["torchvision"]
    reference = build_reference("torchvision", "inception_v3", {**source.options, **options})
    randomise(reference, 1)
    for module in reference.modules():
        # Of torchvision's own initial weights (init_weights=False) logits come that hardly depend on the image (1e-8).
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    ours = import_into("inception_v3", source, reference.state_dict(), classes=1000)
    return reference.double(), ours.double()


def training_without_chance(net):
    net.train()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return net


def test_maps_of_299_pixels_are_the_papers():
    """Table 1's sizes, and the channels of its last three rows; 71x71 has 192 channels as in the release."""
    names = ["stem", "res2", "res3", "res4", "res5"]
    family = family_of("inception_v3")
    with torch.device("meta"):
        trunk = family.build(family.variants["inception_v3"], out_features=names).eval()
        reduced = []
        trunk.res5.mixed7a.register_forward_hook(lambda _m, _i, out: reduced.append(tuple(out.shape[1:])))
        maps = trunk(torch.zeros(1, 3, 299, 299))
    assert [tuple(maps[name].shape[1:]) for name in names] == [
        (64, 147, 147),
        (192, 71, 71),
        (288, 35, 35),
        (768, 17, 17),
        (2048, 8, 8),
    ]
    assert reduced == [(1280, 8, 8)]
    assert [trunk.output_shape()[name].stride for name in names] == [2, 4, 8, 16, 32]


def test_parameters_are_as_many_as_published():
    """Without auxiliary head "less than 25 million" (abstract); with it the number that torchvision publishes."""
    with torch.device("meta"):
        plain, whole = (make_classifier(Architecture("inception_v3"), 1000, NEUTRAL, auxiliary=a) for a in (0, 1))
    assert sum(p.numel() for p in plain.parameters()) < 25e6
    assert sum(p.numel() for p in whole.parameters()) == 27_161_264


def test_multiply_adds_are_as_many_as_published():
    """The abstract's 5 billion; torchvision publishes 5.713."""
    counted = 0

    def count(module, _inputs, output):
        nonlocal counted
        counted += output[0].numel() * module.weight[0].numel()

    with torch.device("meta"):
        net = make_classifier(Architecture("inception_v3"), 1000, NEUTRAL).eval()
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        net.head(net.backbone(torch.zeros(1, 3, 299, 299))["res5"])
    assert abs(counted / 1e9 - 5.713) < 0.001


@torch.no_grad()
def test_auxiliary_logits_equal_torchvisions():
    """At 299 pixels, the smallest size at which the reference's auxiliary head works."""
    reference, ours = torchvisions()
    training_without_chance(reference)
    training_without_chance(ours)
    x = torch.randn(1, 3, 299, 299, dtype=torch.float64)
    theirs, logits = reference(x), ours._all_logits(x, True)
    assert set(logits) == {"", "res4"}
    for name, expected in (("", theirs.logits), ("res4", theirs.aux_logits)):
        assert (logits[name] - expected).abs().max() <= 1e-10 * expected.abs().max()
    ours.head.auxiliary["res4"].reduce.weight.mul_(1.01)
    changed = ours._all_logits(x, True)["res4"]
    assert (changed - theirs.aux_logits).abs().max() > 1e-6 * theirs.aux_logits.abs().max()


@torch.no_grad()
def test_transform_input_is_another_mean_and_std():
    reference, ours = torchvisions(transform_input=True)
    reference.eval()
    pixels = torch.randint(0, 256, (2, 3, 97, 97)).double()
    mean = torch.tensor((0.485, 0.456, 0.406), dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), dtype=torch.float64).view(3, 1, 1)
    imagenet = (pixels / 255 - mean) / std
    theirs = reference(imagenet)
    difference = (ours((pixels - 127.5) / 127.5, normalized=True) - theirs).abs().max() / theirs.abs().max()
    assert difference <= 1e-10
    assert (ours(imagenet, normalized=True) - theirs).abs().max() > 1e-3 * theirs.abs().max()


def test_it_trains_at_the_smallest_size_and_is_handed_over_without_auxiliary_head(classifier_cfg, tmp_path):
    size = ("INPUT.TRAIN_SIZE", 75, "INPUT.TEST_SIZE", 75)
    run = Run(*finalize(classifier_cfg("inception_v3", *size)))
    images = torch.randint(0, 256, (4, 3, 75, 75), dtype=torch.uint8)
    losses = run.model.train()(images, torch.tensor([0, 1, 2, 3]))
    assert set(losses) == {"loss_cls", "loss_cls_res4"}
    sum(losses.values()).backward()
    for name, parameter in run.model.head.auxiliary.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name
    write_checkpoint(tmp_path / "model.pth", run.checkpoint(0), iteration=0)
    convert(tmp_path / "model.pth", tmp_path / "backbone.pth")
    weights = read_handover(tmp_path / "backbone.pth").weights
    wanted = {key for key in run.model.backbone.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(weights) == wanted and any("auxiliary" in key for key in run.model.state_dict())


def test_auxiliary_weight_zero_leaves_the_head_out(classifier_cfg):
    cfg = classifier_cfg("inception_v3", "MODEL.HEAD.NUM_CLASSES", 10, "MODEL.HEAD.AUX_WEIGHT", 0.0)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        net = build_model(cfg)
    assert not hasattr(net.head, "auxiliary") and list(net.backbone.output_shape()) == ["res5"]
