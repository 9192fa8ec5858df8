"""DenseNet: the paper's table, its rule for channels, and the two spellings of torchvision's tensors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imgcls.checkpoint import apply_key_rules
from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.modeling.backbones.densenet import DenseNetSpec, block_channels
from imgcls.transfer.parity import NEUTRAL, import_into, randomise
from imgcls.transfer.references import build_reference

FAMILY = family_of("densenet121")


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_the_depth_in_the_name_is_the_number_of_layers_with_weights(depth):
    with torch.device("meta"):
        net = make_classifier(Architecture(f"densenet{depth}"), 1000, NEUTRAL)
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules()) == depth


# torchvision publishes the numbers with its weights; section 4.4 speaks of a DenseNet-201 "with 20M parameters".
@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("densenet121", 7_978_856),
        ("densenet161", 28_681_000),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
    ],
)
def test_parameters_are_as_many_as_published(variant, parameters):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant), 1000, NEUTRAL)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("variant", FAMILY.variants)
def test_channels_are_the_references(variant):
    with torch.device("meta"):
        reference = build_reference("torchvision", variant, {})
    into = [getattr(reference.features, f"denseblock{i}").denselayer1.norm1.num_features for i in (1, 2, 3, 4)]
    out = [getattr(reference.features, f"transition{i}").norm.num_features for i in (1, 2, 3)]
    out.append(reference.classifier.in_features)
    assert block_channels(FAMILY.variants[variant]) == list(zip(into, out, strict=True))


def test_maps_at_224_pixels_are_the_papers():
    names = ["stem", "res2", "res3", "res4", "res5"]
    with torch.device("meta"):
        for variant, row in FAMILY.variants.items():
            trunk = FAMILY.build(row, out_features=names).eval()
            maps = trunk(torch.zeros(1, 3, 224, 224))
            assert [maps[name].shape[2] for name in names] == [56, 56, 28, 14, 7], variant
            assert [trunk.output_shape()[name].stride for name in names] == [4, 4, 8, 16, 32]


def slow_dense_block(tensors, x, prefix, layers):
    """Section 3, equation 2: every layer reads all maps before it."""

    def norm_relu(x, name):
        mean, var, weight, bias = (
            tensors[f"{name}.{kind}"].view(1, -1, 1, 1) for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    maps = [x]
    for number in range(1, layers + 1):
        name = f"{prefix}.layer{number}"
        hidden = F.conv2d(norm_relu(torch.cat(maps, dim=1), f"{name}.norm"), tensors[f"{name}.conv1.weight"])
        hidden = norm_relu(hidden, f"{name}.conv1.norm")
        maps.append(F.conv2d(hidden, tensors[f"{name}.conv2.weight"], padding=1))
    return torch.cat(maps, dim=1), norm_relu


@torch.no_grad()
def test_the_small_stem_is_a_3x3_convolution_without_pooling():
    """Against the formulas: no library has the network with ImageNet's four blocks and CIFAR's stem."""
    torch.manual_seed(0)
    row = DenseNetSpec(12, (2, 1, 1, 1))
    trunk = FAMILY.build(row, stem="small", out_features=["stem", "res2", "res3"]).double().eval()
    randomise(trunk, 1)
    tensors, image = trunk.state_dict(), torch.randn(1, 3, 17, 12, dtype=torch.float64)
    ours = trunk(image)
    slow, norm_relu = slow_dense_block(tensors, ours["stem"], "res2", 2)
    expected = {
        "stem": norm_relu(F.conv2d(image, tensors["stem.conv1.weight"], padding=1), "stem.conv1.norm"),
        "res2": slow,
    }
    x = F.conv2d(norm_relu(slow, "res3.transition.norm"), tensors["res3.transition.conv.weight"])
    x = x[:, :, :16].unflatten(2, (8, 2)).unflatten(4, (6, 2)).mean(dim=(3, 5))
    expected["res3"], _ = slow_dense_block(tensors, x, "res3", 1)
    assert tensors["stem.conv1.weight"].shape == (24, 3, 3, 3)
    for name, value in expected.items():
        assert (ours[name] - value).abs().max() <= 1e-10 * value.abs().max(), name
    trunk.res2.layer2.norm.eps = 1e-3
    wrong = trunk(image)["res2"]
    assert (wrong - expected["res2"]).abs().max() > 1e-6 * wrong.abs().max()


def test_torchvisions_files_with_the_older_names_are_taken():
    """Its networks say norm1, the files that it serves norm.1."""
    torch.manual_seed(0)
    source = FAMILY.sources["torchvision"]
    reference = build_reference("torchvision", "densenet121", {})
    tensors = reference.state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value for key, value in tensors.items()}
    assert set(older) & {"features.denseblock1.denselayer1.norm.1.weight"} and len(older) == len(tensors)
    ours = import_into("densenet121", source, older, classes=1000)
    expected = apply_key_rules(tensors, source.rules_for(None))
    assert torch.equal(ours.backbone.res4.layer3.conv1.norm.weight, expected["res4.layer3.conv1.norm.weight"])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = reference(images)
        assert (ours(images, normalized=True) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
