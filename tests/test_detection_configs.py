"""Our detection configs are detectron2's 1x configs, but for the trunk, its weights and its preprocessing."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from imgcls.config.checks import check_keys
from imgcls.config.loading import config_root, get_config, list_configs, load_config
from imgcls.config.yaml_reading import read_yaml

ZOO = Path(str(files("detectron2") / "model_zoo" / "configs"))

BASES = {"Base-RetinaNet.yaml": "Base-RetinaNet.yaml", "Base-RCNN-FPN.yaml": "Base-RCNN-FPN.yaml"}
STOCK = {
    "retinanet_fpn": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "faster_rcnn_fpn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn_fpn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}
VARIANTS = {"mobilenet_v1": "mobilenet_v1_1.0", "resnet50": "resnet50"}
PUBLISHED = {
    "resnet50_retinanet_fpn": "box AP 37.4",
    "resnet50_faster_rcnn_fpn": "box AP 37.9",
    "resnet50_mask_rcnn_fpn": "box AP 38.6, mask AP 35.2",
}
LEAVES = [(trunk, detector) for trunk in VARIANTS for detector in STOCK]
NAMES = [f"{trunk}_{detector}" for trunk, detector in LEAVES]


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def stock(name: str) -> CfgNode:
    """As detectron2 itself reads it, with eval and all."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / name))
    return cfg


def differences(ours: CfgNode, theirs: CfgNode) -> dict[str, Any]:
    """Our value of each key that differs in value or type; keys that only imgcls has are not compared."""
    mine = leaves(ours)
    return {
        key: mine[key] for key, value in leaves(theirs).items() if (type(mine[key]), mine[key]) != (type(value), value)
    }


def test_the_folder_holds_two_bases_six_leaves_and_blood_cells() -> None:
    found = [name for name in list_configs() if name.startswith("detection/")]
    cells = [f"bccd_{trunk}_retinanet_fpn.yaml" for trunk in ("mobilenet_v1", "efficientnet_lite0")]
    leaves_here = [*(f"{name}.yaml" for name in NAMES), *cells]
    assert found == sorted(f"detection/{name}" for name in [*BASES, *leaves_here])


@pytest.mark.parametrize(("ours", "theirs"), BASES.items())
def test_a_base_resolves_to_detectron2s(ours: str, theirs: str) -> None:
    assert differences(get_config(f"detection/{ours}"), stock(theirs)) == {}


@pytest.mark.parametrize(("trunk", "detector"), LEAVES, ids=NAMES)
def test_a_leaf_differs_in_trunk_weights_and_preprocessing_only(trunk: str, detector: str) -> None:
    cfg = get_config(f"detection/{trunk}_{detector}.yaml")
    kind = "retinanet_" if detector == "retinanet_fpn" else ""
    assert differences(cfg, stock(STOCK[detector])) == {
        "MODEL.BACKBONE.NAME": f"build_imgcls_{kind}fpn_backbone",
        "MODEL.WEIGHTS": "backbone.pth",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    }
    backbone = cfg.MODEL.BACKBONE
    assert backbone == {
        "NAME": f"build_imgcls_{kind}fpn_backbone",
        "VARIANT": VARIANTS[trunk],
        "FREEZE_AT": 2,
        "NORM": "auto",
        "STEM": "standard",
        "OUT_FEATURES": [],
        "DROP_PATH": 0.0,
        "OUTPUT_STRIDE": 32,
        "CHECKPOINT": False,
        "ROWS": [],
        "PRETRAIN_SIZE": 0,
        "WINDOW_SIZE": 0,
        "REL_POS": False,
    }
    assert check_keys(cfg) == []


@pytest.mark.parametrize(("trunk", "detector"), LEAVES, ids=NAMES)
def test_a_leaf_leaves_every_other_key_of_ours_at_its_default(trunk: str, detector: str) -> None:
    ours, default = leaves(get_config(f"detection/{trunk}_{detector}.yaml")), leaves(load_config([]))
    only_ours = set(default) - set(leaves(get_cfg()))
    assert {key for key in only_ours if ours[key] != default[key]} == {"MODEL.BACKBONE.VARIANT"}


PLANTED = [
    "SOLVER.BASE_LR 0.011",
    "MODEL.MASK_ON True",
    "MODEL.RETINANET.IOU_LABELS [0,-1,2]",
    "INPUT.FORMAT BGR",
]


@pytest.mark.parametrize("planted", [*PLANTED, "MODEL.ANCHOR_GENERATOR.SIZES [[32,40.3175,50.797]]"])
def test_twin_a_planted_difference_is_seen(planted: str) -> None:
    key, value = planted.split()
    theirs = stock(STOCK["retinanet_fpn"])
    honest = differences(get_config("detection/resnet50_retinanet_fpn.yaml"), theirs)
    changed = differences(get_config("detection/resnet50_retinanet_fpn.yaml", [key, value]), theirs)
    assert changed != honest and set(changed) ^ set(honest) == {key}


def test_twin_one_detectors_leaf_is_not_the_others() -> None:
    cfg = get_config("detection/resnet50_mask_rcnn_fpn.yaml")
    assert differences(cfg, stock(STOCK["faster_rcnn_fpn"]))["MODEL.MASK_ON"] is True
    assert len(differences(cfg, stock(STOCK["retinanet_fpn"]))) > 10


def test_the_anchors_are_written_out() -> None:
    sizes = get_config("detection/Base-RetinaNet.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]
    text = (config_root() / "detection" / "Base-RetinaNet.yaml").read_text()
    assert yaml.safe_load(text)["MODEL"]["ANCHOR_GENERATOR"]["SIZES"] == sizes


@pytest.mark.parametrize("name", NAMES)
def test_a_leaf_opens_with_paper_command_hardware_and_figure(name: str) -> None:
    text = (config_root() / "detection" / f"{name}.yaml").read_text()
    opening = text[: text.index("_BASE_")]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert re.match(r"# Paper: .+ arXiv \d{4}\.\d{5}", opening)
    command = f"python tools/train_detector.py --config-file configs/detection/{name}.yaml"
    assert f"# Command: {command} MODEL.WEIGHTS backbone.pth\n" in opening
    assert "# Hardware: " in opening
    assert f"# published, not reproduced here: {PUBLISHED.get(name, 'no published figure')}" in opening


@pytest.mark.parametrize("name", NAMES)
def test_a_leaf_has_one_parent_and_the_parent_none(name: str) -> None:
    text = (config_root() / "detection" / f"{name}.yaml").read_text()
    parent = yaml.safe_load(text)["_BASE_"]
    assert parent in BASES
    assert "_BASE_" not in yaml.safe_load((config_root() / "detection" / parent).read_text())
    assert read_yaml(config_root() / "detection" / f"{name}.yaml")["VERSION"] == 2
