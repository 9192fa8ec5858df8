"""MnasNet: numbers that the paper, its authors' release and torchvision print."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.modeling.analysis import analyze
from imgcls.modeling.backbones.mnasnet import A1, MnasNet, MnasNetSpec, make_head
from imgcls.transfer.parity import NEUTRAL, import_into, logits_difference, randomise
from imgcls.transfer.references import build_reference


def cost(variant):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant), 1000, NEUTRAL)
    return analyze(net, 224)


def pair(variant, library):
    """The library's network with random weights, and ours with the same; double precision."""
    source = family_of(variant).sources[library]
    reference = build_reference(library, source.names[variant], {})
    randomise(reference, 0)
    return reference.double(), import_into(variant, source, reference.state_dict(), classes=1000).double()


def test_a1_costs_what_the_paper_prints():
    # Table 1: 3.9 M parameters, 312 M multiply-adds.
    found = cost("mnasnet_a1")
    assert round(found.parameters / 1e6, 1) == 3.9 and round(found.multiply_adds / 1e6) == 312


# The table of the authors' release (tensorflow/tpu, models/official/mnasnet): A1 under the depth multiplier.
@pytest.mark.parametrize(("multiplier", "millions"), [(1.4, 6.1), (0.75, 2.9), (0.5, 2.1), (0.35, 1.7)])
def test_scaled_a1_has_the_releases_parameters(multiplier, millions):
    spec = MnasNetSpec(A1, multiplier)
    with torch.device("meta"):
        trunk = MnasNet(spec)
        head = make_head(spec, trunk.output_shape(), 1000)
    assert round(sum(p.numel() for module in (trunk, head) for p in module.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("variant", ["mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"])
def test_b1_costs_what_torchvision_prints(variant):
    printed = torchvision.models.get_model_weights(variant).DEFAULT.meta
    found = cost(variant)
    assert (found.parameters, round(found.multiply_adds / 1e9, 3)) == (printed["num_params"], printed["_ops"])


@pytest.mark.parametrize(("variant", "library"), [("mnasnet0_5", "torchvision"), ("mnasnet_a1", "timm")])
def test_norms_have_the_references_constants(variant, library):
    if library == "timm":
        pytest.importorskip("timm")
    theirs, ours = (
        [(m.num_features, m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for network in pair(variant, library)
    )
    assert ours == theirs


def test_a_forgotten_residual_and_squeeze_are_noticed():
    pytest.importorskip("timm")
    reference, ours = pair("mnasnet_a1", "timm")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert logits_difference(ours, reference, x) <= 1e-10
    block = ours.backbone.res3.block1
    block.residual = False
    assert logits_difference(ours, reference, x) > 1e-3
    block.residual, block.se = True, None
    assert logits_difference(ours, reference, x) > 1e-3


def test_weights_of_torchvisions_first_version_are_refused():
    # There the stem had 32 and 16 channels whatever the multiplier.
    source = family_of("mnasnet0_5").sources["torchvision"]
    tensors = build_reference("torchvision", "mnasnet0_5", {}).state_dict()
    wide = build_reference("torchvision", "mnasnet1_0", {}).state_dict()
    old = {name: wide[name] if name.split(".")[1] in "01234567" else tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"stem\.conv1"):
        import_into("mnasnet0_5", source, old, classes=1000)
