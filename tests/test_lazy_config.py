"""The trunks without YAML: build_variant, and a LazyConfig of detectron2's that trains from a hand-over."""

from __future__ import annotations

import copy
import json
import re
from importlib.resources import files

import pytest
import torch
from conftest import ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

import imgcls
from imgcls.checkpoint import write_tensors
from imgcls.modeling import Architecture, build_variant, make_trunk
from imgcls.transfer.examine import CONTRACT, random_handover
from imgcls.transfer.load import stated_by

EXAMPLE = ROOT / "configs/lazy/mobilenet_v2_retinanet_fpn.py"
STOCK = files("detectron2") / "model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.py"
FROZEN = ("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    file = tmp_path_factory.mktemp("lazy") / "backbone.pth"
    write_tensors(file, random_handover("mobilenet_v2_1.0", 0).to_content())
    return file


@pytest.fixture
def config():
    return LazyConfig.load(str(EXAMPLE))


def differences(ours, theirs, at=""):
    """Dotted name -> our value, of all that is not theirs; a whole call that calls something else counts as one."""
    if ours == theirs:
        return {}
    both = isinstance(ours, dict) and isinstance(theirs, dict)
    if not both or ours.get("_target_") != theirs.get("_target_"):
        return {at: ours}
    found = {}
    for key in ours | theirs:
        found |= differences(ours.get(key), theirs.get(key), f"{at}.{key}" if at else key)
    return found


def plain(config):
    return {key: OmegaConf.to_container(value) for key, value in config.items()}


# -- the example -----------------------------------------------------------------------------------------------------


def test_the_example_is_detectron2s_but_for_trunk_weights_and_input(config):
    found = differences(plain(config), plain(LazyConfig.load(str(STOCK))))
    assert found == {
        "train.init_checkpoint": "backbone.pth",
        "model.backbone.bottom_up": {
            "_target_": build_variant,
            "name": "mobilenet_v2_1.0",
            "out_features": "${..in_features}",
            "norm": "FrozenBN",
            "freeze_at": 2,
        },
        "model.backbone.top_block.in_channels": 320,
        "model.input_format": "RGB",
        "model.pixel_mean": [123.675, 116.28, 103.53],
        "model.pixel_std": [58.395, 57.12, 57.375],
        "dataloader.train.mapper.image_format": "RGB",
    }
    assert config.dataloader.test.mapper.image_format == "RGB"
    assert CONTRACT.differences(stated_by(instantiate(config.model))) == []


def test_twin_a_planted_difference_is_seen(config):
    before = differences(plain(config), plain(LazyConfig.load(str(STOCK))))
    config.optimizer.lr = 0.011
    del config.model.box2box_transform
    after = differences(plain(config), plain(LazyConfig.load(str(STOCK))))
    assert set(after) - set(before) == {"optimizer.lr", "model.box2box_transform"}


def test_it_can_be_saved_and_read_back(config, tmp_path):
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    trunk = instantiate(again.model.backbone).bottom_up
    assert trunk.architecture == Architecture("mobilenet_v2_1.0", norm="FrozenBN")
    # Plain Python values, which a checkpoint can hold.
    assert json.loads(json.dumps(trunk.architecture.to_dict()))["variant"] == "mobilenet_v2_1.0"
    assert type(trunk._out_features) is list


def two_steps(config, model):
    """Two steps with the config's own optimizer on random images; returns the losses."""
    optimizer_of = copy.deepcopy(config.optimizer)
    optimizer_of.params.model = model
    optimizer = instantiate(optimizer_of)
    torch.manual_seed(0)
    boxes = Instances((90, 70), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 50.0, 60.0]])), gt_classes=torch.tensor([1]))
    losses = []
    with EventStorage(0):
        for _ in range(2):
            image = torch.randint(0, 256, (3, 90, 70)).float()
            total = sum(model([{"image": image, "instances": boxes}]).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
    return losses


def test_it_trains_from_a_hand_over_that_the_stock_checkpointer_loads(config, backbone):
    model = instantiate(config.model).train()
    DetectionCheckpointer(model).load(str(backbone))
    given = torch.load(backbone, weights_only=True)["model"]
    arrived = model.backbone.bottom_up.state_dict()
    # FrozenBN counts no batches; nothing else stays behind, and nothing is left over.
    assert {key for key in given if not key.endswith("num_batches_tracked")} == set(arrived)
    assert all(torch.equal(arrived[key], given[key]) for key in arrived)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = two_steps(config, model)
    assert all(0 < loss < 100 for loss in losses)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith(FROZEN)}
    # FrozenBN: running statistics everywhere as they came.
    buffers = dict(model.backbone.bottom_up.named_buffers())
    assert all(torch.equal(buffers[key], given[key]) for key in buffers if "running" in key)


def test_load_backbone_proves_it_and_refuses_other_inputs(config, backbone):
    model = instantiate(config.model)
    report = imgcls.load_backbone(model, backbone)
    assert report.complete and len(report.loaded) == len(model.backbone.bottom_up.state_dict())
    config.model.input_format = "BGR"
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is 'BGR' in the config, the weights need 'RGB'"):
        imgcls.load_backbone(instantiate(config.model), backbone)
    config.model.input_format = None
    with pytest.raises(ValueError, match=r"does not say its input_format and pixel_mean; give load_backbone a cfg"):
        imgcls.load_backbone(instantiate(config.model), backbone)


