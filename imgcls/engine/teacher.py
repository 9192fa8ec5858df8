"""The teacher that ``MODEL.DISTILL`` names: found, checked against the data's classes, and given to the network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from imgcls.checkpoint import classifier_weights, file_digest, load_weights, local_path, notes_of, read_checkpoint
from imgcls.config.defaults import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB
from imgcls.data.imagenet import imagenet_classes
from imgcls.modeling import Architecture, ClsNet, Distillation, Teacher, make_classifier
from imgcls.modeling.backbones.timm_bridge import PREFIX, TRAINED_WITH
from imgcls.structures import PreprocessingContract, Problem, first_line

logger = logging.getLogger(__name__)

KEY = "MODEL.DISTILL.TEACHER"
IN_ORDER = "in_order"
# A teacher computes no statistics: over ranks or not, these norms are one and the same to it.
SYNCHRONISED = ("SyncBN", "naiveSyncBN")


@dataclass(frozen=True)
class Found:
    """A network before it is a teacher. classes: the names of its outputs."""

    network: nn.Module
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]
    classes: Sequence[str]


def require_teacher(cfg: CfgNode, classes: Sequence[str]) -> None:
    """Raise ``ValueError`` for what can be seen to be wrong with a teacher without building it."""
    node = cfg.MODEL.DISTILL
    if not node.TEACHER:
        return
    if cfg.MODEL.HEAD.MULTI_LABEL:
        allowed = "'' (none) for a data set with several labels a picture"
        raise Problem("a teacher is for one class a picture", node.TEACHER, allowed, KEY).error()
    if node.TEACHER.startswith(PREFIX):
        if node.WEIGHTS:
            _require_file(node.WEIGHTS, "MODEL.DISTILL.WEIGHTS")
        names = _names(cfg, classes, imagenet_classes())
    else:
        _require_file(node.TEACHER, KEY)
        content = read_checkpoint(node.TEACHER, mmap=Path(node.TEACHER).suffix != ".pkl", check_digest=False)
        _, notes = _with_head(content, node.TEACHER)
        names = _names(cfg, classes, notes.get("classes") or ())
    order_of(names, classes, node.TEACHER)


def build_distillation(cfg: CfgNode, classes: Sequence[str]) -> Distillation | None:
    """What ``MODEL.DISTILL`` says, for a student that knows ``classes``; None: there is no teacher."""
    node = cfg.MODEL.DISTILL
    if not node.TEACHER:
        return None
    require_teacher(cfg, classes)
    # The teacher's random first weights are drawn beside the run's own draws.
    with torch.random.fork_rng(devices=[]):
        found = (_of_timm if node.TEACHER.startswith(PREFIX) else _of_file)(cfg, classes)
    if len(found.pixel_mean) != len(cfg.MODEL.PIXEL_MEAN):
        allowed = f"{len(found.pixel_mean)}, the teacher's"
        what = "teacher and student take images of different numbers of channels"
        raise Problem(what, len(cfg.MODEL.PIXEL_MEAN), allowed, f"MODEL.PIXEL_MEAN or {KEY}").error()
    network = found.network.eval().requires_grad_(False).to(cfg.MODEL.DEVICE)
    teacher = Teacher(
        partial(network, normalized=True) if isinstance(network, ClsNet) else network,
        pixel_mean=found.pixel_mean,
        pixel_std=found.pixel_std,
        order=order_of(found.classes, classes, node.TEACHER),
        size=node.SIZE,
        device=cfg.MODEL.DEVICE,
    )
    _require_it_runs(teacher, cfg)
    _tell(cfg, found)
    return Distillation(teacher, kind=node.KIND, alpha=node.ALPHA, temperature=node.TEMPERATURE)


def order_of(theirs: Sequence[str], ours: Sequence[str], teacher: str) -> list[int]:
    """For each of our classes its place among theirs; other classes are a ``ValueError``."""
    places = {name: place for place, name in enumerate(theirs)}
    if len(theirs) != len(ours) or set(places) != set(ours):
        strange = [name for name in theirs if name not in set(ours)]
        absent = [name for name in ours if name not in places]
        raise ValueError(
            f"the teacher {teacher} knows other classes than the data: {len(theirs)} to {len(ours)}; not in the data: "
            f"{_few(strange)}; not the teacher's: {_few(absent)}. Teacher and data must have the same class names, in "
            f"any order; change {KEY} or DATASETS.TRAIN, or name the teacher's outputs in MODEL.DISTILL.CLASSES"
        )
    return [places[name] for name in ours]


def _names(cfg: CfgNode, ours: Sequence[str], stated: Sequence[str]) -> Sequence[str]:
    """The names of the teacher's outputs: those that the config gives, otherwise those that it states itself."""
    given = cfg.MODEL.DISTILL.CLASSES
    if given == IN_ORDER:
        return ours
    if given:
        _require_file(given, "MODEL.DISTILL.CLASSES")
        lines = Path(given).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if not stated:
        allowed = f"a text file with a class a line, or {IN_ORDER} if its outputs are in the training set's order"
        raise Problem("the teacher's file does not name its classes", given, allowed, "MODEL.DISTILL.CLASSES").error()
    return stated


