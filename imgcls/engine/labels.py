"""What the labels of the data decide: one class a picture or several, the weights of the classes, the best figure."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode

from imgcls.data import Source
from imgcls.modeling import BALANCED, LOSS_REGISTRY
from imgcls.structures import Problem

logger = logging.getLogger(__name__)

# "balanced" weights stay within these: beyond, single pictures of the rarest classes would rule the gradient.
WEIGHT_RANGE = (0.05, 20.0)

# The figures that may choose the best checkpoint, the one that "auto" means first.
METRICS_OF_ONE = ("top1", "top5", "balanced_accuracy", "loss")
METRICS_OF_SEVERAL = ("mAP", "micro_f1", "macro_f1", "subset_accuracy", "loss")


def decide_labels(cfg: CfgNode, train: Source | None, test: Source | None) -> None:
    """Write into ``cfg`` what the labels decide; contradictions are a ``ValueError``.

    train: None when only evaluating; the loss and its weights have no part in that.
    """
    sources = [source for source in (train, test) if source is not None]
    several = sources[0].multi_label
    _require_same_kind(cfg, sources, several)
    cfg.MODEL.HEAD.MULTI_LABEL = several
    _decide_metric(cfg, several)
    if train is None:
        cfg.MODEL.LOSS.CLASS_WEIGHTS, cfg.MODEL.LOSS.POS_WEIGHTS = [], []
        return
    _require_fitting_loss(cfg, train)
    for key, count in (("CLASS_WEIGHTS", class_weights), ("POS_WEIGHTS", positive_weights)):
        if list(cfg.MODEL.LOSS[key]) == BALANCED:
            cfg.MODEL.LOSS[key] = _clipped(count(_images_by_class(train, key), len(train)), train.classes, key)
        elif len(cfg.MODEL.LOSS[key]) not in (0, len(train.classes)):
            allowed = f"{len(train.classes)} numbers, one for each class of {train.name}; [] or {BALANCED}"
            what = "the weights are not one for each class"
            raise Problem(what, list(cfg.MODEL.LOSS[key]), allowed, f"MODEL.LOSS.{key}").error()


def class_weights(images: np.ndarray, total: int) -> np.ndarray:
    """total / (K n_c), (K,), for n_c images of class c: what scikit-learn calls balanced."""
    return total / (len(images) * np.maximum(images, 1))


def positive_weights(images: np.ndarray, total: int) -> np.ndarray:
    """(total - n_c) / n_c, (K,): each class then weighs as much where it is there as where it is not."""
    return (total - images) / np.maximum(images, 1)


def _images_by_class(source: Source, key: str) -> np.ndarray:
    """n_c, how many images of ``source`` each class has, (K,) float64."""
    if source.labels is None:
        allowed = f"one number for each class, for the labels of {source.name} are not known before its files are read"
        raise Problem("the classes cannot be counted", BALANCED, allowed, f"MODEL.LOSS.{key}").error()
    labels = np.asarray(source.labels)
    if labels.ndim > 1:
        return labels.sum(axis=0, dtype=np.float64)
    return np.bincount(labels, minlength=len(source.classes)).astype(np.float64)


def _clipped(weights: np.ndarray, classes: Sequence[str], key: str) -> list[float]:
    """Plain numbers of four digits within :data:`WEIGHT_RANGE`; what was cut off is said."""
    low, high = WEIGHT_RANGE
    for names, bound in ((_names(classes, weights < low), low), (_names(classes, weights > high), high)):
        if names:
            logger.warning("MODEL.LOSS.%s: balanced weights beyond %g are cut to it: %s", key, bound, ", ".join(names))
    found = [float(f"{value:.4g}") for value in weights.clip(low, high)]
    logger.info("MODEL.LOSS.%s: balanced, %g to %g", key, min(found), max(found))
    return found


def _names(classes: Sequence[str], chosen: np.ndarray) -> list[str]:
    names = [classes[index] for index in np.flatnonzero(chosen).tolist()]
    return names if len(names) <= 5 else [*names[:5], f"... ({len(names)} classes)"]


def _require_same_kind(cfg: CfgNode, sources: Sequence[Source], several: bool) -> None:
    kinds = {False: "one class a picture", True: "several labels a picture"}
    for source in sources[1:]:
        if source.multi_label != several:
            what = f"{sources[0].name} has {kinds[several]}, {source.name} has {kinds[not several]}"
            raise Problem(what, tuple(cfg.DATASETS.TEST), "sets of one kind", "DATASETS.TEST").error()
    if cfg.MODEL.HEAD.MULTI_LABEL and not several:
        what = f"{sources[0].name} has one class a picture"
        raise Problem(what, True, "False, or data with several labels a picture", "MODEL.HEAD.MULTI_LABEL").error()


def _decide_metric(cfg: CfgNode, several: bool) -> None:
    known = METRICS_OF_SEVERAL if several else METRICS_OF_ONE
    if cfg.TEST.METRIC == "auto":
        cfg.TEST.METRIC = known[0]
    elif cfg.TEST.METRIC not in known:
        what = f"evaluation with {'several labels' if several else 'one class'} a picture has no such figure"
        raise Problem(what, cfg.TEST.METRIC, ", ".join(("auto", *known)), "TEST.METRIC").error()


def _require_fitting_loss(cfg: CfgNode, train: Source) -> None:
    if train.multi_label and not _takes_several(cfg.MODEL.LOSS.NAME):
        allowed = ", ".join(name for name, _ in LOSS_REGISTRY if _takes_several(name))
        what = f"{train.name} has several labels a picture, and this loss takes one class"
        raise Problem(what, cfg.MODEL.LOSS.NAME, allowed, "MODEL.LOSS.NAME").error()


def _takes_several(name: str) -> bool:
    return bool(getattr(LOSS_REGISTRY.get(name), "multi_label", True))
