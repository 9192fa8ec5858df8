"""RegNet: the width rule and the paper's figures, and detectron2's stock class beside torchvision's widths."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from torch import nn
from torchvision.models.regnet import BlockParams

from imgcls.modeling import Architecture, make_trunk
from imgcls.modeling.backbones.regnet import FAMILY, VARIANTS, stages_of
from imgcls.transfer.parity import import_into, randomise

# Figures 15 and 16: depths, widths, billion multiply-adds, million parameters.
PRINTED = {
    "regnet_x_400mf": ((1, 2, 7, 12), (32, 64, 160, 384), 0.4, 5.2),
    "regnet_x_800mf": ((1, 3, 7, 5), (64, 128, 288, 672), 0.8, 7.3),
    "regnet_x_1_6gf": ((2, 4, 10, 2), (72, 168, 408, 912), 1.6, 9.2),
    "regnet_x_3_2gf": ((2, 6, 15, 2), (96, 192, 432, 1008), 3.2, 15.3),
    "regnet_x_8gf": ((2, 5, 15, 1), (80, 240, 720, 1920), 8.0, 39.6),
    "regnet_x_16gf": ((2, 6, 13, 1), (256, 512, 896, 2048), 15.9, 54.3),
    "regnet_x_32gf": ((2, 7, 13, 1), (336, 672, 1344, 2520), 31.7, 107.8),
    "regnet_y_400mf": ((1, 3, 6, 6), (48, 104, 208, 440), 0.4, 4.3),
    "regnet_y_800mf": ((1, 3, 8, 2), (64, 128, 320, 768), 0.8, 6.3),
    "regnet_y_1_6gf": ((2, 6, 17, 2), (48, 120, 336, 888), 1.6, 11.2),
    "regnet_y_3_2gf": ((2, 5, 13, 1), (72, 216, 576, 1512), 3.2, 19.4),
    "regnet_y_8gf": ((2, 4, 10, 1), (168, 448, 896, 2016), 8.0, 39.2),
    "regnet_y_16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), 15.9, 83.6),
    "regnet_y_32gf": ((2, 5, 12, 1), (232, 696, 1392, 3712), 32.3, 145.0),
}
# Those whose widths torchvision rounds otherwise than the paper.
ROUNDED_UP = {
    "regnet_x_400mf": (32, 64, 160, 400),
    "regnet_y_800mf": (64, 144, 320, 784),
    "regnet_y_8gf": (224, 448, 896, 2016),
}
AS_PRINTED = [variant for variant in PRINTED if variant not in ROUNDED_UP]


def build(variant, **options):
    return FAMILY.build(FAMILY.variants[variant], **options)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_rule_gives_the_papers_depths_and_widths(variant):
    stages = stages_of(VARIANTS[variant], as_printed=True)
    depths, widths, _, _ = PRINTED[variant]
    assert (tuple(s.depth for s in stages), tuple(s.width for s in stages)) == (depths, widths)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_networks_widths_are_torchvisions(variant):
    row = VARIANTS[variant]
    theirs = BlockParams.from_init_params(row.d, row.w_0, row.w_a, row.w_m, group_width=row.g)
    assert [stage.group_width for stage in stages_of(row)] == theirs.group_widths
    assert tuple(theirs.widths) == ROUNDED_UP.get(variant, PRINTED[variant][1])
    with torch.device("meta"):
        shapes = build(variant, out_features=["stem", "res2", "res3", "res4", "res5"]).output_shape()
    assert [shape.channels for shape in shapes.values()] == [32, *theirs.widths]
    assert [shape.stride for shape in shapes.values()] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("variant", AS_PRINTED)
def test_parameters_and_multiply_adds_are_the_papers(variant):
    counted = 0

    def count(conv, _inputs, output):
        nonlocal counted
        counted += output.numel() * conv.weight[0].numel()

    with torch.device("meta"):
        trunk = build(variant).eval()
        head = nn.Linear(trunk.output_shape()["res5"].channels, 1000)
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        trunk(torch.zeros(1, 3, 224, 224))
    parameters = sum(p.numel() for module in (trunk, head) for p in module.parameters())
    _, _, billions, millions = PRINTED[variant]
    assert (round((counted + head.weight.numel()) / 1e9, 1), round(parameters / 1e6, 1)) == (billions, millions)


def stock(variant, device="meta"):
    """detectron2's own RegNet from the same numbers."""
    row = VARIANTS[variant]
    with torch.device(device):
        return RegNet(
            stem_class=SimpleStem,
            stem_width=32,
            block_class=ResBottleneckBlock,
            depth=row.d,
            w_a=row.w_a,
            w_0=row.w_0,
            w_m=row.w_m,
            group_width=row.g,
            se_ratio=0.25 if row.se else 0.0,
            activation_class=partial(nn.ReLU, inplace=True),
            out_features=["stem", "s1", "s2", "s3", "s4"],
        )


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_keys_are_detectron2s_and_so_are_shapes_but_where_it_rounds_otherwise(variant):
    theirs = {key: tensor.shape for key, tensor in stock(variant).state_dict().items()}
    with torch.device("meta"):
        ours = {key: tensor.shape for key, tensor in build(variant).state_dict().items()}
    assert list(ours) == list(theirs)
    assert (ours == theirs) == (variant not in ROUNDED_UP)


