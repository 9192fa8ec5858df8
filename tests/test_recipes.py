"""Every recipe: its header tells the truth about it, its network and optimizer are built, it takes a step."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import cos, floor, pi
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from imgcls.config import get_config, require_sound, resolve_durations
from imgcls.config.loading import config_root, list_configs
from imgcls.engine import TrainStep
from imgcls.modeling import family_of
from imgcls.solver import build_optimizer, build_schedule, scale_learning_rate
from imgcls.structures import Batch

IMAGENET = 1_281_167
ROOT = config_root()
FOLDERS = ("imagenet/", "folder/", "cifar10/", "mnist/", "quick/")
RECIPES = [
    name
    for name in list_configs()
    if name.startswith(FOLDERS) and "/Base-" not in name
    if get_config(name).MODEL.META_ARCHITECTURE == "ClsNet"
]
# Top-1 as published, typed from the papers and from the libraries' pages.
PUBLISHED = {
    "alexnet_sgd_90ep": 59.3,
    "vgg16_sgd_74ep": 74.4,
    "vgg16_bn_sgd_90ep": 73.36,
    "googlenet_sgd_60ep": 68.7,
    "resnet18_sgd_90ep": 69.76,
    "resnet34_sgd_90ep": 73.31,
    "resnet50_sgd_90ep": 76.13,
    "resnet101_sgd_90ep": 77.37,
    "resnet50_torchvision_v2_600ep": 80.86,
    "resnet50_a1_600ep": 80.4,
    "resnet50_a2_300ep": 79.8,
    "resnet50_a3_100ep": 78.1,
    "squeezenet1_0_sgd_68ep": 57.5,
    "mobilenet_v1_sgd_90ep": 70.6,
    "mobilenet_v2_rmsprop_300ep": 72.0,
    "shufflenet_v1_g3_sgd_240ep": 67.4,
    "shufflenet_v2_x1_0_sgd_240ep": 69.4,
    "efficientnet_b0_rmsprop_350ep": 77.1,
    "darknet19_sgd_160ep": 72.9,
    "darknet53_sgd_80ep": 77.2,
    "darknet53_rows_sgd_90ep": 77.2,
    "deit_s_adamw_300ep": 79.8,
    "deit_b_adamw_300ep": 81.8,
    "swin_t_adamw_300ep": 81.3,
    "swin_s_adamw_300ep": 83.0,
    "swin_b_adamw_300ep": 83.5,
    "convnext_tiny_adamw_300ep": 82.1,
}
# What takes too long for a test -> the smallest relative.
SMALLEST = {
    "resnet101": "resnet18",
    "resnet34": "resnet18",
    "vgg16_bn": "vgg11_bn",
    "vgg16": "vgg11",
    "darknet53": "cspdarknet53",
    "vit_s_16": "vit_ti_16",
    "vit_b_16": "vit_ti_16",
    "swin_s": "swin_t",
    "swin_b": "swin_t",
}
# Dropout before classifiers, from the papers (GoogLeNet: 0.7 in the auxiliary heads); the others have none.
DROPOUT = {
    **{"alexnet": {0.5}, "vgg": {0.5}, "googlenet": {0.4, 0.7}, "squeezenet": {0.5}},
    **{"mobilenet_v2": {0.2}, "efficientnet": {0.2}, "digits_classic_cnn": {0.5}},
}
CLASSES = 5


def opening(name: str) -> str:
    """The comment above the first key, its lines joined where one goes on in the next."""
    text = (ROOT / name).read_text()
    lines = [line.removeprefix("#") for line in text[: text.index("_BASE_")].splitlines()]
    return "\n".join(lines).replace("\n   ", "").replace("\n ", "\n").strip()


def on_device(name: str, device: str, *overrides: Any) -> CfgNode:
    cfg = get_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.HEAD.NUM_CLASSES, cfg.SEED = device, "", CLASSES, 0
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.fixture(params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------------------------------------------------------ headers


def test_a_recipe_opens_with_what_it_is(name: str) -> None:
    lines = opening(name).splitlines()
    assert "command" not in lines[0] and len(lines[0]) > 20
    (command,) = [line for line in lines if line.startswith("command:")]
    # The recipe that --data alone stands for is not named.
    assert f"--config-file configs/{name}" in command or name == "folder/from_scratch.yaml"
    assert len([line for line in lines if line.startswith("hardware:")]) == 1


def test_the_figure_is_the_published_one_and_the_one_that_is_judged(name: str) -> None:
    expected = get_config(name).TEST.EXPECTED_RESULTS
    figure = re.search(r"published, not reproduced here: top-1 ([\d.]+) %", opening(name))
    assert bool(expected) == bool(figure or "measured: " in opening(name))
    if figure:
        ((_, metric, value, tolerance),) = expected
        published = PUBLISHED[name.removeprefix("imagenet/").removesuffix(".yaml")]
        assert (metric, value, float(figure[1])) == ("top1", published, published)
        assert 0 < tolerance <= 3


def test_torchvisions_figures_and_evaluation_are_those_of_its_weights() -> None:
    from torchvision import models

    for name, weights in (
        ("resnet18_sgd_90ep", models.ResNet18_Weights.IMAGENET1K_V1),
        ("resnet34_sgd_90ep", models.ResNet34_Weights.IMAGENET1K_V1),
        ("resnet50_sgd_90ep", models.ResNet50_Weights.IMAGENET1K_V1),
        ("resnet101_sgd_90ep", models.ResNet101_Weights.IMAGENET1K_V1),
        ("vgg16_bn_sgd_90ep", models.VGG16_BN_Weights.IMAGENET1K_V1),
        ("resnet50_torchvision_v2_600ep", models.ResNet50_Weights.IMAGENET1K_V2),
    ):
        assert PUBLISHED[name] == pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], abs=0.005)
        node, theirs = get_config(f"imagenet/{name}.yaml").INPUT, weights.transforms()
        assert (theirs.resize_size, theirs.crop_size) == ([node.TEST_RESIZE], [node.TEST_SIZE])
        assert theirs.interpolation.value == node.INTERPOLATION


def test_every_published_recipe_is_there() -> None:
    there = {name.removeprefix("imagenet/").removesuffix(".yaml") for name in RECIPES if name.startswith("imagenet/")}
    assert there - set(PUBLISHED) == {"convformer_rows_sgd_90ep"} and set(PUBLISHED) <= there


def test_a_recipe_has_one_parent_and_at_most_one_grandparent(name: str) -> None:
    chain = [ROOT / name]
    while (base := yaml.safe_load(chain[-1].read_text()).get("_BASE_")) is not None:
        assert isinstance(base, str)
        chain.append((chain[-1].parent / base).resolve())
    assert len(chain) <= 3 and chain[-1] == ROOT / "Base-ClsNet.yaml"


# ---------------------------------------------------------------------------------------------------- built and stepped


def test_the_whole_network_is_built_with_its_optimizer(name: str) -> None:
    """On the meta device: shapes without memory. Patterns of parameters must match, and decay is what is said."""
    cfg = on_device(name, "meta")
    require_sound(cfg)
    with torch.device("meta"):
        model = build_model(cfg)
    decays = {
        parameter: group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    assert set(decays) == set(model.parameters())
    dropouts = {module.p for module in model.head.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == next((own for family, own in DROPOUT.items() if f"/{family}" in name), {0.0})
    if cfg.SOLVER.WEIGHT_DECAY_BIAS == 0:
        named = {key: decays[value] for key, value in model.named_parameters()}
        none = {key for key, decay in named.items() if decay == 0}
        assert all(named[key] == 0 for key in named if key.endswith(".bias"))
        assert none >= {key for key, value in model.named_parameters() if value.dim() == 1 and ".gamma" in key}
        assert 0 < len(none) < len(named)


def batch_for(cfg: CfgNode) -> Batch:
    torch.manual_seed(0)
    side = cfg.INPUT.TRAIN_SIZE
    return Batch(torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8), torch.arange(4) % CLASSES)


def shrunk(cfg: CfgNode) -> CfgNode:
    variant = SMALLEST.get(cfg.MODEL.BACKBONE.VARIANT, cfg.MODEL.BACKBONE.VARIANT)
    family = family_of(variant)
    cfg.MODEL.BACKBONE.VARIANT, cfg.MODEL.BACKBONE.NAME = variant, family.builder
    cfg.INPUT.TRAIN_SIZE = 32 if "pretrain_size" in family.options or cfg.MODEL.BACKBONE.STEM == "small" else 64
    if "pretrain_size" in family.options:
        cfg.MODEL.BACKBONE.PRETRAIN_SIZE = 32
    if family.name in ("alexnet", "vgg"):
        cfg.MODEL.HEAD.NAME = "LinearHead"  # the hidden layers are nine tenths of the weights
    cfg.SOLVER.AMP.ENABLED = False  # float16 takes a CPU ten times as long
    return cfg


def test_a_recipe_takes_a_step(name: str) -> None:
    cfg = shrunk(on_device(name, "cpu"))
    resolve_durations(cfg, IMAGENET)
    scale_learning_rate(cfg)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    step = TrainStep.from_cfg(cfg, model, optimizer, build_schedule(cfg, optimizer))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = step(batch_for(cfg), 0)
    step(batch_for(cfg), 1)  # some warm up from a rate of 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) > len(before) // 2 and any(key.startswith("head.") for key in moved)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert bool(step.average) == cfg.SOLVER.EMA.ENABLED and bool(step.mixing) == bool(cfg.INPUT.CUTMIX_ALPHA)


# ------------------------------------------------------------------------------------------- rates, by other libraries


def rates(name: str, *overrides: Any) -> Callable[[float], float]:
    """Epoch -> the learning rate there, as trained on ImageNet."""
    cfg = get_config(name)
    cfg.merge_from_list(list(overrides))
    scale_learning_rate(cfg)
    resolve_durations(cfg, IMAGENET)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    schedule = build_schedule(cfg, optimizer)

    def at(epoch: float) -> float:
        schedule.last_epoch = round(epoch * IMAGENET / cfg.SOLVER.IMS_PER_BATCH)
        return float(schedule.get_lr()[0])

    return at


def test_torchvisions_new_recipe_by_torchs_own_schedulers() -> None:
    from torch.optim import lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5)
    main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=595, eta_min=0.0)
    theirs = lr_scheduler.SequentialLR(optimizer, [warm, main], milestones=[5])
    at = rates("imagenet/resnet50_torchvision_v2_600ep.yaml")
    for epoch in range(590):
        assert at(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=2e-3), epoch
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("name", "base", "end", "epochs", "warm", "start"),
    [
        ("resnet50_a1_600ep", 5e-3, 1e-6, 600, 5, 1e-4),
        ("resnet50_a2_300ep", 5e-3, 1e-6, 300, 5, 1e-4),
        ("resnet50_a3_100ep", 8e-3, 1e-6, 100, 5, 1e-4),
        ("deit_s_adamw_300ep", 1e-3, 1e-5, 300, 5, 1e-6),
        ("swin_t_adamw_300ep", 2 * 5e-4, 2 * 5e-6, 300, 20, 2 * 5e-7),  # given for 512 images
    ],
)
def test_recipes_from_timm_by_its_scheduler(
    name: str, base: float, end: float, epochs: int, warm: int, start: float
) -> None:
    timm = pytest.importorskip("timm.scheduler")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    theirs = timm.CosineLRScheduler(optimizer, epochs, lr_min=end, warmup_t=warm, warmup_lr_init=start)
    at = rates(f"imagenet/{name}.yaml")
    assert at(0) == pytest.approx(start, rel=1e-6)
    for epoch in range(warm, epochs):
        theirs.step(epoch)
        assert at(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-3), epoch


def test_recipes_by_their_closed_forms() -> None:
    forms: dict[str, Callable[[float], float]] = {
        "efficientnet_b0_rmsprop_350ep": lambda epoch: 0.256 * 0.97 ** floor(epoch / 2.4),
        "mobilenet_v2_rmsprop_300ep": lambda epoch: 0.045 * 0.98 ** floor(epoch),
        "googlenet_sgd_60ep": lambda epoch: 0.01 * (1 - epoch / 60) ** 0.5,
        "squeezenet1_0_sgd_68ep": lambda epoch: 0.04 * (1 - epoch / 68),
        "shufflenet_v2_x1_0_sgd_240ep": lambda epoch: 0.5 * (1 - epoch / 240),
        "darknet19_sgd_160ep": lambda epoch: 0.1 * (1 - epoch / 160) ** 4,
        "darknet53_sgd_80ep": lambda epoch: 0.1 * (1 - epoch / 80) ** 4,
        "vgg16_bn_sgd_90ep": lambda epoch: 0.01 * 0.1 ** floor(epoch / 30),
        "convnext_tiny_adamw_300ep": lambda epoch: 1e-6 + (4e-3 - 1e-6) * (1 + cos(pi * (epoch - 20) / 280)) / 2,
    }
    for name, form in forms.items():
        at = rates(f"imagenet/{name}.yaml")
        for epoch in (20.5, 31.7, 44.3, 59.1):
            assert at(epoch) == pytest.approx(form(epoch), rel=5e-3), (name, epoch)


def test_lengths_in_iterations_are_the_papers() -> None:
    for name, iterations in (
        ("googlenet_sgd_60ep", 2_400_000),
        ("squeezenet1_0_sgd_68ep", 170_000),
        ("shufflenet_v1_g3_sgd_240ep", 300_000),
        ("vgg16_sgd_74ep", 370_000),
        ("resnet50_a1_600ep", 375_000),
        ("darknet53_sgd_80ep", 800_000),
    ):
        cfg = get_config(f"imagenet/{name}.yaml")
        resolve_durations(cfg, IMAGENET)
        assert pytest.approx(iterations, rel=2e-3) == cfg.SOLVER.MAX_ITER, name


def test_another_batch_has_another_rate() -> None:
    deit, a1 = "imagenet/deit_b_adamw_300ep.yaml", "imagenet/resnet50_a1_600ep.yaml"
    assert rates(deit, "SOLVER.IMS_PER_BATCH", 256)(150) == pytest.approx(rates(deit)(150) / 4, rel=1e-3)
    assert rates(a1, "SOLVER.IMS_PER_BATCH", 512)(300) == pytest.approx(rates(a1)(300) / 2, rel=1e-3)
