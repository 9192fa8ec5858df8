"""MobileNetV1, V2 and V3: numbers that the papers and the authors' release print, and what other libraries compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models._utils import _make_divisible

from imgcls.checkpoint import apply_key_rules, load_weights
from imgcls.layers import divisible
from imgcls.modeling import Architecture, family_of, make_classifier, make_trunk
from imgcls.modeling.analysis import analyze
from imgcls.modeling.backbones.mobilenet_v2 import last_width
from imgcls.modeling.backbones.mobilenet_v3 import squeezed
from imgcls.structures import KeyRule
from imgcls.transfer.parity import NEUTRAL, import_into, logits_difference, randomise, to_our_keys
from imgcls.transfer.references import build_reference


def cost(variant, size=224):
    """Million parameters without the norms' (the release leaves them out), million multiply-adds."""
    with torch.device("meta"):
        net = make_classifier(Architecture(variant), 1000, NEUTRAL)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    found = analyze(net, size)
    return (found.parameters - norms) / 1e6, found.multiply_adds / 1e6


def pair(variant):
    """torchvision's network with random weights, and ours with the same; double precision.

    torchvision starts depthwise convolutions at almost nothing: what comes out would not depend on the image.
    """
    source = family_of(variant).sources["torchvision"]
    options = source.options_for(family_of(variant).variants[variant])
    reference = build_reference("torchvision", source.names[variant], options)
    randomise(reference, 0)
    for module in reference.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            nn.init.kaiming_normal_(module.weight)
    return reference.double(), import_into(variant, source, reference.state_dict(), classes=1000).double()


