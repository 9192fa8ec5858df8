"""What the sources of the ImageNet recipes say, typed from them: a recipe that leaves its source is seen.

Every hyperparameter of every recipe stands here, either in COMMON or in the recipe's own row. The rows come from the
papers and the files that the openings of the YAMLs name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from imgcls.config import get_config
from imgcls.config.loading import config_root, list_configs
from imgcls.solver import build_optimizer

ROOT = config_root()
RECIPES = [name for name in list_configs() if name.startswith("imagenet/") and "/Base-" not in name]
CROP = [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]]
COMMON: dict[str, Any] = {
    **{"MODEL.BACKBONE.DROP_PATH": 0, "DATALOADER.REPEATS": 1},
    **{"MODEL.LOSS.NAME": "CrossEntropy", "MODEL.LOSS.LABEL_SMOOTHING": 0, "MODEL.LOSS.TARGET_THRESHOLD": 0},
    **{"INPUT.TRAIN_SIZE": 224, "INPUT.TEST_SIZE": 224, "INPUT.TEST_RESIZE": 256, "INPUT.INTERPOLATION": "bilinear"},
    **{"INPUT.TRAIN_TRANSFORMS": CROP, "INPUT.MIXUP_ALPHA": 0, "INPUT.CUTMIX_ALPHA": 0, "INPUT.MIX_PROB": 1},
    **{"INPUT.MIX_SWITCH_PROB": 0.5, "SOLVER.OPTIMIZER": "SGD", "SOLVER.MOMENTUM": 0.9, "SOLVER.NESTEROV": False},
    **{"SOLVER.BETAS": [0.9, 0.999], "SOLVER.SQUARE_DECAY": 0.9, "SOLVER.EPS": 0},
    **{"SOLVER.IMS_PER_BATCH": None, "SOLVER.ACCUMULATE": 1, "SOLVER.MAX_EPOCHS": None},
    **{"SOLVER.BASE_LR": None, "SOLVER.BASE_LR_END": 0, "SOLVER.BIAS_LR_FACTOR": 1, "SOLVER.LAYER_DECAY": 1},
    **{"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.RESCALE_INTERVAL": False, "SOLVER.GAMMA": 0.1},
    **{"SOLVER.WARMUP_EPOCHS": 0, "SOLVER.WARMUP_ITERS": 0, "SOLVER.WARMUP_FACTOR": 0.01, "SOLVER.DECAY_EPOCHS": 0},
    **{"SOLVER.POLYNOMIAL_POWER": 1, "SOLVER.LR_SCALING": "linear", "SOLVER.LR_FOR_BATCH": 0},
    **{"SOLVER.WEIGHT_DECAY": None, "SOLVER.WEIGHT_DECAY_NORM": 0, "SOLVER.WEIGHT_DECAY_BIAS": None},
    **{"SOLVER.PARAM_OVERRIDES": [], "SOLVER.CLIP_GRADIENTS.ENABLED": False, "SOLVER.AMP.ENABLED": False},
    **{"SOLVER.EMA.ENABLED": False, "SOLVER.EMA.DECAY": 0.9999, "SOLVER.EMA.WARMUP": True, "SOLVER.SWA.ENABLED": False},
}
# Compared where a row has them: they count for one kind of clipping and of schedule only.
ONLY_THERE = ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.STEPS_EPOCHS")
STEPS = {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS_EPOCHS": [30, 60]}
ALL_DECAY = {"WEIGHT_DECAY": 1e-4, "WEIGHT_DECAY_NORM": 1e-4}
# pytorch/vision, references/classification/train.py: its defaults, on 8 GPUs.
TORCHVISION = {"IMS_PER_BATCH": 8 * 32, "BASE_LR": 0.1, "MAX_EPOCHS": 90, **STEPS, **ALL_DECAY}
# facebookresearch/deit, main.py: lr 5e-4, for 512 images; warmup-lr 1e-6, min-lr 1e-5, warmup-epochs 5.
DEIT = {
    **{"LABEL_SMOOTHING": 0.1, "INTERPOLATION": "bicubic", "TRAIN_TRANSFORMS": [["policy", "deit"]]},
    **{"MIXUP_ALPHA": 0.8, "CUTMIX_ALPHA": 1.0, "OPTIMIZER": "AdamW", "IMS_PER_BATCH": 1024, "LR_FOR_BATCH": 1024},
    **{"BASE_LR": 5e-4 * 1024 / 512, "BASE_LR_END": 1e-5, "WARMUP_EPOCHS": 5, "WARMUP_FACTOR": 1e-6 / 1e-3},
    **{"WEIGHT_DECAY": 0.05, "WEIGHT_DECAY_BIAS": 0, "MAX_EPOCHS": 300, "AMP.ENABLED": True},
}
TOKENS = [["backbone.pos_embed", {"weight_decay": 0.0}], ["backbone.cls_token", {"weight_decay": 0.0}]]
DEITS_OWN = {"DROP_PATH": 0.1, "REPEATS": 3, "PARAM_OVERRIDES": TOKENS}
# microsoft/Swin-Transformer, config.py: WARMUP_LR 5e-7, BASE_LR 5e-4, MIN_LR 5e-6, each for 512 images (main.py).
SWIN = {
    **DEIT,
    **{"BASE_LR": 2 * 5e-4, "BASE_LR_END": 2 * 5e-6, "WARMUP_EPOCHS": 20, "WARMUP_FACTOR": 5e-7 / 5e-4},
    **{"CLIP_GRADIENTS.ENABLED": True, "CLIP_GRADIENTS.CLIP_TYPE": "full_model", "CLIP_GRADIENTS.CLIP_VALUE": 5.0},
    "PARAM_OVERRIDES": [["*.relative_position_bias_table", {"weight_decay": 0.0}]],
}
# Wightman et al. 2021, table 2 (what the three columns share); warmup-lr 1e-4 and min-lr 1e-6 are timm's defaults.
STRIKES_BACK = {
    **{"LOSS.NAME": "BCE", "TARGET_THRESHOLD": 0.2, "INTERPOLATION": "bicubic", "TEST_RESIZE": round(224 / 0.95)},
    **{"CUTMIX_ALPHA": 1.0, "OPTIMIZER": "LAMB", "IMS_PER_BATCH": 2048, "LR_FOR_BATCH": 2048, "LR_SCALING": "sqrt"},
    **{"BASE_LR_END": 1e-6, "WARMUP_EPOCHS": 5, "WEIGHT_DECAY_BIAS": 0, "AMP.ENABLED": True},
}
A1_AND_A2 = {
    **{"TRAIN_TRANSFORMS": [["policy", "a1"]], "DROP_PATH": 0.05, "REPEATS": 3},
    **{"BASE_LR": 5e-3, "WARMUP_FACTOR": 1e-4 / 5e-3},
}
# pjreddie/darknet, cfg/darknet19.cfg and darknet53.cfg; saturation = exposure = .75 means a factor of 3/4 to 4/3.
DARKNET = {
    **{"IMS_PER_BATCH": 128, "BASE_LR": 0.1, "LR_SCHEDULER_NAME": "WarmupPolynomialLR", "POLYNOMIAL_POWER": 4},
    **{"WEIGHT_DECAY": 5e-4, "WEIGHT_DECAY_BIAS": 0},
}
DEPTHWISE = [["*.depthwise.weight", {"weight_decay": 0.0}]]


def darknet_rows(side: int) -> list[list[Any]]:
    factor = [0.75, pytest.approx(1 / 0.75, abs=1e-4)]
    place = [["random_affine", 7, 0, 1, 1], ["random_scale", side, 448], ["random_crop"], ["horizontal_flip", 0.5]]
    return [*place, ["color_jitter", factor, 0, factor, 0.1]]


# megvii-model/ShuffleNet-Series, train.py; the paper of V1, section 4.
SHUFFLENET = {
    **{"IMS_PER_BATCH": 1024, "BASE_LR": 0.5, "LR_SCHEDULER_NAME": "WarmupLinearLR", "MAX_EPOCHS": 240},
    **{"WEIGHT_DECAY": 4e-5, "WEIGHT_DECAY_BIAS": 0},
    "TRAIN_TRANSFORMS": [CROP[0], ["color_jitter", 0.4, 0.4, 0.4, 0.0], CROP[1]],
}
CAFFE_CROP = [["random_scale", 256, 256], ["random_crop"]]
SOURCES: dict[str, dict[str, Any]] = {
    "alexnet_sgd_90ep": {
        **{"IMS_PER_BATCH": 128, "BASE_LR": 0.01, "MAX_EPOCHS": 90, "WEIGHT_DECAY": 5e-4},
        # Three times by ten, when the error stands still.
        **{"LR_SCHEDULER_NAME": "PlateauLR", "BASE_LR_END": 1e-5, "TRAIN_TRANSFORMS": [["policy", "alexnet"]]},
    },
    "vgg16_sgd_74ep": {
        **{"IMS_PER_BATCH": 256, "BASE_LR": 0.01, "MAX_EPOCHS": 74, "WEIGHT_DECAY": 5e-4},
        **{"LR_SCHEDULER_NAME": "PlateauLR", "BASE_LR_END": 1e-5, "TRAIN_TRANSFORMS": [["policy", "vgg"]]},
        **{"TEST_SIZE": 384, "TEST_RESIZE": 384},
    },
    "vgg16_bn_sgd_90ep": {**TORCHVISION, "BASE_LR": 1e-2},
    # BVLC/caffe, models/bvlc_googlenet: quick_solver.prototxt and train_val.prototxt.
    "googlenet_sgd_60ep": {
        **{"IMS_PER_BATCH": 32, "BASE_LR": 0.01, "MAX_EPOCHS": 60, "WEIGHT_DECAY": 2e-4, "WEIGHT_DECAY_BIAS": 0},
        **{"BIAS_LR_FACTOR": 2, "LR_SCHEDULER_NAME": "WarmupPolynomialLR", "POLYNOMIAL_POWER": 0.5},
        "TRAIN_TRANSFORMS": [*CAFFE_CROP, ["horizontal_flip", 0.5]],
    },
    **{f"resnet{depth}_sgd_90ep": TORCHVISION for depth in (18, 34, 50, 101)},
    # The command in pytorch/vision's issue 3995; model-ema-steps 32, model-ema-decay 0.99998, lr-warmup-decay 0.01.
    "resnet50_torchvision_v2_600ep": {
        **{"IMS_PER_BATCH": 8 * 128, "LR_FOR_BATCH": 8 * 128, "BASE_LR": 0.5, "MAX_EPOCHS": 600},
        **{"WARMUP_EPOCHS": 5, "WARMUP_FACTOR": 0.01, "RESCALE_INTERVAL": True, "WEIGHT_DECAY": 2e-5},
        **{"LABEL_SMOOTHING": 0.1, "MIXUP_ALPHA": 0.2, "CUTMIX_ALPHA": 1.0, "REPEATS": 4},
        **{"TRAIN_SIZE": 176, "TEST_RESIZE": 232, "TRAIN_TRANSFORMS": [["policy", "torchvision_v2"]]},
        **{"EMA.ENABLED": True, "EMA.WARMUP": False},
        "EMA.DECAY": pytest.approx((1 - (1 - 0.99998) * 1024 * 32 / 600) ** (1 / 32), abs=1e-8),
    },
    "resnet50_a1_600ep": {
        **{**STRIKES_BACK, **A1_AND_A2, "MAX_EPOCHS": 600, "WEIGHT_DECAY": 0.01},
        **{"LABEL_SMOOTHING": 0.1, "MIXUP_ALPHA": 0.2},
    },
    "resnet50_a2_300ep": {**STRIKES_BACK, **A1_AND_A2, "MAX_EPOCHS": 300, "WEIGHT_DECAY": 0.02, "MIXUP_ALPHA": 0.1},
    "resnet50_a3_100ep": {
        **{**STRIKES_BACK, "MAX_EPOCHS": 100, "WEIGHT_DECAY": 0.02, "MIXUP_ALPHA": 0.1, "TRAIN_SIZE": 160},
        **{"TRAIN_TRANSFORMS": [["policy", "a3"]], "BASE_LR": 8e-3, "WARMUP_FACTOR": 1e-4 / 8e-3},
    },
    # forresti/SqueezeNet, SqueezeNet_v1.0: solver.prototxt and train_val.prototxt, which mirrors nothing.
    "squeezenet1_0_sgd_68ep": {
        **{"IMS_PER_BATCH": 32 * 16, "BASE_LR": 0.04, "MAX_EPOCHS": 68, "WEIGHT_DECAY": 2e-4},
        **{"LR_SCHEDULER_NAME": "WarmupLinearLR", "TRAIN_SIZE": 227, "TEST_SIZE": 227, "TRAIN_TRANSFORMS": CAFFE_CROP},
    },
    # Rates and length are not the source's; the decay is that of research/slim/nets/mobilenet_v1.py.
    "mobilenet_v1_sgd_90ep": {
        **{"IMS_PER_BATCH": 256, "BASE_LR": 0.1, "MAX_EPOCHS": 90, "WARMUP_EPOCHS": 5},
        **{"WEIGHT_DECAY": 4e-5, "WEIGHT_DECAY_BIAS": 0, "PARAM_OVERRIDES": DEPTHWISE},
    },
    "mobilenet_v2_rmsprop_300ep": {
        **{"OPTIMIZER": "RMSpropTF", "EPS": 1.0, "IMS_PER_BATCH": 96, "BASE_LR": 0.045, "MAX_EPOCHS": 300},
        **{"LR_SCHEDULER_NAME": "WarmupStepLR", "GAMMA": 0.98, "DECAY_EPOCHS": 1},
        **{"WEIGHT_DECAY": 4e-5, "WEIGHT_DECAY_BIAS": 0, "PARAM_OVERRIDES": DEPTHWISE},
    },
    "shufflenet_v1_g3_sgd_240ep": SHUFFLENET,
    "shufflenet_v2_x1_0_sgd_240ep": {**SHUFFLENET, "LABEL_SMOOTHING": 0.1},
    # tensorflow/tpu, models/official/efficientnet: main.py and utils.py.
    "efficientnet_b0_rmsprop_350ep": {
        **{"OPTIMIZER": "RMSpropTF", "EPS": 1e-3, "IMS_PER_BATCH": 4096, "LR_FOR_BATCH": 4096, "MAX_EPOCHS": 350},
        **{"BASE_LR": 0.016 * 4096 / 256, "LR_SCHEDULER_NAME": "WarmupStepLR", "GAMMA": 0.97, "DECAY_EPOCHS": 2.4},
        **{"WARMUP_EPOCHS": 5, "WARMUP_FACTOR": 0, "WEIGHT_DECAY": 1e-5, "LABEL_SMOOTHING": 0.1, "DROP_PATH": 0.2},
        **{"INTERPOLATION": "bicubic", "TRAIN_TRANSFORMS": [["policy", "autoaugment"]], "EMA.ENABLED": True},
    },
    "darknet19_sgd_160ep": {**DARKNET, "MAX_EPOCHS": 160, "TRAIN_TRANSFORMS": darknet_rows(224)},
    "darknet53_sgd_80ep": {
        **{**DARKNET, "MAX_EPOCHS": 80, "WARMUP_ITERS": 1000, "WARMUP_FACTOR": 0},
        **{"TRAIN_SIZE": 256, "TEST_SIZE": 256, "TRAIN_TRANSFORMS": darknet_rows(256)},
    },
    "darknet53_rows_sgd_90ep": {**TORCHVISION, "TRAIN_SIZE": 256, "TEST_SIZE": 256},
    **{f"deit_{size}_adamw_300ep": {**DEIT, **DEITS_OWN} for size in "sb"},
    **{f"swin_{size}_adamw_300ep": {**SWIN, "DROP_PATH": path} for size, path in (("t", 0.2), ("s", 0.3), ("b", 0.5))},
    # facebookresearch/ConvNeXt, TRAINING.md (8 GPUs, 128 images, update_freq 4) and main.py.
    "convnext_tiny_adamw_300ep": {
        **{**DEIT, "DROP_PATH": 0.1, "IMS_PER_BATCH": 4096, "LR_FOR_BATCH": 4096, "ACCUMULATE": 4},
        **{"BASE_LR": 4e-3, "BASE_LR_END": 1e-6, "WARMUP_EPOCHS": 20, "WARMUP_FACTOR": 0, "RESCALE_INTERVAL": True},
        **{"PARAM_OVERRIDES": [["*.gamma", {"weight_decay": 0.0}]], "EMA.ENABLED": True, "EMA.WARMUP": False},
    },
}
OWN = "imagenet/convformer_rows_sgd_90ep.yaml"  # an example, of no source


def values(cfg: CfgNode) -> dict[str, Any]:
    """Every key of ``cfg`` with its value."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        inner = values(value) if isinstance(value, CfgNode) else None
        found |= {key: value} if inner is None else {f"{key}.{name}": own for name, own in inner.items()}
    return found


