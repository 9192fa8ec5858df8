"""AlexNet: the network of 2012 against its paper read slowly, and where dropout stands in the other."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.structures import PreprocessingContract
from imgcls.transfer.parity import import_into

CONTRACT = PreprocessingContract("RGB", (0.0,) * 3, (1.0,) * 3, 224, 256, "bilinear")


def classifier(variant, classes=1000):
    return make_classifier(Architecture(variant, norm="none"), classes, CONTRACT)


def two_gpus(x, weight, bias):
    """Figure 2: each GPU's kernels see the maps on that GPU only."""
    padding = weight.shape[-1] // 2
    halves = [
        nn.functional.conv2d(maps, kernels, padding=padding)
        for maps, kernels in zip(x.chunk(2, dim=1), weight.chunk(2), strict=True)
    ]
    return torch.cat(halves, dim=1) + bias.view(1, -1, 1, 1)


def normalised_responses(a):
    """The formula of section 3.3, kernel by kernel."""
    k, n, alpha, beta = 2.0, 5, 1e-4, 0.75
    maps = a.shape[1]
    b = torch.empty_like(a)
    for i in range(maps):
        total = sum(a[:, j] ** 2 for j in range(max(0, i - n // 2), min(maps - 1, i + n // 2) + 1))
        b[:, i] = a[:, i] / (k + alpha * total) ** beta
    return b


def pooled_every_other_pixel(x):
    """Section 3.4 with s = 2 and z = 3, as the largest of nine shifted copies."""
    rows, columns = (math.floor((size - 3) / 2) + 1 for size in x.shape[2:])
    shifted = [x[:, :, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i in range(3) for j in range(3)]
    return torch.stack(shifted).amax(dim=0)


def slow_alexnet_of_2012(tensors, x):
    def of(name):
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    weight, bias = of("backbone.res2.conv1")
    x = nn.functional.conv2d(x, weight, bias, stride=4, padding=2).clamp(min=0)
    x = pooled_every_other_pixel(normalised_responses(x))
    x = two_gpus(x, *of("backbone.res3.conv2")).clamp(min=0)
    x = pooled_every_other_pixel(normalised_responses(x))
    x = nn.functional.conv2d(x, *of("backbone.res4.conv3"), padding=1).clamp(min=0)
    x = two_gpus(x, *of("backbone.res4.conv4")).clamp(min=0)
    x = two_gpus(x, *of("backbone.res4.conv5")).clamp(min=0)
    x = pooled_every_other_pixel(x)
    assert x.shape[1:] == (256, 6, 6)
    x = x.flatten(1)
    for name in ("head.fc1", "head.fc2"):
        weight, bias = of(name)
        x = (x @ weight.T + bias).clamp(min=0)
    weight, bias = of("head.fc")
    return x @ weight.T + bias


def largest_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_the_network_of_2012_is_its_paper_read_slowly():
    torch.manual_seed(0)
    net = classifier("alexnet_paper", 10).double().eval()
    # Images of deviation 100: on small ones normalising responses is dividing by a constant.
    x = 100 * torch.randn(1, 3, 224, 224, dtype=torch.float64)
    slow = slow_alexnet_of_2012(net.state_dict(), x)
    assert largest_difference(net(x, normalized=True), slow) <= 1e-10
    # torch's alpha is the paper's times n: taking it for the paper's own is noticed, and so are kernels on a wrong GPU.
    net.backbone.res3.responses.alpha /= 5
    assert largest_difference(net(x, normalized=True), slow) > 1e-3
    net.backbone.res3.responses.alpha *= 5
    conv4 = net.backbone.res4.conv4.weight
    conv4.copy_(conv4.roll(192, dims=0))
    assert largest_difference(net(x, normalized=True), slow) > 1e-3


def test_the_network_of_2012_has_as_many_parameters_as_caffes():
    with torch.device("meta"):
        net = classifier("alexnet_paper")
    assert sum(p.numel() for p in net.parameters()) == 60_965_224


def test_the_network_of_2012_has_the_layers_of_figure_2():
    family = family_of("alexnet_paper")
    with torch.device("meta"):
        names = ["res2", "res3", "res4", "res5"]
        trunk = family.build(family.variants["alexnet_paper"], out_features=names)
        maps = trunk(torch.zeros(1, 3, 224, 224))
    assert [tuple(maps[name].shape[1:]) for name in names[:3]] == [(96, 55, 55), (256, 27, 27), (256, 13, 13)]
    assert [trunk.output_shape()[name].stride for name in names] == [4, 8, 16, 32]


def test_the_network_of_2012_starts_as_section_5_says():
    net = classifier("alexnet_paper", 10)
    biases = {name: tensor for name, tensor in net.named_parameters() if name.endswith(".bias")}
    ones = {name for name, bias in biases.items() if (bias == 1).all()}
    assert ones == {
        *("backbone.res3.conv2.bias", "backbone.res4.conv4.bias", "backbone.res4.conv5.bias"),
        *("head.fc1.bias", "head.fc2.bias"),
    }
    assert all((bias == 0).all() for name, bias in biases.items() if name not in ones)
    weights = [tensor for name, tensor in net.named_parameters() if name.endswith(".weight")]
    assert len(weights) == 8 and all(abs(w.std().item() - 0.01) < 5e-4 for w in weights)


@torch.no_grad()
def test_dropout_stands_where_torchvision_has_it():
    torch.manual_seed(0)
    reference = torchvision.models.alexnet(num_classes=1000)
    ours = import_into("alexnet", family_of("alexnet").sources["torchvision"], reference.state_dict(), classes=1000)
    # 64 pixels end in one pixel, which becomes a grid of 6x6: dropout before that would be another thing.
    x = torch.randn(4, 3, 64, 64)
    features = ours.backbone(x)["res5"]
    logits = []
    for network, argument in ((ours.head.train(), features), (reference.train(), x)):
        torch.manual_seed(7)
        logits.append(network(argument))
    assert largest_difference(*logits) <= 1e-5
    ours.head.dropout_first = False
    torch.manual_seed(7)
    assert largest_difference(ours.head(features), logits[1]) > 1e-2


@pytest.mark.parametrize(("variant", "first"), [("alexnet", True), ("alexnet_paper", False)])
def test_dropout_of_the_variants(variant, first):
    with torch.device("meta"):
        head = classifier(variant).head
    assert head.dropout_first is first and head.dropout.p == 0.5
