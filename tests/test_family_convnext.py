"""ConvNeXt: the paper's numbers, torchvision's network in other sizes, the hand-over."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import StochasticDepth

from imgcls.checkpoint import apply_key_rules, write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.modeling import Architecture, family_of, make_classifier, spec
from imgcls.modeling.backbones import convnext
from imgcls.transfer import convert, verify
from imgcls.transfer.parity import NEUTRAL, logits_difference, randomise, to_our_keys

NARROW = convnext.ConvNeXtSpec((16, 24, 40, 64), (1, 2, 2, 1))


@pytest.fixture
def narrow(monkeypatch):
    """A row of no paper, for speed."""
    monkeypatch.setitem(convnext.VARIANTS, "convnext_narrow", NARROW)
    monkeypatch.setitem(spec._FAMILY_OF, "convnext_narrow", convnext.FAMILY)
    return "convnext_narrow"


def classifier(variant, classes=1000):
    return make_classifier(Architecture(variant, norm="LN"), classes, NEUTRAL).eval()


# Table 1, ImageNet-1K at 224 pixels: million parameters, billion multiply-adds.
@pytest.mark.parametrize(
    ("variant", "millions", "billions"),
    [
        ("convnext_tiny", 29, 4.5),
        ("convnext_small", 50, 8.7),
        ("convnext_base", 89, 15.4),
        ("convnext_large", 198, 34.4),
    ],
)
def test_parameters_and_multiply_adds_are_the_papers(variant, millions, billions):
    with torch.device("meta"):
        net = classifier(variant)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
        with FlopCounterMode(display=False) as counter:
            net.head(net.backbone(torch.zeros(1, 3, 224, 224))["res5"])
    assert abs(counter.get_total_flops() / 2e9 - billions) <= 0.06


def narrow_reference():
    torch.manual_seed(0)
    widths = (*NARROW.channels, None)
    settings = [CNBlockConfig(widths[i], widths[i + 1], NARROW.blocks[i]) for i in range(4)]
    reference = ConvNeXt(settings, num_classes=10).eval()
    randomise(reference, 0)
    return reference.double()


def with_weights_of(reference, variant):
    mapped = to_our_keys(apply_key_rules(reference.state_dict(), convnext.TORCHVISION_RULES))
    net = classifier(variant, 10).double()
    net.load_state_dict(mapped, strict=True)
    return net


# Heights and widths that none of the four strides divides, too.
@pytest.mark.parametrize("size", [(64, 96), (75, 190), (127, 33)])
def test_it_is_torchvisions_network_at_any_size(narrow, size):
    reference = narrow_reference()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert logits_difference(with_weights_of(reference, narrow), reference, x) <= 1e-10


@pytest.mark.parametrize("spoilt", ["epsilon", "gamma", "order of norm and mean"])
def test_a_wrong_network_is_noticed(narrow, spoilt):
    reference = narrow_reference()
    net = with_weights_of(reference, narrow)
    if spoilt == "epsilon":
        net.backbone.stem.norm.eps = 1e-5
    elif spoilt == "gamma":
        nn.init.ones_(net.backbone.res4.block1.gamma)
    else:
        net.head.norm_first = True
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert logits_difference(net, reference, x) > 1e-8


def test_drop_path_grows_over_the_blocks_as_in_torchvision():
    with torch.device("meta"):
        reference = get_model("convnext_tiny", stochastic_depth_prob=0.3)
        ours = family_of("convnext_tiny").build(convnext.VARIANTS["convnext_tiny"], drop_path=0.3)
        without = family_of("convnext_tiny").build(convnext.VARIANTS["convnext_tiny"])
    expected = [module.p for module in reference.modules() if isinstance(module, StochasticDepth)]
    found = [module.p for module in ours.modules() if isinstance(module, StochasticDepth)]
    # The first block's is 0 and no layer here.
    assert expected[0] == 0 and found == pytest.approx(expected[1:]) and len(found) == 17
    assert not any(isinstance(module, StochasticDepth) for module in without.modules())


def test_blocks_begin_as_almost_nothing(narrow):
    trunk = convnext.FAMILY.build(NARROW)
    x = torch.randn(1, 16, 8, 8)
    change = (trunk.res2.block0(x) - x).abs().max()
    assert 0 < change < 1e-5
    nn.init.ones_(trunk.res2.block0.gamma)
    assert (trunk.res2.block0(x) - x).abs().max() > 1e-2


def test_the_hand_over_arrives_and_the_detector_trains(narrow, classifier_cfg, detector_cfg, tmp_path):
    run = Run(*finalize(classifier_cfg(narrow, "MODEL.BACKBONE.NORM", "auto")))
    randomise(run.model, 0)
    write_checkpoint(tmp_path / "model.pth", run.checkpoint(0), iteration=0)
    path = tmp_path / "backbone.pth"
    convert(tmp_path / "model.pth", path)
    outcome = verify(path, detector_cfg("retinanet", narrow, "MODEL.BACKBONE.FREEZE_AT", 2), tmp_path / "model.pth")
    assert outcome.passed, outcome.text()
    assert set(outcome.differences["float64"]) == {"res3", "res4", "res5"}
    assert len(outcome.report.loaded) == len(convnext.FAMILY.build(NARROW).state_dict())
    detector = build_model(detector_cfg("retinanet", narrow, "MODEL.BACKBONE.DROP_PATH", 0.2)).train()
    losses = sum(one_training_forward(detector).values())
    losses.backward()
    # RetinaNet reads res3 to res5; the last of them depends on everything before.
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())


def one_training_forward(detector):
    instances = Instances((70, 90))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])), torch.tensor([1])
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    with EventStorage():
        return detector([{"image": image, "instances": instances}])