def full(row: Mapping[str, Any]) -> dict[str, Any]:
    """``row`` with whole keys; the rows above leave out what they begin with."""
    names = [*COMMON, *ONLY_THERE]
    return {next(name for name in names if name.endswith(f".{key}")): value for key, value in row.items()}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != OWN])
def test_a_recipe_is_its_source(name: str) -> None:
    expected = COMMON | full(SOURCES[name.removeprefix("imagenet/").removesuffix(".yaml")])
    cfg = values(get_config(name))
    normless = "bn" not in name and name.split("/")[1].startswith(("alexnet", "vgg", "googlenet", "squeezenet"))
    if normless:  # nothing is there that this could be said of
        expected.pop("SOLVER.WEIGHT_DECAY_NORM")
    assert {key: cfg[key] for key in expected} == expected


@pytest.mark.parametrize("name", RECIPES)
def test_every_hyperparameter_that_a_recipe_sets_is_compared(name: str) -> None:
    path, keys = ROOT / name, set()
    while path.name != "Base-ClsNet.yaml":
        node = yaml.safe_load(path.read_text())
        path = (path.parent / node["_BASE_"]).resolve()
        loss = node.get("MODEL", {}).get("LOSS", {})
        nodes = {"SOLVER": node.get("SOLVER", {}), "INPUT": node.get("INPUT", {}), "MODEL.LOSS": loss}
        keys |= {key for kind, inside in nodes.items() for key in values(CfgNode({kind: inside}))}
    assert keys <= {*COMMON, *ONLY_THERE}


