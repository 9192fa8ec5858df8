"""Maps that are a few pixels off, under a pyramid: mended against a slow reference, with the trunk left as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from torch.nn import functional as F

from imgcls.config import get_config
from imgcls.modeling import Architecture, fitting, make_trunk
from imgcls.modeling.fitting import fit_to_strides, resized_at_edges
from imgcls.transfer.detector_config import detector_keys
from imgcls.transfer.examine import CONTRACT, plain, step_problems

# -- edges -----------------------------------------------------------------------------------------------------------


def slowly(x, height, width):
    """Pixel by pixel: half of the difference (rounded down) before the map, the rest behind it."""
    out = np.empty((*x.shape[:2], height, width), x.dtype)
    for i in range(height):
        for j in range(width):
            places = []
            for at, wanted, given in ((i, height, x.shape[2]), (j, width, x.shape[3])):
                if wanted >= given:
                    at -= (wanted - given) // 2
                else:
                    at += (given - wanted) // 2
                places.append(min(max(at, 0), given - 1))
            out[:, :, i, j] = x[:, :, places[0], places[1]]
    return out


SIZES = [
    *((7, 9), (8, 9), (7, 8), (9, 12), (10, 8)),  # as it is, or larger by 1, 2, 3
    *((6, 9), (5, 9), (4, 5), (3, 7)),  # smaller by 1 to 4
    *((9, 7), (8, 6), (5, 10), (6, 11), (4, 12)),  # larger one way and smaller the other
]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_edges_are_repeated_or_cut_off_as_in_the_slow_reference(height, width):
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 8))
    found = resized_at_edges(torch.from_numpy(x), height, width)
    assert tuple(found.shape) == (2, 3, height, width)
    np.testing.assert_array_equal(found.numpy(), slowly(x, height, width))


def test_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0]])[None, None]
    assert resized_at_edges(x, 1, 6).flatten().tolist() == [1, 1, 2, 3, 3, 3]
    assert resized_at_edges(x, 2, 1).tolist() == [[[[2.0], [2.0]]]]
    assert resized_at_edges(x, 1, 2).flatten().tolist() == [1, 2]
    assert resized_at_edges(x, 1, 3) is x


@pytest.mark.parametrize("halves", [lambda d: (d, 0), lambda d: (0, d), lambda d: ((d + 1) // 2, d // 2)])
def test_twin_another_division_of_the_difference_is_seen(halves, monkeypatch):
    monkeypatch.setattr(fitting, "_halves", halves)
    x = np.random.default_rng(0).normal(size=(1, 1, 7, 8))
    wrong = []
    for height, width in SIZES:
        found = resized_at_edges(torch.from_numpy(x), height, width)
        wrong.append(found.shape[2:] != (height, width) or not np.array_equal(found, slowly(x, height, width)))
    assert any(wrong)


def test_gradients_reach_the_pixels_that_are_left():
    x = torch.zeros(1, 1, 4, 5, requires_grad=True)
    resized_at_edges(x, 6, 3).sum().backward()
    assert x.grad[0, 0].tolist() == [[0, 2, 2, 2, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 2, 2, 2, 0]]


# -- trunks ----------------------------------------------------------------------------------------------------------

# Variant -> its maps, and the level below the last that is pooled.
AWKWARD = {
    "squeezenet1_1": (["stem", "res2", "res3", "res4"], "res5"),
    "squeezenet1_0": (["res2", "res3", "res4"], "res5"),
    "classic_cnn_8": (["res2", "res3", "res4"], "res5"),
    "alexnet": (["res2", "res3", "res4", "res5"], ""),
    "inception_v3": (["res2", "res3", "res4", "res5"], ""),
    "googlenet": (["res2", "res3", "res4", "res5"], ""),
    "vgg11_bn": (["res2", "res3", "res4", "res5"], ""),
    "vit_ti_16": (["last_feat"], ""),
}


def ceil_of(value, stride):
    return -(-value // stride)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 128), (101, 135), (127, 98)])
@pytest.mark.parametrize("variant", AWKWARD)
def test_calls_return_maps_of_the_size_that_the_stride_says_and_forward_what_it_did(variant, size):
    names, extra = AWKWARD[variant]
    trunk = make_trunk(plain(variant), out_features=names, for_detector=True).eval()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    raw, shapes = trunk(x), trunk.output_shape()
    fit_to_strides(trunk, extra)
    again = trunk.forward(x)
    assert list(again) == names and all(torch.equal(again[name], raw[name]) for name in names)
    fitted = trunk(x)
    assert list(fitted) == list(trunk.output_shape()) == names + ([extra] if extra else [])
    for name, value in fitted.items():
        stride = trunk.output_shape()[name].stride
        assert tuple(value.shape[2:]) == (ceil_of(size[0], stride), ceil_of(size[1], stride)), name
        assert value.shape[1] == trunk.output_shape()[name].channels
    for name in names:
        expected = torch.from_numpy(slowly(raw[name].numpy(), *fitted[name].shape[2:]))
        assert torch.equal(fitted[name], expected)
        assert trunk.output_shape()[name] == shapes[name]
    if extra:
        assert trunk.output_shape()[extra].stride == 32
        last = F.pad(fitted[names[-1]], (0, 1, 0, 1), value=float("-inf"))
        windows = last.unfold(2, 2, 2).unfold(3, 2, 2)
        assert torch.equal(fitted[extra], windows.amax(dim=(-2, -1)))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["alexnet", "inception_v3", "squeezenet1_1"])
def test_twin_as_they_are_the_maps_do_not_fit(variant):
    names, _ = AWKWARD[variant]
    trunk = make_trunk(plain(variant), out_features=names).eval()
    raw = trunk(torch.zeros(1, 3, 101, 135))
    off = [name for name, v in raw.items() if v.shape[2] != ceil_of(101, trunk.output_shape()[name].stride)]
    assert off


def pyramid_cfg(detector, variant, *words):
    """The shipped YAML of a detector over ``variant``, with narrow levels and heads."""
    keys = detector_keys(plain(variant), CONTRACT, detector, "")
    small = ("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FPN.OUT_CHANNELS", 32)
    heads = ("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16)
    flat = [word for pair in keys.items() for word in pair]
    return get_config(f"detection/mobilenet_v1_{detector}_fpn.yaml", [*flat, *small, *heads, *words])


def test_a_level_two_below_the_last_is_refused_and_a_name_that_is_none_too():
    for missing in ("res6", "p5", "last_feat"):
        cfg = pyramid_cfg("retinanet", "squeezenet1_1", "MODEL.FPN.IN_FEATURES", ["res3", "res4", missing])
        with pytest.raises(ValueError, match=rf"no feature map '{missing}'; allowed: stem, res2, res3, res4;"):
            build_model(cfg)


def test_without_a_pyramid_maps_are_as_they_are():
    cfg = pyramid_cfg("retinanet", "squeezenet1_1", "MODEL.BACKBONE.NAME", "build_imgcls_squeezenet_backbone")
    cfg.MODEL.BACKBONE.OUT_FEATURES = ["res4"]
    trunk = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3)).eval()
    x = torch.zeros(1, 3, 101, 135)
    assert trunk(x)["res4"].shape == make_trunk(Architecture("squeezenet1_1", norm="none"))(x)["res4"].shape


# -- detectors -------------------------------------------------------------------------------------------------------


# pycocotools' rasterised masks, read by numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("size", [96, 109])
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize("variant", ["squeezenet1_1", "alexnet", "inception_v3", "vit_ti_16"])
def test_detectors_build_and_train_a_step(variant, detector, size):
    cfg = pyramid_cfg(detector, variant)
    masks = detector == "mask_rcnn"
    assert masks is cfg.MODEL.MASK_ON
    assert step_problems(cfg, size) == []


def test_twin_a_step_over_maps_that_are_off_fails(monkeypatch):
    monkeypatch.setattr(fitting, "resized_at_edges", lambda x, height, width: x)
    with pytest.raises((RuntimeError, IndexError, AssertionError)):
        step_problems(pyramid_cfg("retinanet", "inception_v3"), 109)