def images(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_divisible_is_torchvisions_rule():
    values = [0.35 * width for width in range(1, 400)] + [1.3 * width for width in range(1, 400)]
    for divisor, lowest in ((8, None), (8, 16), (4, None)):
        ours = [divisible(value, divisor, lowest) for value in values]
        assert ours == [_make_divisible(value, divisor, lowest) for value in values]
    # The example in torchvision's documentation of the 90 %.
    assert (divisible(83), divisible(84)) == (80, 88)


# The table of the authors' release (tensorflow/models, slim/nets/mobilenet); it cuts the millions off.
@pytest.mark.parametrize(
    ("variant", "parameters", "multiply_adds"),
    [
        ("mobilenet_v2_1.4", 6.06, {224: 582}),
        ("mobilenet_v2_1.3", 5.34, {224: 509}),
        ("mobilenet_v2_1.0", 3.47, {224: 300, 96: 56}),
        ("mobilenet_v2_0.75", 2.61, {224: 209}),
        ("mobilenet_v2_0.5", 1.95, {224: 97}),
        ("mobilenet_v2_0.35", 1.66, {224: 59, 96: 11}),
    ],
)
def test_mobilenet_v2_costs_what_the_release_prints(variant, parameters, multiply_adds):
    assert round(cost(variant)[0], 2) == parameters
    assert {size: int(cost(variant, size)[1]) for size in multiply_adds} == multiply_adds


# Howard et al. 2019, table 3 (version 5); for V3-Large the release prints 217 where the paper has 219.
@pytest.mark.parametrize(
    ("variant", "parameters", "multiply_adds"), [("mobilenet_v3_large", 5.4, 217), ("mobilenet_v3_small", 2.5, 56)]
)
def test_mobilenet_v3_costs_what_the_paper_prints(variant, parameters, multiply_adds):
    found = cost(variant)
    assert abs(found[0] - parameters) < 0.1 and abs(found[1] - multiply_adds) < 1


def test_the_plain_name_of_mobilenet_v2_is_width_one():
    plain, one = (make_classifier(Architecture(name), 10, NEUTRAL) for name in ("mobilenet_v2", "mobilenet_v2_1.0"))
    one.load_state_dict(plain.state_dict())
    x = images().float()
    assert torch.equal(plain.eval()(x, normalized=True), one.eval()(x, normalized=True))


def test_multipliers_below_one_spare_the_last_convolution():
    # Section 4 of the paper: 1280 below one, 1.4 * 1280 above; the parameters printed by the release depend on it too.
    assert [last_width(width) for width in (0.25, 0.35, 0.75, 1.0, 1.4)] == [1280, 1280, 1280, 1280, 1792]


def test_a_quarter_of_the_expansion_is_squeezed():
    # Hidden channels in torchvision's networks, whose rule is written another way.
    for variant in family_of("mobilenet_v3_small").variants:
        reference, ours = pair(variant)
        theirs = [m.fc1.out_channels for m in reference.modules() if hasattr(m, "fc1")]
        assert theirs and theirs == [squeezed(m.fc1.in_channels) for m in ours.modules() if hasattr(m, "fc1")]


@pytest.mark.parametrize("variant", ["mobilenet_v2_1.0", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_norms_have_torchvisions_constants(variant):
    theirs, ours = (
        [(m.num_features, m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for network in pair(variant)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("variant", "activation"), [("mobilenet_v2_0.25", nn.functional.silu), ("mobilenet_v3_small", nn.functional.relu)]
)
def test_a_forgotten_residual_and_another_activation_are_noticed(variant, activation):
    torch.manual_seed(0)
    reference, ours = pair(variant)
    assert logits_difference(ours, reference, images()) <= 1e-10
    block = ours.backbone.res4.block1
    block.residual = False
    assert logits_difference(ours, reference, images()) > 1e-4
    block.residual = True
    block.depthwise.activation = activation
    assert logits_difference(ours, reference, images()) > 1e-4


def test_another_epsilon_is_noticed():
    reference, ours = pair("mobilenet_v3_small")
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    assert logits_difference(ours, reference, images()) > 1e-5


def test_weights_of_another_width_are_refused():
    source = family_of("mobilenet_v2_0.5").sources["torchvision"]
    tensors = build_reference("torchvision", "mobilenet_v2", {"width_mult": 0.75}).state_dict()
    with pytest.raises(ValueError, match=r"stem\.conv1"):
        import_into("mobilenet_v2_0.5", source, tensors, classes=1000)


def test_a_dilated_network_computes_the_same_between_the_pixels():
    # At width 0.25 res2 and res3 have 8 channels: without its stride res3's first block looks like one with a residual.
    trunk = make_trunk(Architecture("mobilenet_v2_0.25"))
    randomise(trunk, 0)
    dilated = make_trunk(Architecture("mobilenet_v2_0.25"), output_stride=4)
    dilated.load_state_dict(trunk.state_dict())
    x = images(96)
    strided, dense = (network.double().eval()(x)["res5"] for network in (trunk, dilated))
    assert dense.shape[2:] == (24, 24)
    assert (dense[:, :, ::8, ::8] - strided).abs().max() <= 1e-10 * strided.abs().max()


# timm's block of MobileNetV1; the family has no such source, because timm's weights were trained with ReLU6.
TIMM_V1 = [
    KeyRule(r"^conv_stem\.", "stem.conv1."),
    KeyRule(r"^bn1\.", "stem.conv1.norm."),
    KeyRule(r"^classifier\.", "head.fc."),
    KeyRule(r"^blocks\.0\.", "stem.block"),
    *(KeyRule(rf"^blocks\.{number}\.", f"res{number + 1}.block") for number in range(1, 5)),
    KeyRule(r"\.conv_dw\.", ".depthwise."),
    KeyRule(r"\.bn1\.", ".depthwise.norm."),
    KeyRule(r"\.conv_pw\.", ".pointwise."),
    KeyRule(r"\.bn2\.", ".pointwise.norm."),
]


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_mobilenet_v1_is_timms_with_relu_instead_of_relu6(activation):
    pytest.importorskip("timm")
    reference = build_reference("timm", "mobilenetv1_100", {"act_layer": activation})
    randomise(reference, 0)
    ours = make_classifier(Architecture("mobilenet_v1_1.0"), 1000, NEUTRAL)
    report = load_weights(ours, to_our_keys(apply_key_rules(reference.state_dict(), TIMM_V1)))
    report.require_complete("timm's", "")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())
    # Large images: ReLU6 shows only where a value exceeds 6.
    difference = logits_difference(ours.double().eval(), reference.double(), 20 * images(97))
    assert difference <= 1e-10 if activation == "relu" else difference > 1e-3