def test_every_recipe_has_its_row() -> None:
    assert {f"imagenet/{name}.yaml" for name in SOURCES} == set(RECIPES) - {OWN}


# ------------------------------------------------------------------------------------------------------- what decays


def decays(name: str) -> tuple[nn.Module, dict[str, float], dict[str, float]]:
    """The network on the meta device; weight decay and rate of each parameter."""
    cfg = get_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.HEAD.NUM_CLASSES = "meta", 5
    with torch.device("meta"):
        model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    of = {parameter: (group["weight_decay"], group["lr"]) for group in groups for parameter in group["params"]}
    named = {key: of[parameter] for key, parameter in model.named_parameters()}
    return model, {key: decay for key, (decay, _) in named.items()}, {key: rate for key, (_, rate) in named.items()}


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("deit_s_adamw_300ep", ["backbone.pos_embed", "backbone.cls_token"]),
        ("swin_t_adamw_300ep", ["relative_position_bias_table"]),
        ("convnext_tiny_adamw_300ep", [".gamma"]),
        ("resnet50_a2_300ep", []),
    ],
)
def test_what_decays_is_what_timm_lets_decay(name: str, spared: list[str]) -> None:
    groups = pytest.importorskip("timm.optim").param_groups_weight_decay
    model, found, _ = decays(f"imagenet/{name}.yaml")
    names = [key for key in found if any(part in key for part in spared)]
    without, _ = groups(model, 0.05, no_weight_decay_list=names)
    free = {id(parameter) for parameter in without["params"]}
    assert {key for key, decay in found.items() if not decay} == {
        key for key, parameter in model.named_parameters() if id(parameter) in free
    }
    assert bool(names) == bool(spared)


