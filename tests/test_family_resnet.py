"""ResNet and its kin: the papers' numbers, detectron2's keys, what SE, D, dilation and stochastic depth do."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import nn
from torch.nn import functional as F

from imgcls.checkpoint import apply_key_rules
from imgcls.layers import NormFactory
from imgcls.modeling import Architecture, family_of, make_trunk
from imgcls.modeling.backbones.resnet import FAMILY, Bottleneck
from imgcls.transfer.parity import import_into, logits_difference, randomise


def build(variant, **options):
    return FAMILY.build(FAMILY.variants[variant], **options)


def random_trunk(variant, **options):
    trunk = make_trunk(Architecture(variant), **options)
    randomise(trunk, seed=0)
    return trunk.double().eval()


# Million parameters with the layer of 1000 classes: Zagoruyko and Komodakis 2016, table 8 (ResNet, Wide); Hu et al.
# 2017, table 10 (SE); Xie et al. 2016, table 1 (ResNeXt-50).
@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("resnet50", 25.6),
        ("resnet101", 44.5),
        ("resnet152", 60.2),
        ("wide_resnet50_2", 68.9),
        ("se_resnet50", 28.1),
        ("resnext50_32x4d", 25.0),
    ],
)
def test_parameters_are_the_papers(variant, millions):
    with torch.device("meta"):
        modules = (build(variant), nn.Linear(2048, 1000))
    assert round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 1) == millions


# Billion multiply-adds at 224 pixels: He et al. 2015, table 1 (ResNet-18); He et al. 2018, table 5 (B and D, where B
# has the stride in the 3x3 as here); Radosavovic et al. 2020, table 3 (the others, with that stride).
@pytest.mark.parametrize(
    ("variant", "billions"),
    [
        ("resnet18", 1.8),
        ("resnet50", 4.1),
        ("resnet50_d", 4.3),
        ("resnet101", 7.8),
        ("resnet152", 11.5),
        ("resnext50_32x4d", 4.2),
    ],
)
def test_multiply_adds_are_the_papers(variant, billions):
    counted = 0

    def count(conv, _inputs, output):
        nonlocal counted
        counted += output.numel() * conv.weight[0].numel()

    with torch.device("meta"):
        trunk = build(variant).eval()
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        trunk(torch.zeros(1, 3, 224, 224))
    counted += trunk.output_shape()["res5"].channels * 1000
    assert round(counted / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("variant", "depth", "groups", "width"),
    [("resnet152", 152, 1, 64), ("resnext101_32x8d", 101, 32, 8), ("wide_resnet50_2", 50, 1, 128)],
)
def test_keys_and_shapes_are_detectron2s(variant, depth, groups, width, plain_cfg):
    stock = stock_resnet(plain_cfg, depth, groups, width).state_dict()
    with torch.device("meta"):
        ours = build(variant).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in stock.items()}


def stock_resnet(cfg, depth, groups=1, width=64, stride_in_1x1=False, device="meta"):
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM = depth, "BN"
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = groups, width
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.BACKBONE.FREEZE_AT = ["res5"], 0
    with torch.device(device):
        return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def test_what_the_kin_add_to_the_keys():
    with torch.device("meta"):
        plain, se, deep = (set(build(v).state_dict()) for v in ("resnet50", "se_resnet50", "resnet50_d"))
    assert plain < se and {key.split(".")[2] for key in se - plain} == {"se"}
    assert plain < deep and {key.rsplit(".", 1)[0] for key in deep - plain} == {
        *("stem.conv2", "stem.conv2.norm", "stem.conv3", "stem.conv3.norm")
    }


def test_detectron2s_default_place_of_the_stride_is_another_network(plain_cfg):
    """STRIDE_IN_1X1 True loads every tensor and computes something else; False is ours."""
    trunk = random_trunk("resnet50")
    x = torch.randn(1, 3, 64, 97, dtype=torch.float64)
    ours = trunk(x)["res5"]
    for stride_in_1x1, low, high in ((False, 0, 0), (True, 0.05, 10)):
        stock = stock_resnet(plain_cfg, 50, stride_in_1x1=stride_in_1x1, device="cpu").double().eval()
        stock.load_state_dict(trunk.state_dict())
        assert low <= (stock(x)["res5"] - ours).abs().max() / ours.abs().max() <= high


def slow_bottleneck(block, x):
    """Bottleneck with SE (Hu et al. 2017, equations 2 to 4) and an averaging shortcut (He et al. 2018, figure 2c)."""
    tensors = block.state_dict()

    def conv_norm(x, name, **options):
        x = F.conv2d(x, tensors[f"{name}.weight"], **options)
        mean, var, weight, bias = (
            tensors[f"{name}.norm.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    branch = conv_norm(x, "conv1").relu()
    branch = conv_norm(branch, "conv2", stride=2, padding=1, groups=block.conv2.groups).relu()
    branch = conv_norm(branch, "conv3")
    squeezed = branch.mean(dim=(2, 3))
    hidden = (squeezed @ tensors["se.fc1.weight"][..., 0, 0].T + tensors["se.fc1.bias"]).relu()
    gate = (hidden @ tensors["se.fc2.weight"][..., 0, 0].T + tensors["se.fc2.bias"]).sigmoid()
    averaged = torch.empty(*x.shape[:2], -(-x.shape[2] // 2), -(-x.shape[3] // 2), dtype=x.dtype)
    for row in range(averaged.shape[2]):
        for column in range(averaged.shape[3]):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            averaged[:, :, row, column] = window.mean(dim=(2, 3))
    return (branch * gate[:, :, None, None] + conv_norm(averaged, "shortcut")).relu()


def test_the_block_is_the_papers():
    block = Bottleneck(
        *(12, 32),
        **{"bottleneck_channels": 8, "num_groups": 4, "stride": 2, "stride_in_1x1": False, "norm": NormFactory("BN")},
        **{"se": True, "deep": True, "drop_path": 0.0},
    )
    randomise(block, seed=0)
    block = block.double().eval()
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64)
    slow = slow_bottleneck(block, x)
    assert (block(x) - slow).abs().max() <= 1e-12 * slow.abs().max()
    gate, block.se = block.se, None
    assert (block(x) - slow).abs().max() > 0.05 * slow.abs().max()
    block.se, block.averages, block.shortcut.stride = gate, False, (2, 2)
    assert (block(x) - slow).abs().max() > 0.05 * slow.abs().max()


def test_dilation_is_torchvisions():
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    randomise(reference, seed=0)
    trunk = make_trunk(Architecture("resnet50"), output_stride=8)
    ours = apply_key_rules(reference.state_dict(), FAMILY.sources["torchvision"].rules_for(FAMILY.variants["resnet50"]))
    trunk.load_state_dict({name: ours[name] for name in trunk.state_dict()})
    body = nn.Sequential(*list(reference.children())[:-2]).double().eval()
    x = torch.randn(1, 3, 75, 64, dtype=torch.float64)
    theirs, got = body(x), trunk.double().eval()(x)["res5"]
    assert got.shape[2:] == (10, 8) and trunk.output_shape()["res5"].stride == 8
    assert (got - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("variant", ["resnet18", "resnet50_d"])
def test_a_dilated_map_holds_the_plain_one(variant, output_stride):
    """Of each window of pixels the first is the one that the strided network has: nothing was lost but the stride."""
    x = torch.randn(1, 3, 75, 97, dtype=torch.float64)
    plain = random_trunk(variant)
    dilated = make_trunk(Architecture(variant), output_stride=output_stride).double().eval()
    dilated.load_state_dict(plain.state_dict())
    expected, every = plain(x)["res5"], 32 // output_stride
    got = dilated(x)["res5"]
    assert got.shape[3] == -(-97 // output_stride)
    kept = got[:, :, ::every, ::every]
    assert (kept - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_stochastic_depth_grows_linearly_and_drops_the_branch_only():
    trunk = build("resnet50", drop_path=0.3)
    blocks = [block for _, stage in trunk.stage_modules()[1:] for block in stage]
    assert [block.drop_path.p for block in blocks] == pytest.approx([0.3 * i / 15 for i in range(16)])
    last = build("resnet18", drop_path=1.0).res5[1]
    x = torch.rand(2, 512, 3, 3)
    assert torch.equal(last.train()(x), x)
    assert not torch.equal(last.eval()(x), x)
    with pytest.raises(ValueError, match=r"mobilenet_v1 has no stochastic depth.*DROP_PATH"):
        make_trunk(Architecture("mobilenet_v1_0.25"), drop_path=0.1)


def as_detectron2_converts(name):
    """What tools/convert-torchvision-to-d2.py makes of a tensor's name."""
    name = name if "layer" in name else f"stem.{name}"
    for stage in (1, 2, 3, 4):
        name = name.replace(f"layer{stage}", f"res{stage + 1}")
    for index in (1, 2, 3):
        name = name.replace(f"bn{index}", f"conv{index}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def test_files_in_detectron2s_own_layout_are_read():
    reference = torchvision.models.resnet18().eval()
    randomise(reference, seed=0)
    converted = {as_detectron2_converts(name): tensor for name, tensor in reference.state_dict().items()}
    assert "stem.fc.weight" in converted
    source = family_of("resnet18").sources["detectron2"]
    net = import_into("resnet18", source, converted, classes=1000)
    assert logits_difference(net, reference, torch.randn(1, 3, 64, 64)) <= 1e-5
    del converted["res3.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"1 missing: backbone.res3.0.conv1.weight"):
        import_into("resnet18", source, converted, classes=1000)