def _of_file(cfg: CfgNode, ours: Sequence[str]) -> Found:
    """A classifier's checkpoint, or a hand-over file that has a head."""
    path, node = cfg.MODEL.DISTILL.TEACHER, cfg.MODEL.DISTILL
    weights, notes = _with_head(read_checkpoint(path), path)
    architecture = Architecture(**notes["architecture"])
    if architecture.norm in SYNCHRONISED:
        architecture = replace(architecture, norm="BN")
    contract = PreprocessingContract.from_dict(notes["contract"])
    names = _names(cfg, ours, notes.get("classes") or ())
    network = make_classifier(architecture, len(names), contract, head=node.HEAD)
    if cfg.MODEL.CHANNELS_LAST:
        network.memory_format = torch.channels_last
        network.to(memory_format=torch.channels_last)
    # Auxiliary heads serve training only.
    wanted = {name: value for name, value in weights.items() if not name.startswith("head.auxiliary.")}
    _load(network, wanted, path, "MODEL.DISTILL.HEAD must be the MODEL.HEAD.NAME of its training")
    return Found(network, contract.pixel_mean, contract.pixel_std, names)


def _of_timm(cfg: CfgNode, ours: Sequence[str]) -> Found:
    """timm's own network with its own head; of ImageNet's classes unless the config names others."""
    node = cfg.MODEL.DISTILL
    name, names = node.TEACHER.removeprefix(PREFIX), _names(cfg, ours, imagenet_classes())
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{node.TEACHER} needs timm: pip install 'imgcls[timm]' ({error})") from error
    if not timm.is_model(name):
        raise Problem("timm has no such network", name, "a name that timm.list_models() gives", KEY).error()
    # What timm sets only where it loads trained weights itself.
    options = dict(TRAINED_WITH.get(name.partition(".")[0], {})) if node.WEIGHTS else {}
    try:
        network: Any = timm.create_model(name, pretrained=not node.WEIGHTS, num_classes=len(names), **options)
    except Exception as error:  # Hugging Face's client raises a dozen kinds
        raise ValueError(
            f"cannot make timm's {name}: {first_line(error).rstrip('.')}. Without a network, give its weights in a "
            "file: MODEL.DISTILL.WEIGHTS"
        ) from error
    if node.WEIGHTS:
        weights = read_checkpoint(node.WEIGHTS)["model"]
        _load(network, weights, node.WEIGHTS, f"It should be timm's {name} with {len(names)} classes")
    stated: dict[str, Any] = network.pretrained_cfg
    mean, std = (
        [255.0 * value for value in stated[key]] if stated.get(key) else usual
        for key, usual in (("mean", IMAGENET_MEAN_RGB), ("std", IMAGENET_STD_RGB))
    )
    return Found(network, mean, std, names)


def _load(network: nn.Module, weights: Mapping[str, Tensor], path: str, remedy: str) -> None:
    load_weights(network, weights).require_complete(path, f"It is to be a teacher: {remedy}")


def _with_head(content: Mapping[str, Any], path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """ClsNet's weights and the notes (architecture, contract, classes) of a checkpoint or a hand-over file."""
    notes = notes_of(content)
    if not notes.get("architecture") or not notes.get("contract"):
        allowed = "a checkpoint of an imgcls run, a hand-over file with its head, or timm:<name>"
        raise Problem("the file does not say which network it is of", path, allowed, KEY).error()
    weights = classifier_weights(content)
    if not any(name.startswith("head.") for name in weights):
        allowed = "the checkpoint that it was converted from, or a file that import_weights wrote with a head"
        raise Problem("the teacher has no head", path, allowed, KEY).error()
    return weights, notes


def _require_file(path: str, key: str) -> None:
    if "://" not in path and not Path(path).is_file():
        raise Problem("there is no such file", path, "a file that exists", key).error()


def _require_it_runs(teacher: Teacher, cfg: CfgNode) -> None:
    """Some networks take images of one size only; better heard of now than in the first step."""
    side = cfg.INPUT.TRAIN_SIZE
    try:
        logits = teacher(torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), side, side, device=cfg.MODEL.DEVICE))
    except (AssertionError, RuntimeError, ValueError) as error:
        seen = cfg.MODEL.DISTILL.SIZE or side
        raise ValueError(
            f"the teacher {cfg.MODEL.DISTILL.TEACHER} fails on images of {seen}x{seen}: {error}. Set "
            "MODEL.DISTILL.SIZE to the side that it was trained at; images are resized to it"
        ) from error
    if not bool(logits.isfinite().all()):
        allowed = "a network whose logits are finite"
        raise Problem("the teacher's logits are not finite", cfg.MODEL.DISTILL.TEACHER, allowed, KEY).error()


def _tell(cfg: CfgNode, found: Found) -> None:
    node = cfg.MODEL.DISTILL
    file = node.WEIGHTS if node.TEACHER.startswith(PREFIX) else node.TEACHER
    digest = f"SHA-256 {file_digest(local_path(file))[:16]}" if file else "weights fetched by timm"
    logger.info(
        "teacher: %s%s (%s), %d classes, mean %s, std %s, images %s; %s, share %g%s",
        node.TEACHER,
        f" with {node.WEIGHTS}" if node.WEIGHTS else "",
        digest,
        len(found.classes),
        *([round(value, 3) for value in values] for values in (found.pixel_mean, found.pixel_std)),
        f"resized to {node.SIZE}" if node.SIZE else "as the student sees them",
        node.KIND,
        node.ALPHA,
        f", temperature {node.TEMPERATURE:g}" if node.KIND == "soft" else "",
    )


def _few(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}" if names else "none"
