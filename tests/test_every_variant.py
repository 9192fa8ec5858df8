"""What is promised of every variant: all of them in outline, the smallest of each family and a sample in full."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
import torch
from conftest import ROOT
from torch import nn
from variants import VARIANTS

from imgcls.modeling import all_variants, families, family_of, make_classifier, make_trunk
from imgcls.transfer.examine import (
    CONTRACT,
    DETECTORS,
    examine,
    freezing_problems,
    gradient_problems,
    libraries_of,
    maps_problems,
    plain,
    side_of,
)
from imgcls.transfer.parity import LIMITS, Parity, import_into, logits_difference, measure_parity, randomise
from imgcls.transfer.references import build_reference

ALL = [variant for variants in VARIANTS.values() for variant in variants]
RECORD = ROOT / "docs/data/parity.json"
SMALLEST = {
    "alexnet": "alexnet",
    "classic_cnn": "classic_cnn_8",
    "convnext": "convnext_tiny",
    "darknet": "darknet53",
    "darknet19": "darknet19",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_lite0",
    "efficientnet_v2": "efficientnet_v2_s",
    "googlenet": "googlenet",
    "inception_v3": "inception_v3",
    "mnasnet": "mnasnet0_5",
    "mobilenet_v1": "mobilenet_v1_0.25",
    "mobilenet_v2": "mobilenet_v2_0.25",
    "mobilenet_v3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet18",
    "sandbox": "sandbox",
    "shufflenet_v1": "shufflenet_v1_g8",
    "shufflenet_v2": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_t",
    "vgg": "vgg11_bn",
    "vit": "vit_ti_16",
}
# Compared beside the smallest, of those that take seconds; another sample every time the list is lengthened.
RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
QUICK = sorted(v for v in set(ALL) - set(SMALLEST.values()) if RECORDED.get(v, {}).get("seconds", 0) < 15)
SAMPLE = random.Random(len(ALL)).sample(QUICK, 4)


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location("parity_campaign", ROOT / "scripts/parity_campaign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- all of them, in outline -----------------------------------------------------------------------------------------


def test_registered_variants_are_these():
    assert {family.name: list(family.variants) for family in families()} == VARIANTS
    assert sorted(all_variants()) == sorted(ALL)
    assert set(SMALLEST) == set(VARIANTS)


@pytest.mark.parametrize("variant", ALL)
def test_booked_channels_and_strides_are_those_of_the_maps(variant):
    with torch.device("meta"):
        trunk = make_trunk(plain(variant))
        names = list(trunk._out_feature_strides)
        trunk = make_trunk(plain(variant), out_features=names).eval()
        size = max(96, side_of(variant) if family_of(variant).name == "vit" else 0)
        maps = trunk(torch.zeros(1, 3, size, size))
    assert list(maps) == names
    for name, value in maps.items():
        shape = trunk.output_shape()[name]
        if name == "token":
            assert tuple(value.shape) == (1, shape.channels, 1, 1)
            continue
        assert value.shape[1] == shape.channels
        # At most a few pixels off, where the paper pads less or rounds down (Inception v3 most of all).
        assert abs(value.shape[2] - size // shape.stride) <= 4, name
    strides = [shape.stride for shape in trunk.output_shape().values() if shape.stride]
    assert strides == sorted(strides)


# torchvision's RegNet reads numbers off tensors while it is built, which the meta device has not.
ON_THE_CPU = ("regnet",)


@pytest.mark.parametrize("variant", [variant for variant in ALL if family_of(variant).sources])
def test_parameters_are_as_many_as_the_references(variant):
    family = family_of(variant)
    for library in libraries_of(variant):
        source = family.sources[library]
        with torch.device("cpu" if family.name in ON_THE_CPU else "meta"):
            reference = build_reference(library, source.names[variant], source.options_for(family.variants[variant]))
        auxiliary = any("aux" in name.lower() for name in reference.state_dict())
        with torch.device("meta"):
            net = make_classifier(plain(variant), 1000, CONTRACT, auxiliary=auxiliary)
        assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in reference.parameters()), library


# -- in full ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SMALLEST.values())
def test_the_smallest_of_every_family_in_full(variant):
    found = examine(variant, detectors=("retinanet", "faster_rcnn"))
    assert found["problems"] == []
    assert all(
        built["arrived"].split(" of ")[0] == built["arrived"].split(" of ")[1] for built in found["detectors"].values()
    )


@pytest.mark.parametrize("variant", SAMPLE)
def test_a_sample_of_the_others(variant):
    for library in libraries_of(variant):
        found = measure_parity(variant, library, seed=1)
        assert found.equal, found
    assert maps_problems(variant) + freezing_problems(variant) == []


def test_the_record_holds_every_variant_and_is_fresh(campaign):
    record = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
    assert sorted(record) == sorted(ALL), "run scripts/parity_campaign.py"
    digests = {family.name: campaign.family_digest(family) for family in families()}
    stale = [variant for variant in ALL if record[variant]["digest"] != digests[family_of(variant).name]]
    assert stale == [], "run scripts/parity_campaign.py"
    for variant in ALL:
        assert record[variant]["problems"] == [], variant
        assert set(record[variant]["parity"]) == set(libraries_of(variant)), variant
        assert set(record[variant]["detectors"]) == set(DETECTORS), variant
        for found in record[variant]["parity"].values():
            for case, difference in found["differences"].items():
                assert difference <= LIMITS[getattr(torch, case.split()[0])], (variant, case)


def test_twin_a_stale_digest_is_seen(campaign, monkeypatch, tmp_path):
    family = family_of("resnet18")
    before = campaign.family_digest(family)
    files = campaign._sources(__import__(family.build.__module__, fromlist=["x"]))
    assert {"resnet.py", "norm.py"} <= {path.name for path in files}
    monkeypatch.setattr(campaign, "_sources", lambda module: files - {next(p for p in files if p.name == "norm.py")})
    assert campaign.family_digest(family) != before


# -- the examination itself notices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "break_it",
    [
        lambda net: net.backbone.res3[0].conv1.weight.data.mul_(1 + 1e-4),
        lambda net: setattr(net.backbone.res4[0].conv2.norm, "eps", 1e-3),
        lambda net: net.backbone.stem.conv1.weight.data.copy_(net.backbone.stem.conv1.weight.data.flip(1)),
        lambda net: net.backbone.res5[1].conv2.norm.running_mean.mul_(1.01),
    ],
)
def test_twin_parity_sees_a_wrong_network(break_it):
    source = family_of("resnet18").sources["torchvision"]
    reference = build_reference("torchvision", "resnet18", {})
    randomise(reference, 0)
    net = import_into("resnet18", source, reference.state_dict(), classes=1000)
    x = torch.randn(2, 3, 64, 64)
    assert logits_difference(net, reference, x) <= LIMITS[torch.float32]
    break_it(net)
    assert logits_difference(net, reference, x) > LIMITS[torch.float32]


def test_twin_logits_that_do_not_depend_on_the_image_prove_nothing():
    same = Parity("x", {"float64 64x64": 0.0}, (1, 1), spread=1e-9)
    assert not same.equal and Parity("x", {"float64 64x64": 0.0}, (1, 1)).equal
    assert not Parity("x", {}, (1, 1)).equal and not Parity("x", {"float32 64x64": 0.0}, (1, 2)).equal
    assert not Parity("x", {"float64 64x64": 1e-9}, (1, 1)).equal


def test_twin_a_dead_parameter_is_seen(monkeypatch):
    from imgcls.modeling.backbones import vgg

    monkeypatch.setattr(type(vgg.FAMILY), "without_gradient", {}, raising=False)
    bare = type(vgg.FAMILY)(**{**vars(vgg.FAMILY), "without_gradient": {}})
    monkeypatch.setattr("imgcls.transfer.examine.family_of", lambda variant: bare)
    monkeypatch.setattr("imgcls.transfer.examine.plain", lambda variant: plain_of("vgg11_bn"))
    found = gradient_problems("vgg11_bn")
    assert any("conv1.bias" in line for line in found)


def plain_of(variant):
    from imgcls.modeling import Architecture

    return Architecture(variant)


def test_twin_a_stage_that_stays_in_training_is_seen(monkeypatch):
    from imgcls.modeling.backbone_base import Trunk

    monkeypatch.setattr(Trunk, "train", lambda self, mode=True: nn.Module.train(self, mode))
    assert freezing_problems("mobilenet_v1_0.25") != []
