"""make_detector_config: what it writes is detectron2's stock config but for the trunk, its weights and its input."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from test_detection_configs import STOCK, differences, leaves, stock

import imgcls
from imgcls.checkpoint import write_tensors
from imgcls.config.checks import check_keys
from imgcls.modeling import Architecture, family_of
from imgcls.modeling.backbone_base import Trunk
from imgcls.structures import PreprocessingContract
from imgcls.transfer import detector_yaml
from imgcls.transfer.examine import CONTRACT, random_handover
from imgcls.transfer.handover import Handover
from imgcls.transfer.load import body_of

TOOL = "tools/make_detector_config.py"
DETECTORS = {"retinanet": "retinanet_fpn", "faster_rcnn": "faster_rcnn_fpn", "mask_rcnn": "mask_rcnn_fpn"}
# Variant -> the pyramid that its builders name.
VARIANTS = {
    "resnet50": "fpn",
    "mobilenet_v2_1.0": "fpn",
    "vit_b_32": "simple_fpn",
    "swin_t": "fpn",
    "squeezenet1_0": "fpn",
}
# From patches of 32 pixels no p2 can be made: the levels and their anchors begin at p3.
FROM_P3 = {
    "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[64], [128], [256], [512]],
}
CASES = [(variant, detector) for variant in VARIANTS for detector in DETECTORS]


def read_by_detectron2(file):
    """As in a script of one's own: detectron2's reader, after our keys were added."""
    cfg = imgcls.add_imgcls_config(get_cfg())
    cfg.merge_from_file(str(file))
    return cfg


def expected(variant: str, detector: str, weights: str) -> dict[str, Any]:
    kind = "retinanet_" if detector == "retinanet" else ""
    found: dict[str, Any] = {
        "MODEL.BACKBONE.NAME": f"build_imgcls_{kind}{VARIANTS[variant]}_backbone",
        "MODEL.WEIGHTS": weights,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    }
    if variant == "vit_b_32" and detector != "retinanet":
        found |= FROM_P3
    if not weights:
        found["MODEL.BACKBONE.FREEZE_AT"] = 0
    return found


def one_line(done) -> str:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return str(lines[0])


# -- against detectron2's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "detector"), CASES)
def test_without_weights_it_is_the_stock_config_but_for_these_keys(variant, detector, tool, tmp_path):
    file = tmp_path / "detector.yaml"
    done = tool(TOOL, "--detector", detector, "--variant", variant, "--output", file)
    assert done.returncode == 0, done.stderr
    cfg = read_by_detectron2(file)
    assert differences(cfg, stock(STOCK[DETECTORS[detector]])) == expected(variant, detector, "")
    # Of the keys that only imgcls has, the network's name alone.
    default = leaves(imgcls.add_imgcls_config(get_cfg()))
    ours = set(default) - set(leaves(get_cfg()))
    assert {key: leaves(cfg)[key] for key in ours if leaves(cfg)[key] != default[key]} == {
        "MODEL.BACKBONE.VARIANT": variant
    }
    assert check_keys(cfg) == []
    assert yaml.safe_load(file.read_text())["VERSION"] == 2


@pytest.mark.parametrize("detector", DETECTORS)
def test_twin_a_planted_difference_is_seen(detector, tmp_path):
    text = detector_yaml(detector, Architecture("resnet50"), CONTRACT)
    file = tmp_path / "detector.yaml"
    file.write_text(text.replace("BASE_LR: 0.0", "BASE_LR: 0.1"))
    assert file.read_text() != text
    found = differences(read_by_detectron2(file), stock(STOCK[DETECTORS[detector]]))
    assert set(found) - set(expected("resnet50", detector, "")) == {"SOLVER.BASE_LR"}


def test_twin_one_detectors_config_is_not_anothers(tmp_path):
    (tmp_path / "a.yaml").write_text(detector_yaml("mask_rcnn", Architecture("resnet50"), CONTRACT))
    cfg = read_by_detectron2(tmp_path / "a.yaml")
    assert differences(cfg, stock(STOCK["faster_rcnn_fpn"]))["MODEL.MASK_ON"] is True


@pytest.mark.parametrize(("variant", "detector"), [("vit_b_32", "mask_rcnn"), ("squeezenet1_0", "retinanet")])
def test_the_detector_can_be_built_from_it(variant, detector, tmp_path):
    own_norm = family_of(variant).own_norm(variant)
    file = tmp_path / "detector.yaml"
    file.write_text(detector_yaml(detector, Architecture(variant, norm=own_norm), CONTRACT))
    cfg = read_by_detectron2(file)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    body = body_of(model)
    assert isinstance(body, Trunk) and body.architecture == Architecture(variant, norm=own_norm)
    assert all(parameter.requires_grad for parameter in body.parameters())


# -- over a hand-over ------------------------------------------------------------------------------------------------


def written(folder, variant, **changes):
    """A hand-over file of random weights, with entries of it replaced; and its name."""
    given = random_handover(variant, 0)
    file = folder / "backbone.pth"
    write_tensors(file, Handover(**{**vars(given), **changes}).to_content())
    return file


GREY_WORLD = PreprocessingContract("RGB", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 32, 0, "nearest")


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_hand_over_says_variant_and_contract(detector, tool, tmp_path):
    weights, file = written(tmp_path, "squeezenet1_0", contract=GREY_WORLD), tmp_path / "detector.yaml"
    done = tool(TOOL, "--detector", detector, "--weights", weights, "--output", file)
    assert done.returncode == 0, done.stderr
    assert f"{file}: {detector} over squeezenet1_0; train it with" in done.stdout
    assert f"python tools/train_detector.py --config-file {file}" in done.stdout
    cfg = read_by_detectron2(file)
    wanted = expected("squeezenet1_0", detector, str(weights))
    wanted |= {"MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0], "MODEL.PIXEL_STD": [4.0, 5.0, 6.0]}
    # FREEZE_AT is detectron2's 2 again: there are weights to freeze.
    assert differences(cfg, stock(STOCK[DETECTORS[detector]])) == wanted
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.MODEL.BACKBONE.VARIANT == "squeezenet1_0"


def test_a_hand_over_says_its_options_stem_and_groups(tool, tmp_path):
    # The tensors are not looked at: the file's own description decides.
    sized = Architecture("vit_b_32", norm="LN", options={"pretrain_size": 384})
    small = Architecture("resnet18", stem="small", norm="GN")
    both = (
        (sized, {"VARIANT": "vit_b_32", "STEM": "standard", "NORM": "auto", "PRETRAIN_SIZE": 384}),
        (small, {"VARIANT": "resnet18", "STEM": "small", "NORM": "GN", "PRETRAIN_SIZE": 0}),
    )
    for architecture, wanted in both:
        weights, file = written(tmp_path, "squeezenet1_0", architecture=architecture), tmp_path / "detector.yaml"
        done = tool(TOOL, "--detector", "retinanet", "--weights", weights, "--output", file, "--overwrite")
        assert done.returncode == 0, done.stderr
        backbone = read_by_detectron2(file).MODEL.BACKBONE
        found = {key: backbone[key] for key in ("VARIANT", "STEM", "NORM", "PRETRAIN_SIZE")}
        assert found == wanted


@pytest.mark.parametrize("variant", ["squeezenet1_0", "mobilenet_v2_0.25"])
def test_the_hand_over_arrives_in_the_detector_that_was_written(variant, tool, tmp_path):
    weights, file = written(tmp_path, variant), tmp_path / "detector.yaml"
    done = tool(TOOL, "--detector", "faster_rcnn", "--weights", weights, "--output", file)
    assert done.returncode == 0, done.stderr
    cfg = read_by_detectron2(file)
    cfg.MODEL.DEVICE = "cpu"
    report = imgcls.load_backbone(build_model(cfg), weights, cfg)
    assert report.complete and len(report.loaded) == len(random_handover(variant, 0).weights)
    done = tool("tools/verify_transfer.py", "--weights", weights, "--config-file", file)
    assert done.returncode == 0 and "arrived bit for bit" in done.stdout


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_unless_asked_for(tool, tmp_path):
    file = tmp_path / "detector.yaml"
    file.write_text("mine\n")
    words = (TOOL, "--detector", "retinanet", "--variant", "resnet50", "--output", file)
    assert f"{file} exists; choose another --output, or add --overwrite" in one_line(tool(*words))
    assert file.read_text() == "mine\n"
    assert tool(*words, "--overwrite").returncode == 0
    assert read_by_detectron2(file).MODEL.BACKBONE.VARIANT == "resnet50"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--detector", "retinanet"], "give either --weights FILE, which knows its network, or --variant NAME"),
        (["--detector", "retinanet", "--weights", "a.pth", "--variant", "resnet50"], "give either --weights FILE"),
        (["--detector", "retinanet", "--variant", "resnet5"], "did you mean resnet50"),
        (["--detector", "retinanet", "--weights", "no/such.pth"], "no/such.pth"),
        (["--detector", "yolo", "--variant", "resnet50"], "invalid choice: 'yolo'"),
        (["--variant", "resnet50"], "required: --detector"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, told, tool, tmp_path):
    file = tmp_path / "detector.yaml"
    assert told in one_line(tool(TOOL, *words, "--output", file))
    assert not file.exists()


def test_more_mistakes(tool, tmp_path):
    words = (TOOL, "--detector", "retinanet", "--variant", "resnet50", "--output")
    assert "required: --output" in one_line(tool(*words[:-1]))
    assert "no/such" in one_line(tool(*words, tmp_path / "no/such/detector.yaml"))
    (tmp_path / "text.pth").write_text("not a file of weights")
    wrong = tool(TOOL, "--detector", "retinanet", "--weights", tmp_path / "text.pth", "--output", tmp_path / "d.yaml")
    assert "text.pth" in one_line(wrong)
    assert not (tmp_path / "d.yaml").exists()


def test_a_detector_that_is_none_is_an_error_in_python_too():
    with pytest.raises(ValueError, match=r"no such detector: got 'yolo'; allowed: retinanet, faster_rcnn, mask_rcnn"):
        detector_yaml("yolo", Architecture("resnet50"), CONTRACT)
