"""What is promised of every variant, looked at: parity, maps, gradients, freezing, and its place in detectors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from imgcls.checkpoint import trunk_weights, write_tensors
from imgcls.config import get_config
from imgcls.modeling import ClsNet, family_of, make_classifier, make_trunk, plain
from imgcls.modeling.analysis import analyze
from imgcls.structures import PreprocessingContract
from imgcls.transfer.detector_config import detector_keys
from imgcls.transfer.handover import Handover
from imgcls.transfer.parity import measure_parity, randomise
from imgcls.transfer.probe import bare_trunk, measure
from imgcls.transfer.verify import verify

CONTRACT = PreprocessingContract("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 224, 256, "bilinear")
DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn")
# Largest gradient of a parameter, as a share of the largest in its layer, below which it counts as none.
LEAST_GRADIENT = 1e-6
CLASSES = 10


def examine(variant: str, *, detectors: Iterable[str] = DETECTORS, seed: int = 0) -> dict[str, Any]:
    """A record of everything below for ``variant``; its entry "problems" is empty when all holds."""
    family = family_of(variant)
    parity = {library: measure_parity(variant, library, seed=seed) for library in libraries_of(variant)}
    built = in_detectors(variant, detectors, seed=seed)
    problems = [f"parity with {library}: {found}" for library, found in parity.items() if not found.equal]
    problems += maps_problems(variant) + gradient_problems(variant, seed=seed) + freezing_problems(variant)
    problems += detector_problems(built)
    cost = analyze(make_classifier(plain(variant), 1000, CONTRACT), side_of(variant))
    return {
        "family": family.name,
        "cost": asdict(cost),
        "parity": {library: {**asdict(found), "equal": found.equal} for library, found in parity.items()},
        "detectors": built,
        "problems": problems,
    }


def libraries_of(variant: str) -> list[str]:
    """The libraries that have a network to compare ``variant`` with."""
    from imgcls.transfer.references import BUILDERS

    sources = family_of(variant).sources
    return [name for name, source in sources.items() if variant in source.names and name in BUILDERS]


def side_of(variant: str) -> int:
    """Pixels, side of the images that the paper's costs are for."""
    row = family_of(variant).variants[variant]
    return int(getattr(row, "resolution", 0) or getattr(row, "image_size", 224))


# -- maps ------------------------------------------------------------------------------------------------------------


