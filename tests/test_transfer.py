"""The hand-over: every tensor bit for bit in stock detectron2, the same features, a refusal of all that is wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import nn

import imgcls
from imgcls.checkpoint import content_digest, write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.modeling import all_variants, family_of
from imgcls.transfer import body_of, convert, detector_fragment, load_backbone, read_handover, verify

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def trained_checkpoint(cfg, path):
    """A classifier's checkpoint with statistics as different from the initial ones as after training."""
    run = Run(*finalize(cfg))
    torch.manual_seed(5)
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    write_checkpoint(path, run.checkpoint(0), iteration=0)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture
def classifier(classifier_cfg, checkpoints):
    """``classifier(variant)``: the path of a checkpoint; made once per module and variant."""

    def make(variant="mobilenet_v1_0.25", *overrides):
        name = "_".join([variant, *map(str, overrides)]).replace("/", "_")
        path = checkpoints / f"{name}.pth"
        return path if path.exists() else trained_checkpoint(classifier_cfg(variant, *overrides), path)

    return make


@pytest.fixture
def exported(classifier, tmp_path):
    def make(variant="mobilenet_v1_0.25", *overrides, fold=False):
        path = tmp_path / f"{variant}.pth"
        convert(classifier(variant, *overrides), path, fold=fold, overwrite=True)
        return path

    return make


def resave(source, target, change):
    """A copy of a file with ``change`` applied to its content."""
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def trunk_of(checkpoint):
    model = torch.load(checkpoint, weights_only=True)["model"]
    return {
        k.removeprefix("backbone."): v
        for k, v in model.items()
        if k.startswith("backbone.") and not k.endswith("num_batches_tracked")
    }


# -- stock detectron2 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["fpn", "bare"])
@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18", "resnet50"])
def test_stock_checkpointer_gives_every_tensor_bit_for_bit(classifier, exported, detector_cfg, variant, body):
    cfg = detector_cfg("retinanet", variant)
    if body == "bare":
        # A head that takes maps of different widths, as a bare body has them.
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        cfg.MODEL.BACKBONE.NAME = family_of(variant).builder
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res3", "res4", "res5"]
    detector = build_model(cfg)
    DetectionCheckpointer(detector).load(str(exported(variant)))
    prefix = "backbone.bottom_up." if body == "fpn" else "backbone."
    state, expected = detector.state_dict(), trunk_of(classifier(variant))
    assert {k.removeprefix(prefix) for k in state if k.startswith(prefix)} >= set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[prefix + name], tensor), name
    assert any("running_var" in name for name in expected)