def test_twin_frozen_stages_whose_weights_stayed_away_do_not_train(config, tmp_path):
    model = instantiate(config.model).train()
    with pytest.raises(ValueError, match=r"FREEZE_AT is 2, but 0 of \d+ tensors of the backbone"):
        two_steps(config, model)
    write_tensors(tmp_path / "other.pth", random_handover("mobilenet_v2_0.25", 0).to_content())
    model = instantiate(config.model).train()
    DetectionCheckpointer(model).load(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"FREEZE_AT is 2, but \d+ of \d+ tensors of the backbone"):
        two_steps(config, model)


# -- build_variant ---------------------------------------------------------------------------------------------------


def test_it_is_public_and_makes_what_make_trunk_makes():
    assert imgcls.build_variant is build_variant
    torch.manual_seed(0)
    ours = build_variant("resnet18", out_features=["res3", "res5"])
    torch.manual_seed(0)
    theirs = make_trunk(Architecture("resnet18"), out_features=["res3", "res5"], for_detector=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ours.output_shape() == theirs.output_shape() and list(ours.output_shape()) == ["res3", "res5"]
    assert list(build_variant("resnet18").output_shape()) == ["res5"]


def test_every_argument_arrives():
    trunk = build_variant(
        "resnet18", norm="GN", in_channels=4, stem="small", freeze_at=1, drop_path=0.2, output_stride=4
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())
    assert any(isinstance(m, nn.GroupNorm) for m in trunk.modules())
    assert trunk.stem.conv1.in_channels == 4 and trunk.stem.conv1.stride == (1, 1)
    assert [p.requires_grad for p in trunk.stem.parameters()] == [False] * 3
    assert trunk.res2[0].conv1.weight.requires_grad
    assert trunk.output_shape()["res5"].stride == 4
    assert trunk.res5[1].drop_path.p == pytest.approx(0.2)
    trunk = build_variant("vit_ti_16", pretrain_size=64, window_size=4, rel_pos=True)
    assert trunk.pos_embed.shape == (1, 1 + 4 * 4, 192) and trunk.blocks[0].window_size == 4
    assert trunk.architecture.options == {"pretrain_size": 64, "window_size": 4, "rel_pos": True}


def test_norms_that_a_network_brings_are_kept():
    assert build_variant("vit_ti_16").architecture.norm == "LN"
    assert build_variant("squeezenet1_1", norm="auto").architecture.norm == "none"
    frozen = build_variant("resnet18", norm="auto")
    assert frozen.architecture.norm == "FrozenBN"
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet17", {}, r"no such network: got 'resnet17'.*did you mean resnet18"),
        ("resnet18", {"window_size": 4}, r"resnet has no option window_size: got 4; allowed: no further options"),
        ("vit_ti_16", {"windows": 4}, r"vit has no option windows.*pretrain_size, window_size, rel_pos"),
        ("vit_ti_16", {"norm": "GN"}, r"norms of vit_ti_16 are not to be chosen \(LN\): got 'GN'; allowed: auto, LN"),
        ("resnet18", {"norm": "IN"}, r"unknown norm: got 'IN'; allowed: auto, BN"),
        ("resnet18", {"stem": "tiny"}, r"no such stem: got 'tiny'; allowed: standard, small"),
        ("vgg11_bn", {"drop_path": 0.1}, r"vgg has no stochastic depth"),
        ("vgg11_bn", {"output_stride": 16}, r"stages of vgg cannot be dilated"),
        ("resnet18", {"freeze_at": 6}, r"cannot freeze 6 stages.*allowed: 0 to 5"),
        ("resnet18", {"out_features": ["res7"]}, r"no feature map 'res7'"),
    ],
)
def test_mistakes_are_told(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_variant(name, **arguments)


def test_stock_fpn_takes_a_network_whose_maps_are_a_few_pixels_off():
    pyramid = LazyCall(FPN)(
        bottom_up=LazyCall(build_variant)(name="squeezenet1_1", out_features="${..in_features}"),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=32,
        top_block=LazyCall(LastLevelMaxPool)(),
    )
    levels = instantiate(pyramid)(torch.zeros(1, 3, 96, 160))
    assert {name: tuple(level.shape[2:]) for name, level in levels.items()} == {
        "p2": (24, 40),
        "p3": (12, 20),
        "p4": (6, 10),
        "p5": (3, 5),
        "p6": (2, 3),
    }
    raw = make_trunk(Architecture("squeezenet1_1", norm="none"), out_features=["res2", "res3", "res4"])
    with pytest.raises(RuntimeError, match="size of tensor"):
        FPN(raw, ["res2", "res3", "res4"], 32)(torch.zeros(1, 3, 96, 160))


def test_the_lines_in_the_docs_are_the_examples_backbone(config):
    text = (ROOT / "docs/detection.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "build_variant" in part)
    found: dict = {}
    exec(block, found)
    assert OmegaConf.to_container(found["backbone"]) == OmegaConf.to_container(config.model.backbone)
    assert instantiate(found["backbone"]).output_shape()["p7"].stride == 128
