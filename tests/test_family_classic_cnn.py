"""The classic CNN against a slow reference: no library has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imgcls.modeling import Architecture, make_classifier, make_trunk
from imgcls.structures import PreprocessingContract
from imgcls.transfer.parity import randomise

CONTRACT = PreprocessingContract("RGB", (0.0,) * 3, (1.0,) * 3, 32, 32, "bilinear")
STAGES = ["stem", "res2", "res3", "res4"]


def slow_convolution(x, kernels):
    """3x3, zeros around the image: a sum over the nine places of the kernel."""
    height, width = x.shape[2:]
    padded = torch.zeros(*x.shape[:2], height + 2, width + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    places = [(i, j) for i in range(3) for j in range(3)]
    return sum(
        torch.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], kernels[:, :, i, j])
        for i, j in places
    )


def slow_pooling(x):
    """The largest of each 2x2 pixels; at an odd border of those that are there."""
    rows = [x[:, :, i : i + 2].amax(dim=2) for i in range(0, x.shape[2], 2)]
    x = torch.stack(rows, dim=2)
    columns = [x[:, :, :, j : j + 2].amax(dim=3) for j in range(0, x.shape[3], 2)]
    return torch.stack(columns, dim=3)


def slow_classic_cnn(tensors, x):
    """Eight convolutions in four blocks, then three fully connected layers, without dropout."""
    for stage in STAGES:
        for conv in ("conv1", "conv2"):
            prefix = f"backbone.{stage}.{conv}"
            x = slow_convolution(x, tensors[f"{prefix}.weight"])
            mean, var, weight, bias = (
                tensors[f"{prefix}.norm.{name}"].view(1, -1, 1, 1)
                for name in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)
        x = slow_pooling(x)
    # The grid that hidden layers read is 2x2: the four quarters of the map, which share the middle of an odd one.
    height, width = x.shape[2:]
    top, bottom = x[:, :, : (height + 1) // 2], x[:, :, height // 2 :]
    quarters = [
        part.mean(dim=(2, 3))
        for half in (top, bottom)
        for part in (half[..., : (width + 1) // 2], half[..., width // 2 :])
    ]
    x = torch.stack(quarters, dim=2).flatten(1)
    for name in ("head.fc1", "head.fc2"):
        x = (x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]).clamp(min=0)
    return x @ tensors["head.fc.weight"].T + tensors["head.fc.bias"]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (45, 81)])
def test_it_is_what_its_description_says(size):
    torch.manual_seed(0)
    net = make_classifier(Architecture("classic_cnn_8"), 10, CONTRACT)
    randomise(net, 0)
    net = net.double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    slow = slow_classic_cnn(net.state_dict(), x)
    assert (net(x, normalized=True) - slow).abs().max() <= 1e-10 * slow.abs().max()
    net.backbone.res3.conv2.norm.eps = 1e-3
    assert (net(x, normalized=True) - slow).abs().max() > 1e-5 * slow.abs().max()


@pytest.mark.parametrize("nf", [8, 16, 32, 64])
def test_filters_are_multiples_of_the_number_in_the_name(nf):
    with torch.device("meta"):
        net = make_classifier(Architecture(f"classic_cnn_{nf}"), 10, CONTRACT)
    filters = [module.out_channels for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert filters == [nf * multiple for multiple in (1, 2, 4, 4, 8, 8, 16, 16)]
    assert [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)] == [
        *((64 * nf, 32 * nf), (32 * nf, 32 * nf), (32 * nf, 10))
    ]


@torch.no_grad()
def test_every_block_drops_a_quarter_in_training_and_nothing_in_evaluation():
    torch.manual_seed(0)
    trunk = make_trunk(Architecture("classic_cnn_16", norm="FrozenBN"))
    x = torch.randn(4, 3, 32, 32)
    for stage in (getattr(trunk, name) for name in STAGES):
        whole, dropped = stage.eval()(x), stage.train()(x)
        alive = whole > 0
        kept = dropped[alive] != 0
        assert abs(1 - kept.float().mean().item() - 0.25) < 0.03
        torch.testing.assert_close(dropped[alive][kept], whole[alive][kept] / 0.75)
        x = whole