@pytest.mark.parametrize("variant", ["regnet_x_800mf", "regnet_y_400mf"])
def test_the_maps_are_those_of_detectron2s_class(variant):
    maps = ["stem", "res2", "res3", "res4", "res5"]
    trunk, reference = build(variant, out_features=maps), stock(variant, "cpu")
    randomise(trunk, seed=0)
    reference.load_state_dict(trunk.state_dict())
    x = torch.randn(1, 3, 97, 64)
    ours, theirs = trunk.eval()(x), reference.eval()(x)
    assert list(ours) == maps
    assert all(torch.equal(ours[a], theirs[b]) for a, b in zip(maps, ["stem", "s1", "s2", "s3", "s4"], strict=True))
    trunk.s2.b1.f.b.groups = 1
    with pytest.raises(RuntimeError, match="weight of size"):
        trunk(x)


def test_weights_with_the_papers_widths_are_refused():
    """The authors' own X-400MF ends with 384 channels: it does not slip into torchvision's network of 400."""
    source = FAMILY.sources["torchvision"]
    paper = stock("regnet_x_400mf", "cpu").state_dict()
    with pytest.raises(ValueError, match=r"of another shape: backbone\.s4\.b1.*384.*in the file.*400.*here"):
        import_into("regnet_x_400mf", source, paper, classes=1000)


@pytest.mark.parametrize("last", ["stem", "res2", "res4"])
def test_stages_behind_the_last_wanted_are_left_out(last):
    maps = ["stem", "res2", "res3", "res4", "res5"]
    trunk = build("regnet_x_400mf", out_features=[last])
    kept = maps[: maps.index(last) + 1]
    assert [name for name, _ in trunk.stage_modules()] == kept
    assert {key.split(".")[0] for key in trunk.state_dict()} == {"stem", "s1", "s2", "s3"}.intersection(
        {"stem", *(f"s{index}" for index in range(1, len(kept)))}
    )
    assert list(trunk.output_shape()) == list(trunk.eval()(torch.zeros(1, 3, 64, 64))) == [last]
    with pytest.raises(ValueError, match=r"no feature map 's4'.*res5.*OUT_FEATURES"):
        build("regnet_x_400mf", out_features=["s4"])


@pytest.mark.parametrize("stem", ["standard", "small"])
def test_the_small_stem_keeps_every_pixel_and_every_key(stem):
    maps = ["stem", "res2", "res3", "res4", "res5"]
    trunk = build("regnet_y_400mf", stem=stem, out_features=maps).eval()
    first = 1 if stem == "small" else 2
    sides = [trunk(torch.zeros(1, 3, 33, 33))[name].shape[-1] for name in maps]
    strides = [shape.stride for shape in trunk.output_shape().values()]
    assert strides == [first, 2 * first, 4 * first, 8 * first, 16 * first]
    assert sides == [-(-33 // stride) for stride in strides]
    plain = build("regnet_y_400mf").state_dict()
    assert {k: v.shape for k, v in trunk.state_dict().items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_dilated_map_holds_the_plain_one(output_stride):
    """Of each window of pixels the first is the one that the strided network has: nothing was lost but the stride."""
    plain = build("regnet_x_400mf").double().eval()
    randomise(plain, seed=0)
    dilated = make_trunk(Architecture("regnet_x_400mf"), output_stride=output_stride).double().eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 75, 97, dtype=torch.float64)
    expected, every = plain(x)["res5"], 32 // output_stride
    got = dilated(x)["res5"]
    assert got.shape[3] == -(-97 // output_stride)
    assert (got[:, :, ::every, ::every] - expected).abs().max() <= 1e-10 * expected.abs().max()