def test_stock_resnet_takes_it_and_computes_the_same(classifier, exported):
    """detectron2's own builder, no code of ours in the detector."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.STRIDE_IN_1X1", False),
            *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", MEAN, "MODEL.PIXEL_STD", STD, "MODEL.DEVICE", "cpu"),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
        ]
    )
    path, checkpoint = exported("resnet50"), classifier("resnet50")
    outcome = verify(path, cfg, checkpoint)
    assert outcome.passed, outcome.text()
    assert len(outcome.report.loaded) == len(trunk_of(checkpoint)) == 265
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    outcome = verify(path, cfg, checkpoint)
    assert len(outcome.report.loaded) == 265 and not outcome.passed
    assert "the features of" in outcome.text()


def test_no_trunk_key_is_the_tail_of_a_key_outside_the_body(detector_cfg):
    """Or detectron2's matching would put a trunk's tensor there as well."""
    outside = set()
    with torch.device("meta"):
        for detector in ("retinanet", "faster_rcnn", "mask_rcnn"):
            cfg = detector_cfg(detector)
            cfg.MODEL.DEVICE = "meta"
            outside |= {k for k in build_model(cfg).state_dict() if not k.startswith("backbone.bottom_up.")}
        trunks = {v: family_of(v).build(family_of(v).variants[v]).state_dict() for v in all_variants()}
    collisions = [
        (variant, key, other)
        for variant, keys in trunks.items()
        for key in keys
        for other in outside
        if other == key or other.endswith("." + key)
    ]
    assert collisions == []
    assert any(other.endswith(".conv.weight") for other in outside), "a trunk's `conv.weight` would be caught"


# -- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18"])
def test_a_good_file_passes_with_and_without_the_classifier(classifier, exported, detector_cfg, variant, detector):
    path = exported(variant)
    for reference in (None, classifier(variant)):
        outcome = verify(path, detector_cfg(detector, variant, "MODEL.BACKBONE.FREEZE_AT", 2), reference)
        assert outcome.passed, outcome.text()
        assert set(outcome.report.loaded) == set(trunk_of(classifier(variant)))
        assert max(outcome.differences["float32"].values()) <= 1e-5
        assert max(outcome.differences["float64"].values()) <= 1e-10


def renamed(content):
    content["model"] = {f"backbone.{k}": v for k, v in content["model"].items()}


def deeper(content):
    content["model"] = {f"backbone.bottom_up.{k}": v for k, v in content["model"].items()}


def swapped(content):
    content["model"]["stem.conv1.weight"] = content["model"]["stem.conv1.weight"].flip(1)


def one_missing(content):
    del content["model"]["res3.block0.depthwise.norm.running_var"]


def statistics_dropped(content):
    content["model"] = {k: v for k, v in content["model"].items() if "running" not in k}


def transposed(content):
    weight = content["model"]["res4.block1.pointwise.weight"]
    content["model"]["res4.block1.pointwise.weight"] = weight.transpose(0, 1).contiguous()


def wrong_shape(content):
    content["model"]["res5.block1.pointwise.weight"] = torch.zeros(7, 3, 1, 1)


def superfluous(content):
    content["model"]["res9.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed, r"0 of 135 tensors loaded.*keys begin with 'backbone\.'"),
        (deeper, r"0 of 135 tensors loaded.*keys begin with 'backbone\.bottom_up\.'"),
        (swapped, r"features of .* differ.*channels \(RGB, BGR\) are swapped"),
        (one_missing, r"134 of 135 tensors loaded; 1 missing: res3.block0.depthwise.norm.running_var"),
        (statistics_dropped, r"81 of 135 tensors loaded; 54 missing: stem"),
        (transposed, r"features of res4 differ"),
        (wrong_shape, r"1 of another shape: res5.block1.pointwise.weight \[7, 3, 1, 1\] in the file"),
        (superfluous, r"1 unexpected: res9.weight"),
    ],
)
@pytest.mark.parametrize("digest", ["stale", "fresh"])
def test_a_changed_file_fails_and_the_reason_is_said(exported, detector_cfg, tmp_path, change, reason, digest):
    import re

    path = resave(exported(), tmp_path / "changed.pth", change)
    if digest == "fresh":
        path = resave(path, path, lambda c: c.update(digest=content_digest(c)))
    outcome = verify(path, detector_cfg())
    assert not outcome.passed
    assert re.search(reason, outcome.text(), re.S), outcome.text()
    assert ("digest" in outcome.text()) == (digest == "stale")


def test_frozen_layers_that_were_not_loaded_are_an_error(exported, detector_cfg, tmp_path):
    def drop_stem(content):
        content["model"] = {k: v for k, v in content["model"].items() if not k.startswith("stem.")}

    path = resave(exported(), tmp_path / "changed.pth", drop_stem)
    outcome = verify(path, detector_cfg("retinanet", "mobilenet_v1_0.25", "MODEL.BACKBONE.FREEZE_AT", 1))
    assert "frozen tensors were not loaded" in outcome.text()
    outcome = verify(path, detector_cfg())
    assert "frozen" not in outcome.text() and not outcome.passed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.FORMAT", "BGR", r"INPUT.FORMAT is 'BGR' in the config, the weights need 'RGB'"),
        ("MODEL.PIXEL_MEAN", MEAN[::-1], r"PIXEL_MEAN is \[103.53, 116.28, 123.675\].*need \[123.675"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], r"PIXEL_STD is \[1.0, 1.0, 1.0\].*need \[58.395"),
        ("MODEL.BACKBONE.STEM", "small", r"BACKBONE.STEM is 'small' in the config, the weights are of 'standard'"),
        ("MODEL.BACKBONE.VARIANT", "mobilenet_v1_0.5", r"VARIANT is 'mobilenet_v1_0.5'.*are of 'mobilenet_v1_0.25'"),
        ("MODEL.BACKBONE.NORM", "GN", r"NORM is 'GN' in the config, the weights need 'BN'"),
    ],
)
def test_a_config_that_contradicts_the_contract_is_refused_everywhere(exported, detector_cfg, key, value, message):
    path = exported()
    cfg = detector_cfg("retinanet", "mobilenet_v1_0.25", key, value)
    if value == "small":
        cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    assert not verify(path, cfg).passed
    with pytest.raises(ValueError, match=message):
        load_backbone(build_model(cfg), path, cfg)
    cfg.MODEL.WEIGHTS = str(path)
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_a_small_stem_goes_into_a_detector_with_the_same_stem(exported, detector_cfg):
    path = exported("resnet18", "MODEL.BACKBONE.STEM", "small")
    overrides = ("MODEL.RETINANET.IN_FEATURES", ["p1", "p2", "p3", "p4", "p5"], "MODEL.BACKBONE.STEM", "small")
    outcome = verify(path, detector_cfg("retinanet", "resnet18", *overrides))
    assert outcome.passed, outcome.text()
    assert "STEM is 'standard' in the config" in verify(path, detector_cfg("retinanet", "resnet18")).text()


def test_group_norm_travels_as_group_norm(exported, detector_cfg):
    path = exported("mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "GN")
    cfg = detector_cfg("retinanet", "mobilenet_v1_0.25", "MODEL.BACKBONE.NORM", "GN")
    assert verify(path, cfg).passed
    assert not verify(path, detector_cfg()).passed


@pytest.mark.parametrize("variant", ["mobilenet_v1_0.25", "resnet18"])
def test_folding_serves_detectron2s_default_input(classifier, exported, detector_cfg, variant):
    path = exported(variant, fold=True)
    cfg = detector_cfg("retinanet", variant)
    assert not verify(path, cfg).passed
    cfg.merge_from_list(["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", MEAN[::-1], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]])
    for reference in (None, classifier(variant)):
        outcome = verify(path, cfg, reference)
        assert outcome.passed, outcome.text()
    original = trunk_of(classifier(variant))["stem.conv1.weight"].double()
    folded = read_handover(path).weights["stem.conv1.weight"].double()
    expected = (original / torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)).flip(1)
    assert (folded - expected).abs().max() <= 1e-7 * expected.abs().max()
    assert len(read_handover(path).weights) == len(trunk_of(classifier(variant)))


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_trunk_and_its_contract_and_nothing_of_the_head(classifier, exported):
    content = torch.load(exported("resnet18"), weights_only=True)
    assert content["__author__"] == "imgcls" and content["matching_heuristics"] is True
    assert set(content["model"]) == set(trunk_of(classifier("resnet18")))
    assert not any(k.startswith(("head.", "backbone.")) or "num_batches" in k for k in content["model"])
    notes = content["imgcls"]
    assert notes["contract"]["pixel_mean"] == MEAN and notes["contract"]["input_format"] == "RGB"
    assert notes["architecture"] == {
        "variant": "resnet18",
        "stem": "standard",
        "norm": "BN",
        "options": {},
    }
    assert notes["classes"] == list("0123456789")
    assert set(notes["probe"]["means"]) == {"stem", "res2", "res3", "res4", "res5"}
    assert all(m.dtype == torch.float64 for m in notes["probe"]["means"].values())
    json.dumps({k: v for k, v in notes.items() if k != "probe"})


def test_what_cannot_be_converted_is_refused(classifier, exported, tmp_path):
    path = exported()
    with pytest.raises(ValueError, match=r"no checkpoint of an imgcls classifier.*--weights"):
        convert(path, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=r"exists.*--overwrite"):
        convert(classifier(), path)
    with pytest.raises(ValueError, match=r"is a \.pth"):
        convert(classifier(), tmp_path / "backbone.pkl")
    with pytest.raises(ValueError, match=r"there is no file"):
        convert(tmp_path / "none.pth", tmp_path / "out.pth")
    broken = resave(classifier(), tmp_path / "broken.pth", lambda c: c["model"].pop("backbone.stem.conv1.weight"))
    with pytest.raises(ValueError, match=r"damaged or was changed"):
        convert(broken, tmp_path / "out.pth")
    resave(broken, broken, lambda c: c.pop("digest"))
    with pytest.raises(ValueError, match=r"134 of 135 tensors loaded; 1 missing: stem.conv1.weight"):
        convert(broken, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_the_fragment_makes_a_detector_config_that_verifies(exported, detector_cfg, tmp_path):
    path = exported("mobilenet_v1_0.25", "MODEL.BACKBONE.STEM", "small")
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text(detector_fragment(read_handover(path), path))
    base = imgcls.config.find_config("detection/Base-RetinaNet.yaml")
    cfg = imgcls.load_config(
        [base, fragment], ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.IN_FEATURES", "['p2','p3','p4','p5','p6']"]
    )
    assert verify(path, cfg).passed


# -- one's own detector script ---------------------------------------------------------------------------------------


def test_load_backbone_fills_a_detector_and_reports(classifier, exported, detector_cfg):
    cfg = detector_cfg("faster_rcnn")
    detector = build_model(cfg)
    others = {k: v.clone() for k, v in detector.state_dict().items() if not k.startswith("backbone.bottom_up.")}
    report = load_backbone(detector, exported(), cfg)
    assert report.complete and len(report.loaded) == 135
    body = body_of(detector).state_dict()
    assert all(torch.equal(body[k], v) for k, v in trunk_of(classifier()).items())
    assert all(torch.equal(detector.state_dict()[k], v) for k, v in others.items())


def test_load_backbone_refuses_and_changes_nothing(classifier, exported, detector_cfg, tmp_path):
    cfg = detector_cfg()
    detector = build_model(cfg)
    before = copy.deepcopy(detector.state_dict())
    stale = resave(exported(), tmp_path / "stale.pth", one_missing)
    fresh = resave(stale, tmp_path / "fresh.pth", lambda c: c.update(digest=content_digest(c)))
    torch.save({}, tmp_path / "empty.pth")
    for path, message in (
        (stale, r"digest"),
        (fresh, r"134 of 135 tensors loaded; 1 missing"),
        (classifier(), r"classifier's checkpoint.*convert_to_detection"),
        (tmp_path / "empty.pth", r"not written by convert_to_detection"),
    ):
        with pytest.raises(ValueError, match=message):
            load_backbone(detector, path, cfg)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    with pytest.raises(ValueError, match="has no backbone"):
        load_backbone(nn.Linear(2, 2), exported(), cfg)


def one_step_of_training(detector):
    """A training forward, as a stock loop does it first."""
    from detectron2.structures import Boxes, Instances

    instances = Instances((64, 64))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])), torch.tensor([1])
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    from detectron2.utils.events import EventStorage

    with EventStorage():
        return detector.train()([{"image": image, "instances": instances}])


@pytest.mark.parametrize("file", ["prefixed", "empty", "other"])
def test_a_stock_loop_does_not_start_from_weights_that_did_not_arrive(
    classifier, exported, detector_cfg, tmp_path, file
):
    """detectron2 alone warns and trains from random weights."""
    path = tmp_path / "file.pth"
    content = {"prefixed": {f"net.{k}": v for k, v in trunk_of(classifier()).items()}, "empty": {}, "other": {}}[file]
    if file == "other":
        content = {"backbone.bottom_up." + k: v for k, v in trunk_of(classifier("resnet18")).items()}
    torch.save({"model": content, "matching_heuristics": file == "prefixed"}, path)
    cfg = detector_cfg("retinanet", "mobilenet_v1_0.25", "MODEL.WEIGHTS", str(path))
    detector = build_model(cfg)
    DetectionCheckpointer(detector).load(str(path))
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is .*but 0 of 135 tensors of the backbone"):
        one_step_of_training(detector)
    good = detector_cfg("retinanet", "mobilenet_v1_0.25", "MODEL.WEIGHTS", str(exported()))
    detector = build_model(good)
    DetectionCheckpointer(detector).load(good.MODEL.WEIGHTS)
    assert one_step_of_training(detector)


def test_frozen_stages_need_weights(exported, detector_cfg):
    cfg = detector_cfg("retinanet", "mobilenet_v1_0.25", "MODEL.BACKBONE.FREEZE_AT", 2)
    detector = build_model(cfg)
    with pytest.raises(ValueError, match=r"FREEZE_AT is 2, but 0 of 35 tensors"):
        one_step_of_training(detector)
    load_backbone(detector, exported(), cfg)
    assert one_step_of_training(detector)


def test_a_classifiers_checkpoint_given_to_a_detector_is_told_to_be_converted(classifier, detector_cfg):
    with pytest.raises(ValueError, match=r"is a classifier's checkpoint.*convert_to_detection --weights"):
        build_model(detector_cfg("retinanet", "mobilenet_v1_0.25", "MODEL.WEIGHTS", str(classifier())))


def test_a_detectors_own_checkpoint_passes_the_guard(exported, detector_cfg, tmp_path):
    cfg = detector_cfg()
    detector = build_model(cfg)
    load_backbone(detector, exported(), cfg)
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
    again = build_model(cfg)
    DetectionCheckpointer(again).load(cfg.MODEL.WEIGHTS)
    assert one_step_of_training(again)


def test_an_fpn_without_inputs_is_refused(plain_cfg):
    from detectron2.modeling import build_backbone

    plain_cfg.MODEL.BACKBONE.NAME = "build_imgcls_fpn_backbone"
    plain_cfg.MODEL.BACKBONE.VARIANT = "resnet18"
    with pytest.raises(ValueError, match=r"pyramid has no input.*MODEL.FPN.IN_FEATURES"):
        build_backbone(plain_cfg, ShapeSpec(channels=3))