def test_what_decays_is_what_torchvision_lets_decay() -> None:
    from torchvision.ops._utils import split_normalization_params

    model, found, _ = decays("imagenet/resnet50_torchvision_v2_600ep.yaml")
    norms = {id(parameter) for parameter in split_normalization_params(model)[0]}
    assert {key for key, decay in found.items() if not decay} == {
        key for key, parameter in model.named_parameters() if id(parameter) in norms
    }
    _, found, _ = decays("imagenet/resnet18_sgd_90ep.yaml")
    assert set(found.values()) == {1e-4}


def test_what_decays_in_the_recipes_of_other_frameworks() -> None:
    for name in ("mobilenet_v1_sgd_90ep", "mobilenet_v2_rmsprop_300ep"):  # slim: neither depthwise kernels nor biases
        model, found, _ = decays(f"imagenet/{name}.yaml")
        kernels = {key for key, value in model.named_parameters() if value.dim() == 4 and value.shape[1] == 1}
        matrices = {key for key, value in model.named_parameters() if value.dim() > 1}
        assert len(kernels) > 12 and {key for key, decay in found.items() if decay} == matrices - kernels
    _, found, _ = decays("imagenet/efficientnet_b0_rmsprop_350ep.yaml")  # all but batch_normalization, biases too
    assert all(bool(decay) == (".norm." not in key) for key, decay in found.items())
    assert any(".se." in key and key.endswith(".bias") for key in found)
    _, found, rates = decays("imagenet/googlenet_sgd_60ep.yaml")  # lr_mult 2, decay_mult 0 for biases
    for key, decay in found.items():
        assert (decay, rates[key]) == ((0, 0.02) if key.endswith(".bias") else (2e-4, 0.01))
