"""Darknet-19, Darknet-53, CSPDarknet53: the papers' operations and parameters, a slow Darknet-19, timm's dilation."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.checkpoint import apply_key_rules
from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.transfer.parity import NEUTRAL, randomise


def build(variant, **options):
    family = family_of(variant)
    return family.build(family.variants[variant], **options)


def billion_operations(net, size):
    """Two for each multiplication of convolutions and linear layers."""
    counted = 0

    def count(module, _inputs, output):
        nonlocal counted
        counted += 2 * output[0].numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    net.eval()(torch.zeros(1, 3, size, size), normalized=True)
    return counted / 1e9


# Darknet-19: arXiv:1612.08242, section 3, at 224 pixels, and arXiv:1804.02767, table 2, at 256. The others:
# arXiv:1911.11929, ImageNet table, at 256 (the table of 1804.02767 rounds Darknet-53 up to 18.7).
@pytest.mark.parametrize(
    ("variant", "size", "billions"),
    [("darknet19", 224, 5.58), ("darknet19", 256, 7.29), ("darknet53", 256, 18.57), ("cspdarknet53", 256, 13.07)],
)
def test_operations_are_the_papers(variant, size, billions):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant), 1000, NEUTRAL)
        assert round(billion_operations(net, size), 2) == billions


# arXiv:1911.11929, ImageNet table: million weights, those of BatchNorm left out.
@pytest.mark.parametrize(("variant", "millions"), [("darknet53", 41.57), ("cspdarknet53", 27.61)])
def test_parameters_are_the_papers(variant, millions):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant), 1000, NEUTRAL)
    weights = sum(p.numel() for name, p in net.named_parameters() if ".norm." not in name)
    assert round(weights / 1e6, 2) == millions


# arXiv:1612.08242, table 6, top to bottom: filters and size, or "pool".
TABLE_6 = (
    "32 3 pool 64 3 pool 128 3 64 1 128 3 pool 256 3 128 1 256 3 pool 512 3 256 1 512 3 256 1 512 3 pool "
    "1024 3 512 1 1024 3 512 1 1024 3"
)


def slow_darknet19(tensors: dict[str, Tensor], x: Tensor, slope: float = 0.1) -> Tensor:
    names = iter([name.removesuffix(".weight") for name, value in tensors.items() if value.dim() == 4])
    words = iter(TABLE_6.split())
    for word in words:
        if word == "pool":
            height, width = x.shape[2:]
            padded = F.pad(x, (0, width % 2, 0, height % 2), value=-torch.inf)
            x = torch.stack([padded[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
            continue
        name, kernel = next(names), int(next(words))
        assert tensors[f"{name}.weight"].shape[0] == int(word)
        x = F.conv2d(x, tensors[f"{name}.weight"], padding=kernel // 2)
        mean, var, weight, bias = (
            tensors[f"{name}.norm.{end}"].view(1, -1, 1, 1) for end in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        x = torch.where(x > 0, x, slope * x)
    assert next(names, None) is None
    return x


def test_darknet19_is_the_papers_table():
    trunk = build("darknet19")
    randomise(trunk, 0)
    trunk = trunk.double().eval()
    x = torch.randn(1, 3, 65, 34, dtype=torch.float64)
    with torch.no_grad():
        ours, slow = trunk(x)["res5"], slow_darknet19(trunk.state_dict(), x)
        assert (ours - slow).abs().max() <= 1e-10 * slow.abs().max()
        other = slow_darknet19(trunk.state_dict(), x, slope=0.01)
    assert (ours - other).abs().max() > 1e-3 * slow.abs().max()


def test_darknet19_ends_with_a_convolution_to_the_classes_and_the_mean():
    net = make_classifier(Architecture("darknet19"), 7, NEUTRAL).eval()
    x = torch.randn(1, 3, 33, 65)
    with torch.no_grad():
        scores = F.conv2d(net.backbone(x)["res5"], net.head.fc.weight, net.head.fc.bias)
        assert torch.allclose(net(x, normalized=True), scores.mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert scores.min() < 0  # no ReLU behind it


def filled_from(reference, variant):
    """``variant`` with the tensors of a timm Darknet; the family's rules are those of darknet53_timm."""
    trunk = build(variant).double().eval()
    family = family_of("darknet53_timm")
    mapped = apply_key_rules(reference.state_dict(), family.sources["timm"].rules_for(family.variants[variant]))
    trunk.load_state_dict({key: mapped[key] for key in trunk.state_dict()})
    return trunk


def largest_difference(trunk, reference, size=65):
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = trunk(x)["res5"], reference.forward_features(x)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_slope_tells_the_authors_darknet53_from_timms():
    authors = timm.create_model("darknet53", act_layer=partial(nn.LeakyReLU, negative_slope=0.1))
    timms = timm.create_model("darknet53")
    randomise(authors, 0)
    timms.load_state_dict(authors.state_dict())
    authors, timms = authors.double().eval(), timms.double().eval()
    for variant, same, other in (("darknet53", authors, timms), ("darknet53_timm", timms, authors)):
        trunk = filled_from(timms, variant)
        assert largest_difference(trunk, same) <= 1e-10
        assert largest_difference(trunk, other) > 1e-3


def test_published_weights_go_into_the_network_that_they_were_trained_in():
    names = family_of("darknet53").sources["timm"].names
    assert names == {"darknet53_timm": "darknet53", "cspdarknet53": "cspdarknet53"}


@pytest.mark.parametrize("variant", ["darknet53_timm", "cspdarknet53"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilation_is_timms(variant, output_stride):
    reference = timm.create_model(variant.removesuffix("_timm"), output_stride=output_stride)
    randomise(reference, 0)
    reference = reference.double().eval()
    trunk = filled_from(reference, variant)
    trunk.dilate_to(output_stride)
    assert trunk.output_shape()["res5"].stride == output_stride
    assert largest_difference(trunk, reference) <= 1e-10
