"""The stages of the smallest variant of every family: dilated, frozen, or left out."""

from __future__ import annotations

import pytest
import torch
from small_networks import VARIANTS, all_maps, relative, side, trunk_of
from torch import nn

from imgcls.modeling.backbone_base import NoSuchMap, Trunk

DILATABLE = [
    *("darknet53", "efficientnet_lite0", "efficientnet_v2_s", "mnasnet0_5", "mobilenet_v1_0.25", "mobilenet_v2_0.25"),
    *("mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
]


# -- output stride ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("variant", DILATABLE)
def test_the_last_stages_keep_their_resolution(variant, output_stride):
    strided, dilated = (all_maps(variant, output_stride=stride).eval() for stride in (32, output_stride))
    shapes = strided.output_shape()
    assert [shape.stride for shape in shapes.values()][-3:] == [8, 16, 32]
    assert {name: shape.stride for name, shape in dilated.output_shape().items()} == {
        name: min(shape.stride, output_stride) for name, shape in shapes.items()
    }
    assert {k: v.shape for k, v in dilated.state_dict().items()} == {
        k: v.shape for k, v in strided.state_dict().items()
    }
    for height, width in ((64, 96), (75, 90)):
        for name, value in dilated(torch.zeros(1, 3, height, width)).items():
            stride = dilated.output_shape()[name].stride
            assert value.shape[1:] == (shapes[name].channels, -(-height // stride), -(-width // stride)), name


# Without squeeze-and-excitation, which averages over pixels that the strided network has not.
@torch.no_grad()
@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("variant", ["resnet18", "mobilenet_v2_0.25", "darknet53"])
def test_every_second_or_fourth_pixel_is_the_strided_networks(variant, output_stride):
    strided, dilated = (all_maps(variant, output_stride=stride).double().eval() for stride in (32, output_stride))
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 96, 90, dtype=torch.float64)
    expected, found = strided(x), dilated(x)
    for name, value in expected.items():
        every = strided.output_shape()[name].stride // dilated.output_shape()[name].stride
        assert relative(found[name][:, :, ::every, ::every].double(), value) < 1e-6, name
    for module in dilated.res5.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.dilation, module.padding = (1, 1), (1, 1)
    every = 32 // output_stride
    assert relative(dilated(x)["res5"][:, :, ::every, ::every].double(), expected["res5"]) > 1e-3


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in DILATABLE])
def test_a_family_that_cannot_be_dilated_says_so(variant, output_stride):
    with pytest.raises(ValueError, match=rf"cannot be dilated: got {output_stride}; allowed: 32.*OUTPUT_STRIDE"):
        trunk_of(variant, output_stride=output_stride)


# -- freezing --------------------------------------------------------------------------------------------------------


def stages_that_move(trunk, variant):
    """Names of the stages that one step changes, and of the tensors that lie in none."""
    stages = {
        id(tensor): name
        for name, stage in trunk.stage_modules()
        for tensor in stage.state_dict(keep_vars=True).values()
    }
    before = {key: value.detach().clone() for key, value in trunk.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.SGD([p for p in trunk.parameters() if p.requires_grad], 0.1)
    total = sum(value.square().mean() for value in trunk(torch.randn(2, 3, *[side(variant)] * 2)).values())
    total.backward()
    optimizer.step()
    after = trunk.state_dict(keep_vars=True)
    return {stages.get(id(after[key]), key) for key in after if not torch.equal(after[key], before[key])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_moves_exactly_the_stages_that_are_not_frozen(variant):
    trunk = all_maps(variant) if variant != "vit_ti_16" else trunk_of(variant)
    count = 2
    trunk.freeze(count).train()
    # A stage of poolings alone has nothing to move (ShuffleNet's res2).
    names = [name for name, stage in trunk.stage_modules()[count:] if stage.state_dict()]
    moved = stages_that_move(trunk, variant)
    own = {"norm0.weight", "norm1.weight", "norm2.weight", "norm3.weight"} | {f"norm{i}.bias" for i in range(4)}
    assert moved - own == set(names)
    assert bool(moved & own) == (variant == "swin_t")


def test_twin_a_frozen_stage_in_training_mode_moves_its_statistics(monkeypatch):
    monkeypatch.setattr(Trunk, "train", lambda self, mode=True: nn.Module.train(self, mode))
    trunk = all_maps("resnet18").freeze(2).train()
    assert {"stem", "res2"} <= stages_that_move(trunk, "resnet18")


# -- maps ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "vit_ti_16"])
def test_a_map_of_the_middle_is_the_whole_networks_and_later_stages_are_left_out(variant):
    whole = all_maps(variant).eval()
    names = list(whole.output_shape())
    wanted = names[1:-1]
    part = trunk_of(variant, for_detector=True, out_features=wanted).eval()
    given = whole.state_dict()
    keys = set(part.state_dict())
    assert keys <= set(given)
    part.load_state_dict({key: given[key] for key in keys})
    x = torch.randn(1, 3, *[side(variant)] * 2)
    expected, found = whole(x), part(x)
    assert list(found) == wanted == list(part.output_shape())
    assert all(torch.equal(found[name], expected[name]) for name in wanted)
    assert len(part.stage_modules()) < len(whole.stage_modules())
    with pytest.raises(NoSuchMap, match=r"no feature map 'res9'; allowed: .*OUT_FEATURES"):
        trunk_of(variant, out_features=["res9"])


def test_a_vit_has_one_map():
    with pytest.raises(NoSuchMap, match=r"no feature map 'res4'; allowed: last_feat;"):
        trunk_of("vit_ti_16", for_detector=True, out_features=["res4"])
    trunk = trunk_of("vit_ti_16", out_features=["last_feat", "token"]).eval()
    assert [tuple(value.shape) for value in trunk(torch.zeros(1, 3, 32, 48)).values()] == [
        (1, 192, 2, 3),
        (1, 192, 1, 1),
    ]
