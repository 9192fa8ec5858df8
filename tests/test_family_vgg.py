"""VGG: the paper's parameter counts, the biases that BatchNorm makes idle, and the dense form of the hidden layers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from imgcls.checkpoint import load_weights
from imgcls.modeling import Architecture, family_of, make_classifier, make_trunk
from imgcls.modeling.heads import HiddenLayersHead, make_head
from imgcls.structures import PreprocessingContract
from imgcls.transfer.parity import import_into

CONTRACT = PreprocessingContract("RGB", (0.0,) * 3, (1.0,) * 3, 224, 256, "bilinear")

# Biases of convolutions that BatchNorm follows: it subtracts the mean over the batch, and the bias with it.
WITHOUT_GRADIENT = {
    "stem.conv1.bias",
    "res2.conv1.bias",
    "res3.conv1.bias",
    "res3.conv2.bias",
    "res4.conv1.bias",
    "res4.conv2.bias",
    "res5.conv1.bias",
    "res5.conv2.bias",
}


def largest_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Table 2: million parameters.
@pytest.mark.parametrize(("variant", "millions"), [("vgg11", 133), ("vgg13", 133), ("vgg16", 138), ("vgg19", 144)])
def test_parameters_of_the_papers_table_2(variant, millions):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant, norm="none"), 1000, CONTRACT)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("variant", "norm", "idle"),
    [
        ("vgg11_bn", "BN", WITHOUT_GRADIENT),
        ("vgg11_bn", "FrozenBN", set()),
        ("vgg11_bn", "GN", set()),
        ("vgg11", "none", set()),
    ],
)
def test_biases_before_batch_norm_get_no_gradient_and_others_do(variant, norm, idle):
    torch.manual_seed(0)
    trunk = make_trunk(Architecture(variant, norm=norm)).double().train()
    trunk(torch.randn(2, 3, 64, 64, dtype=torch.float64))["res5"].square().sum().backward()
    assert {name for name, p in trunk.named_parameters() if p.grad.abs().max() < 1e-9} == idle


@pytest.fixture(scope="module")
def heads():
    """The head of vgg11 over its map in both forms, with the same weights, in fp64."""
    torch.manual_seed(0)
    family, shapes = family_of("vgg11"), make_trunk(Architecture("vgg11", norm="none")).output_shape()
    row = family.variants["vgg11"]
    plain = make_head("auto", family, row, shapes, 10, norm="none").double().eval()
    with torch.device("meta"):
        dense = make_head("dense", family, row, shapes, 10, norm="none").eval()
    dense.load_state_dict(plain.state_dict(), assign=True)
    return plain, dense


@torch.no_grad()
def test_both_forms_of_the_head_are_equal_on_the_papers_images(heads):
    trunk = make_trunk(Architecture("vgg11", norm="none")).double().eval()
    features = trunk(torch.randn(1, 3, 224, 224, dtype=torch.float64))["res5"]
    assert features.shape[1:] == (512, 7, 7)
    plain, dense = heads
    assert largest_difference(dense(features), plain(features)) <= 1e-10
    # With the pixels of the grid in another order the kernels would be others.
    assert largest_difference(dense(features.transpose(2, 3)), plain(features)) > 1e-3


@torch.no_grad()
def test_the_dense_head_is_the_mean_over_all_windows(heads):
    plain, dense = heads
    features = torch.rand(2, 512, 8, 10, dtype=torch.float64)
    windows = [plain(features[:, :, i : i + 7, j : j + 7]) for i in range(2) for j in range(4)]
    slow = torch.stack(windows).mean(dim=0)
    assert largest_difference(dense(features), slow) <= 1e-10
    # The plain head shrinks the map instead, which is another thing.
    assert largest_difference(plain(features), slow) > 1e-3


def test_the_dense_head_needs_a_whole_window():
    with pytest.raises(ValueError, match=r"at least 7x7; got \(6, 8\).*larger images, or MODEL.HEAD.NAME auto"):
        HiddenLayersHead(4, 3, grid=7, width=5, dense=True)(torch.zeros(1, 4, 6, 8))


@torch.no_grad()
def test_a_trained_classifier_is_evaluated_densely_by_config(classifier_cfg):
    cfg = classifier_cfg("classic_cnn_8", "MODEL.HEAD.NUM_CLASSES", 7)
    trained = build_model(cfg).eval()
    cfg.merge_from_list(["MODEL.HEAD.NAME", "dense"])
    dense = build_model(cfg).eval()
    load_weights(dense, trained.state_dict()).require_complete("the test", "")
    small, large = torch.rand(2, 3, 32, 32) * 255, torch.rand(2, 3, 64, 64) * 255
    assert largest_difference(dense(small), trained(small)) <= 1e-5
    assert largest_difference(dense(large), trained(large)) > 1e-3


def test_families_without_hidden_layers_refuse_the_dense_head(classifier_cfg):
    cfg = classifier_cfg("resnet18", "MODEL.HEAD.NUM_CLASSES", 7, "MODEL.HEAD.NAME", "dense")
    with pytest.raises(ValueError, match=r"resnet has no such head: got 'dense'; allowed: auto, LinearHead.*HEAD.NAME"):
        build_model(cfg)
    cfg = classifier_cfg("classic_cnn_8", "MODEL.HEAD.NUM_CLASSES", 7, "MODEL.HEAD.NAME", "dens")
    with pytest.raises(ValueError, match=r"classic_cnn has no such head: got 'dens'; allowed: auto, dense, LinearHead"):
        build_model(cfg)


@torch.no_grad()
def test_dropout_stands_where_torchvision_has_it():
    torch.manual_seed(0)
    reference = torchvision.models.vgg11(init_weights=False)
    ours = import_into("vgg11", family_of("vgg11").sources["torchvision"], reference.state_dict(), classes=1000)
    x = torch.randn(2, 3, 64, 64)
    features = ours.backbone(x)["res5"]
    logits = []
    for network, argument in ((ours.head.train(), features), (reference.train(), x)):
        torch.manual_seed(7)
        logits.append(network(argument))
    assert largest_difference(*logits) <= 1e-5
    ours.head.dropout_first = True
    torch.manual_seed(7)
    assert largest_difference(ours.head(features), logits[1]) > 1e-2