def maps_problems(variant: str, sizes: Sequence[int] = (96, 128)) -> list[str]:
    """Channels as booked; sides ceil(side / stride), or a few pixels off where a paper pads less or rounds down."""
    trunk = make_trunk(plain(variant), for_detector=True)
    trunk = make_trunk(plain(variant), out_features=list(trunk._out_feature_strides), for_detector=True).eval()
    problems = []
    shapes = trunk.output_shape()
    for size in sizes:
        with torch.no_grad():
            maps = trunk(torch.zeros(1, 3, size, size))
        for name, value in maps.items():
            side = -(-size // shapes[name].stride)
            if value.shape[1] != shapes[name].channels or abs(value.shape[2] - side) > 4:
                problems.append(f"{name} of {size} pixels is {tuple(value.shape)}, booked {shapes[name]}")
    return problems


# -- gradients -------------------------------------------------------------------------------------------------------


def gradient_problems(variant: str, *, seed: int = 0, size: int = 96) -> list[str]:
    """Parameters whose gradient is not finite, or nothing beside that of their layer, though no reason is known."""
    torch.manual_seed(seed)
    family = family_of(variant)
    net = make_classifier(plain(variant), CLASSES, CONTRACT, auxiliary=True).double().train()
    randomise(net, seed)
    size = max(size, side_of(variant) if "pretrain_size" in family.options else size, least_training_size(variant))
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    total = sum(net(x, torch.tensor([0, 1, 2, 3]), normalized=True).values())
    return [
        f"gradient of {name}: {found}"
        for name, found in _weak_gradients(net, gradients_of(total, net))
        if not any(fnmatch(name, pattern) for pattern in family.without_gradient)
    ]


def least_training_size(variant: str) -> int:
    """Pixels, side of the smallest image that the network with its auxiliary heads can train on."""
    return int(getattr(family_of(variant).variants[variant], "least_size", 32))


def gradients_of(total: Any, net: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of ``total`` by each parameter of ``net``, by name. Nothing is stored in the network."""
    named = dict(net.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def _weak_gradients(net: ClsNet, gradients: Mapping[str, Tensor | None]) -> list[tuple[str, str]]:
    largest = {name: _largest(gradient) for name, gradient in gradients.items()}
    weak = []
    for layer_name, layer in net.named_modules():
        own = [f"{layer_name}.{name}" for name, _ in layer.named_parameters(recurse=False)]
        inside = [f"{layer_name}.{name}" for name, _ in layer.named_parameters()] if own else []
        for name in own:
            beside = max(largest[other] for other in inside)
            if gradients[name] is None:
                weak.append((name, "none"))
            elif not isfinite(largest[name]):
                weak.append((name, "not finite"))
            elif not largest[name] > LEAST_GRADIENT * beside:
                weak.append((name, f"{largest[name]:.1e} beside {beside:.1e} in its layer"))
    return weak


def _largest(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.abs().max())


# -- freezing --------------------------------------------------------------------------------------------------------


def freezing_problems(variant: str) -> list[str]:
    """Freezing k stages must stop the parameters and the running statistics of exactly these."""
    trunk = make_trunk(plain(variant))
    problems = []
    stages = trunk.stage_modules()
    for count in {0, 1, min(2, len(stages)), len(stages)}:
        for parameter in trunk.parameters():
            parameter.requires_grad_(True)
        trunk.freeze(count).train()
        frozen = {id(p) for _, stage in stages[:count] for p in stage.parameters()}
        frozen |= {id(p) for name, p in trunk.named_parameters() if count and name in trunk.first_stage_parameters}
        wrong = [name for name, p in trunk.named_parameters() if p.requires_grad == (id(p) in frozen)]
        learning = [name for name, stage in stages[:count] if any(module.training for module in stage.modules())]
        if wrong or learning:
            problems.append(f"freezing {count} stages: {(wrong + learning)[:3]}")
    return problems


# -- detectors -------------------------------------------------------------------------------------------------------


def in_detectors(variant: str, detectors: Iterable[str], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Hand random weights over to each of the detectors, verify that they arrived, and train it one step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "backbone.pth"
        handover = random_handover(variant, seed)
        write_tensors(file, handover.to_content())
        return {detector: _in_detector(handover, detector, file) for detector in detectors}


def detector_problems(built: dict[str, dict[str, Any]]) -> list[str]:
    """The problems in what :func:`in_detectors` found, each with its detector's name."""
    return [f"{detector}: {problem}" for detector, found in built.items() for problem in found["problems"]]


def _in_detector(handover: Handover, detector: str, file: Path) -> dict[str, Any]:
    cfg = detector_config(handover, detector, file)
    outcome = verify(file, cfg)
    problems = list(outcome.problems)
    cfg.MODEL.WEIGHTS = ""
    problems += step_problems(cfg)
    return {
        "arrived": f"{len(outcome.report.loaded)} of {outcome.report.wanted}",
        "new": len(outcome.report.new),
        "differences": {dtype: max(found.values()) for dtype, found in outcome.differences.items() if found},
        "problems": problems,
    }


def random_handover(variant: str, seed: int) -> Handover:
    """A hand-over of random weights whose norms and statistics are unlike their initial ones."""
    torch.manual_seed(seed)
    net = make_classifier(plain(variant), CLASSES, CONTRACT)
    randomise(net, seed)
    fit_statistics(net, max(128, least_training_size(variant)))
    family = family_of(variant)
    weights = {n: t for n, t in trunk_weights(net.state_dict()).items() if not family.is_classifier_only(n)}
    probe = measure(bare_trunk(plain(variant), weights, 3), CONTRACT)
    return Handover(weights, plain(variant), CONTRACT, False, probe, {}, ())


@torch.no_grad()
def fit_statistics(net: ClsNet, size: int) -> None:
    """Set running statistics to those of some random images, and calm the residual branches, as training does.

    A deep network of random weights is chaotic: it blows rounding errors up until maps that are equal look different.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.mul_(0.3)
        norm.momentum = 1.0
    if norms:
        images = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
        net.train()(images, torch.zeros(4, dtype=torch.long))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def detector_config(handover: Handover, detector: str, file: str | Path) -> CfgNode:
    """detectron2's stock config of ``detector`` with the keys that ``handover`` asks for, on the CPU."""
    keys = detector_keys(handover.architecture, handover.contract, detector, str(file))
    flat = [word for pair in keys.items() for word in pair]
    return get_config(f"detection/mobilenet_v1_{detector}_fpn.yaml", [*flat, "MODEL.DEVICE", "cpu"])


def step_problems(cfg: CfgNode, size: int = 96) -> list[str]:
    """One training step of a detector with all of its trunk learning: losses and gradients must be finite."""
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    torch.manual_seed(0)
    model = build_model(cfg).train()
    boxes = Instances(
        (size, size), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 50.0]])), gt_classes=torch.tensor([1])
    )
    if cfg.MODEL.MASK_ON:
        from detectron2.structures import PolygonMasks

        boxes.gt_masks = PolygonMasks([[[8.0, 8.0, 60.0, 8.0, 60.0, 50.0, 8.0, 50.0]]])
    image = torch.randint(0, 256, (len(cfg.MODEL.PIXEL_MEAN), size, size)).float()
    with EventStorage(0):
        losses = model([{"image": image, "instances": boxes}])
        gradients = gradients_of(sum(losses.values()), model.backbone)
    bad = [name for name, gradient in gradients.items() if gradient is not None and not torch.isfinite(gradient).all()]
    learned = any(_largest(gradient) > 0 for gradient in gradients.values())
    problems = [f"{name} is {float(value)}" for name, value in losses.items() if not torch.isfinite(value)]
    return problems + [f"gradient of {name} is not finite" for name in bad] + ([] if learned else ["nothing learns"])
