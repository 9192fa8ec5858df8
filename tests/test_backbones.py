"""The trunks: shapes, widths and parameter counts of the papers, keys of detectron2, real freezing."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import nn

from imgcls.layers import NormFactory
from imgcls.modeling import Family, StagedTrunk, family_of, register_family

VARIANTS = [
    "mobilenet_v1_0.25",
    "mobilenet_v1_0.5",
    "mobilenet_v1_0.75",
    "mobilenet_v1_1.0",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
]


def build(variant, **options):
    family = family_of(variant)
    return family.build(family.variants[variant], **options)


def test_every_family_has_its_builder_and_the_pyramids_are_there():
    for variant in VARIANTS:
        assert family_of(variant).builder in BACKBONE_REGISTRY
    assert "build_imgcls_fpn_backbone" in BACKBONE_REGISTRY
    assert "build_imgcls_retinanet_fpn_backbone" in BACKBONE_REGISTRY


@pytest.mark.parametrize("size", [64, 75])
@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_booked_strides_and_channels_are_those_of_the_maps(variant, stem, size):
    names = ["stem", "res2", "res3", "res4", "res5"]
    with torch.device("meta"):
        trunk = build(variant, stem=stem, out_features=names).eval()
        maps = trunk(torch.zeros(1, 3, size, size))
    strides = [trunk.output_shape()[name].stride for name in names]
    if "mobilenet" in variant:
        assert strides == ([1, 2, 4, 8, 16] if stem == "small" else [2, 4, 8, 16, 32])
    else:
        assert strides == ([1, 1, 2, 4, 8] if stem == "small" else [4, 4, 8, 16, 32])
    for name, stride in zip(names, strides, strict=True):
        side = -(-size // stride)
        assert tuple(maps[name].shape) == (1, trunk.output_shape()[name].channels, side, side)


# Howard et al. 2017, tables 6 and 7 (the network with its 1000-class layer): million parameters at 224 pixels.
@pytest.mark.parametrize(
    ("variant", "millions"),
    [("mobilenet_v1_1.0", 4.2), ("mobilenet_v1_0.75", 2.6), ("mobilenet_v1_0.5", 1.3), ("mobilenet_v1_0.25", 0.5)],
)
def test_mobilenet_v1_has_the_papers_parameters(variant, millions):
    with torch.device("meta"):
        trunk = build(variant)
    head = nn.Linear(trunk.output_shape()["res5"].channels, 1000)
    total = sum(p.numel() for module in (trunk, head) for p in module.parameters())
    assert round(total / 1e6, 1) == millions


# Million multiply-adds of table 6, body and classifier together, at 224 pixels.
@pytest.mark.parametrize(
    ("variant", "millions"),
    [("mobilenet_v1_1.0", 569), ("mobilenet_v1_0.75", 325), ("mobilenet_v1_0.5", 149), ("mobilenet_v1_0.25", 41)],
)
def test_mobilenet_v1_has_the_papers_multiply_adds(variant, millions):
    counted = 0

    def count(module, _inputs, output):
        nonlocal counted
        kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
        counted += output.shape[1] * output.shape[2] * output.shape[3] * kernel

    with torch.device("meta"):
        trunk = build(variant).eval()
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        trunk(torch.zeros(1, 3, 224, 224))
    counted += trunk.output_shape()["res5"].channels * 1000
    assert abs(counted / 1e6 - millions) < 1


def slow_mobilenet_v1(trunk, x):
    """Table 1 read top to bottom, every depthwise convolution as a loop over channels."""
    tensors = trunk.state_dict()
    functional = nn.functional

    def norm_relu(x, prefix):
        mean, var = tensors[f"{prefix}.norm.running_mean"], tensors[f"{prefix}.norm.running_var"]
        weight, bias = tensors[f"{prefix}.norm.weight"], tensors[f"{prefix}.norm.bias"]
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return (x * weight.view(shape) + bias.view(shape)).clamp(min=0)

    x = norm_relu(functional.conv2d(x, tensors["stem.conv1.weight"], stride=2, padding=1), "stem.conv1")
    strides = {"stem": [1], "res2": [2, 1], "res3": [2, 1], "res4": [2, 1, 1, 1, 1, 1], "res5": [2, 1]}
    for stage, rows in strides.items():
        for index, stride in enumerate(rows):
            prefix = f"{stage}.block{index}"
            kernels = tensors[f"{prefix}.depthwise.weight"]
            channels = [
                functional.conv2d(x[:, c : c + 1], kernels[c : c + 1], stride=stride, padding=1)
                for c in range(x.shape[1])
            ]
            x = norm_relu(torch.cat(channels, dim=1), f"{prefix}.depthwise")
            x = norm_relu(functional.conv2d(x, tensors[f"{prefix}.pointwise.weight"]), f"{prefix}.pointwise")
    return x


def randomise_statistics(network):
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.double().eval()


def test_mobilenet_v1_is_the_papers_table():
    trunk = randomise_statistics(build("mobilenet_v1_0.25"))
    x = torch.randn(2, 3, 65, 64, dtype=torch.float64)
    ours, slow = trunk(x)["res5"], slow_mobilenet_v1(trunk, x)
    assert (ours - slow).abs().max() <= 1e-10 * slow.abs().max()
    trunk.res4.block2.depthwise.stride = (2, 2)
    assert trunk(x)["res5"].shape != slow.shape


def torchvision_name(key):
    """detectron2's key of a ResNet tensor in torchvision's spelling."""
    key = key.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1")
    for stage in range(2, 6):
        key = key.replace(f"res{stage}.", f"layer{stage - 1}.")
    for conv in (1, 2, 3):
        key = key.replace(f"conv{conv}.norm", f"bn{conv}")
    return key.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


@pytest.mark.parametrize("variant", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnet_equals_torchvision(variant):
    reference = randomise_statistics(torchvision.models.get_model(variant))
    trunk = build(variant).double().eval()
    theirs = reference.state_dict()
    trunk.load_state_dict({key: theirs[torchvision_name(key)] for key in trunk.state_dict()})
    x = torch.randn(1, 3, 97, 64, dtype=torch.float64)
    ours = trunk(x)["res5"]
    body = nn.Sequential(*list(reference.children())[:-2])
    assert (ours - body(x)).abs().max() <= 1e-10 * ours.abs().max()
    with torch.no_grad():
        trunk.res3[0].conv1.weight.mul_(1.01)
    assert (trunk(x)["res5"] - body(x)).abs().max() > 1e-6 * ours.abs().max()


@pytest.mark.parametrize(
    ("variant", "depth"), [("resnet18", 18), ("resnet34", 34), ("resnet50", 50), ("resnet101", 101)]
)
def test_resnet_has_detectron2s_keys_and_shapes(variant, depth, plain_cfg):
    plain_cfg.MODEL.RESNETS.DEPTH = depth
    plain_cfg.MODEL.RESNETS.NORM = "BN"
    plain_cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    plain_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    plain_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    with torch.device("meta"):
        stock = build_resnet_backbone(plain_cfg, ShapeSpec(channels=3)).state_dict()
        ours = build(variant).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in stock.items()}


def test_small_stem_changes_no_key_but_the_stems_kernel():
    with torch.device("meta"):
        standard, small = build("resnet18").state_dict(), build("resnet18", stem="small").state_dict()
        assert list(standard) == list(small)
        assert [k for k in standard if standard[k].shape != small[k].shape] == ["stem.conv1.weight"]
        assert tuple(small["stem.conv1.weight"].shape) == (64, 3, 3, 3)
        standard, small = build("mobilenet_v1_1.0").state_dict(), build("mobilenet_v1_1.0", stem="small").state_dict()
    assert {k: v.shape for k, v in standard.items()} == {k: v.shape for k, v in small.items()}


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18"])
def test_freezing_stops_exactly_those_stages(variant, freeze_at):
    trunk = build(variant).freeze(freeze_at).train()
    names = ["stem", "res2", "res3", "res4", "res5"]
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in trunk.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))], 0.1
    )
    out = trunk(torch.randn(4, 3, 32, 32))["res5"]
    if out.requires_grad:
        out.square().mean().backward()
        optimizer.step()
    changed = {key.split(".")[0] for key, value in trunk.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(names[freeze_at:])
    assert all(not p.requires_grad for n in names[:freeze_at] for p in getattr(trunk, n).parameters())


def test_freezing_replaces_no_module_and_survives_train_and_eval():
    trunk = build("resnet18")
    keys, kinds = list(trunk.state_dict()), [type(m) for m in trunk.modules()]
    trunk.freeze(2)
    assert list(trunk.state_dict()) == keys and [type(m) for m in trunk.modules()] == kinds
    trunk.eval()
    trunk.train()
    assert not trunk.stem.training and not trunk.res2.training and trunk.res3.training


def test_too_many_frozen_stages_are_refused():
    with pytest.raises(ValueError, match=r"cannot freeze 6 stages.*allowed: 0 to 5.*FREEZE_AT"):
        build("resnet18").freeze(6)


@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18"])
def test_stages_after_the_last_wanted_are_left_out(variant):
    trunk = build(variant, out_features=["res3", "res4"])
    assert not hasattr(trunk, "res5") and hasattr(trunk, "res4")
    assert set(trunk.eval()(torch.zeros(1, 3, 32, 32))) == {"res3", "res4"}
    with pytest.raises(ValueError, match=r"no feature map 'res6'.*res5.*OUT_FEATURES"):
        build(variant, out_features=["res6"])


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("naiveSyncBN", NaiveSyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("GN", nn.GroupNorm),
    ],
)
@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18"])
def test_every_norm_is_the_one_asked_for(variant, kind, layer):
    trunk = build(variant, norm=kind)
    norms = [m for m in trunk.modules() if isinstance(m, layer)]
    assert len(norms) == len(build(variant).state_dict()) // 6
    assert not any(type(m) is nn.BatchNorm2d for m in trunk.modules()) or kind == "BN"


def test_epsilon_and_momentum_survive_every_kind():
    for kind in ("BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN"):
        layer = NormFactory(kind, eps=1e-3, momentum=0.01)(48)
        assert layer.eps == 1e-3
        assert getattr(layer, "momentum", 0.01) == 0.01
    with pytest.raises(ValueError, match=r"unknown norm 'IN'.*BN, SyncBN.*MODEL.BACKBONE.NORM"):
        NormFactory("IN")(8)


def test_norm_auto_is_bn_for_a_classifier_and_frozen_for_a_detector(classifier_cfg, detector_cfg):
    model = build_model(
        classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "auto", "MODEL.HEAD.NUM_CLASSES", 10)
    )
    assert any(type(m) is nn.BatchNorm2d for m in model.modules())
    detector = build_model(detector_cfg())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in detector.backbone.bottom_up.modules())


def test_sync_bn_on_the_cpu_becomes_detectron2s(classifier_cfg):
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "SyncBN", "MODEL.HEAD.NUM_CLASSES", 10)
    model = build_model(cfg)
    assert any(isinstance(m, NaiveSyncBatchNorm) for m in model.modules())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def test_an_unknown_variant_lists_the_nearest(classifier_cfg):
    with pytest.raises(ValueError, match=r"no such network: got 'resnet5'.*did you mean resnet50.*VARIANT"):
        family_of("resnet5")
    with pytest.raises(ValueError, match=r"no such network: got 'zzz'.*one of alexnet"):
        family_of("zzz")


def test_the_builder_of_another_family_is_an_error(classifier_cfg):
    cfg = classifier_cfg("resnet18", "MODEL.HEAD.NUM_CLASSES", 10)
    cfg.MODEL.BACKBONE.NAME = "build_imgcls_mobilenet_v1_backbone"
    with pytest.raises(ValueError, match=r"not of the family.*'resnet18'.*build_imgcls_resnet_backbone"):
        build_model(cfg)


def test_a_config_without_our_keys_is_told_what_to_call():
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_imgcls_resnet_backbone"
    with pytest.raises(ValueError, match="add_imgcls_config"):
        build_model(cfg)


def test_two_families_cannot_share_a_variant():
    with pytest.raises(ValueError, match=r"variant 'resnet18' of mine is taken by resnet"):
        register_family(Family(name="mine", variants={"resnet18": None}, build=StagedTrunk))


@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18"])
def test_every_parameter_gets_a_finite_gradient_above_rounding(variant):
    trunk = build(variant).double().train()
    trunk(torch.randn(2, 3, 64, 64, dtype=torch.float64))["res5"].square().sum().backward()
    for name, parameter in trunk.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 1e-9, name
