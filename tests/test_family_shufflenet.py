"""ShuffleNet and ShuffleNet V2: the papers' complexities, and the first against a slow reading of its figure 2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.modeling.backbones import shufflenet_v1, shufflenet_v2
from imgcls.transfer.parity import NEUTRAL, randomise


def build(variant, **options):
    family = family_of(variant)
    return family.build(family.variants[variant], **options)


def multiply_adds(network, x, **options):
    """Of all convolutions and linear layers, for one image."""
    counted = 0

    def count(module, _inputs, output):
        nonlocal counted
        counted += output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network.eval()(x, **options)
    return counted


# Table 1 of arXiv:1707.01083: channels of stage 2 and million multiply-adds at 224 pixels, which leave the FC out.
@pytest.mark.parametrize(
    ("groups", "stage2", "millions"), [(1, 144, 143), (2, 200, 140), (3, 240, 137), (4, 272, 133), (8, 384, 137)]
)
def test_v1_has_the_papers_channels_and_complexity(groups, stage2, millions):
    with torch.device("meta"):
        trunk = build(f"shufflenet_v1_g{groups}", out_features=["stem", "res2", "res3", "res4", "res5"])
        counted = multiply_adds(trunk, torch.zeros(1, 3, 224, 224))
    channels = [shape.channels for shape in trunk.output_shape().values()]
    assert channels == [24, 24, stage2, 2 * stage2, 4 * stage2]
    assert round(counted / 1e6) == millions


def test_twin_a_grouped_first_pointwise_in_stage_2_has_another_complexity():
    with torch.device("meta"):
        trunk = build("shufflenet_v1_g3", out_features=["res5"])
        unit, norm = trunk.res3.unit0, shufflenet_v1.NormFactory("BN")
        grouped = shufflenet_v1.ShuffleUnit(24, 240, groups=3, norm=norm, stride=2)
        assert (unit.pointwise1.groups, grouped.pointwise1.groups) == (1, 3)
        assert trunk.res4.unit0.pointwise1.groups == trunk.res3.unit1.pointwise1.groups == 3
        trunk.res3.unit0 = grouped
        assert round(multiply_adds(trunk, torch.zeros(1, 3, 224, 224)) / 1e6) != 137


def slow_v1(tensors: dict[str, Tensor], groups: int, x: Tensor, shuffle) -> Tensor:
    """Table 1 and figure 2 with a loop over the groups of every convolution and a list for the shuffle."""

    def conv_norm(x, name, groups=1, **options):
        kernels = tensors[f"{name}.weight"].chunk(groups)
        parts = [F.conv2d(part, kernel, **options) for part, kernel in zip(x.chunk(groups, 1), kernels, strict=True)]
        mean, var, weight, bias = (
            tensors[f"{name}.norm.{end}"].view(1, -1, 1, 1) for end in ("running_mean", "running_var", "weight", "bias")
        )
        return (torch.cat(parts, 1) - mean) / (var + 1e-5).sqrt() * weight + bias

    def unit(x, name, stride, first):
        y = conv_norm(x, f"{name}.pointwise1", first).clamp(min=0)
        y = torch.stack([y[:, channel] for channel in shuffle(y.shape[1], groups)], dim=1)
        y = conv_norm(y, f"{name}.depthwise", y.shape[1], stride=stride, padding=1)
        y = conv_norm(y, f"{name}.pointwise2", groups)
        if stride == 1:
            return (x + y).clamp(min=0)
        padded = F.pad(x, (1, 1, 1, 1))
        height, width = y.shape[2:]
        nine = [padded[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] for i in range(3) for j in range(3)]
        average = sum(part[:, :, :height, :width] for part in nine) / 9
        return torch.cat([average, y], 1).clamp(min=0)

    x = conv_norm(x, "stem.conv1", stride=2, padding=1).clamp(min=0)
    x = F.max_pool2d(x, 3, 2, 1)
    for name, repeats in (("res3", 4), ("res4", 8), ("res5", 4)):
        for index in range(repeats):
            first = 1 if (name, index) == ("res3", 0) else groups
            x = unit(x, f"{name}.unit{index}", 1 if index else 2, first)
    return x


def papers_shuffle(channels: int, groups: int) -> list[int]:
    """Section 3.1: channel i of the output is the (i mod g)-th group's channel i div g."""
    return [(index % groups) * (channels // groups) + index // groups for index in range(channels)]


def inverse_shuffle(channels: int, groups: int) -> list[int]:
    return papers_shuffle(channels, channels // groups)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_v1_is_the_papers_figure(groups):
    trunk = build(f"shufflenet_v1_g{groups}")
    randomise(trunk, 0)
    trunk = trunk.double().eval()
    x = torch.randn(2, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = trunk(x)["res5"]
        slow = slow_v1(trunk.state_dict(), groups, x, papers_shuffle)
        assert (ours - slow).abs().max() <= 1e-10 * slow.abs().max()
        wrong = slow_v1(trunk.state_dict(), groups, x, inverse_shuffle)
    # With one group there is nothing to shuffle.
    assert ((ours - wrong).abs().max() > 1e-3 * slow.abs().max()) == (groups > 1)


# Table 5 of arXiv:1807.11164, its last two lines: million multiply-adds at 224 pixels and million weights. The
# paper's multiply-adds are 1 to 1.5 % above what convolutions and FC have; torchvision publishes the latter.
@pytest.mark.parametrize(
    ("variant", "millions", "parameters"),
    [
        ("shufflenet_v2_x0_5", 41, 1.4),
        ("shufflenet_v2_x1_0", 146, 2.3),
        ("shufflenet_v2_x1_5", 299, 3.5),
        ("shufflenet_v2_x2_0", 591, 7.4),
    ],
)
def test_v2_has_the_papers_complexity(variant, millions, parameters):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant), 1000, NEUTRAL)
        counted = multiply_adds(net, torch.zeros(1, 3, 224, 224), normalized=True)
    assert 0.98 * millions <= counted / 1e6 <= millions
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == parameters


def test_v2_keeps_the_wide_convolution_in_the_head():
    with torch.device("meta"):
        net = make_classifier(Architecture("shufflenet_v2_x2_0"), 10, NEUTRAL)
    assert net.backbone.output_shape()["res5"].channels == 976
    assert tuple(net.head.conv.weight.shape) == (2048, 976, 1, 1) and net.head.fc.in_features == 2048


def test_v2_interleaves_as_concatenation_and_shuffle_do():
    a, b = torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)
    expected = torch.cat([a, b], 1)[:, papers_shuffle(12, 2)]
    assert torch.equal(shufflenet_v2.interleave(a, b), expected)
    assert not torch.equal(shufflenet_v2.interleave(b, a), expected)
