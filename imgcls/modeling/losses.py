"""Losses of ClsNet: called with logits (N, K) and targets, they return a dict of scalars to be added up.

Targets are class indices (N,) int64, or (N, K) float: weights over the classes (mixup, distillation) or, for pictures
with several labels, 1 for each class that is there and 0 for the others. The losses through a sigmoid take an index as
the vector with a single 1; those through a softmax are for one class a picture and say so by ``multi_label = False``.

Everything is computed in float32 at least, whatever autocast made of the logits, and stays finite where a sigmoid or a
softmax saturates.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from imgcls.config import add_imgcls_config, register_check
from imgcls.structures import Problem

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = (
    "Losses of ClsNet: ``loss(**options)``, called with logits and targets. The options are the keys of MODEL.LOSS "
    "that the loss reads, in lower case; ``multi_label`` False says that it takes one class a picture only."
)

# What MODEL.LOSS.CLASS_WEIGHTS and POS_WEIGHTS hold until the training set has been counted.
BALANCED = ["balanced"]

# The base of a power is kept this far from 0, where the derivative of x ** gamma is infinite for gamma < 1.
_EPS = 1e-8


def build_loss(node: CfgNode) -> nn.Module:
    """The loss that ``MODEL.LOSS`` describes; it gets the keys that its constructor names."""
    kind = LOSS_REGISTRY.get(node.NAME)
    made: nn.Module = kind(**{key.lower(): node[key] for key in _keys_of(kind, node)})
    return made


def _keys_of(kind: type[nn.Module], node: CfgNode) -> list[str]:
    return [name.upper() for name in inspect.signature(kind).parameters if name.upper() in node]


class _Loss(nn.Module):
    """What the losses share: logits in full precision, and targets of the right shape."""

    multi_label = True

    def forward(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if targets.dim() == 2 and targets.shape != logits.shape:
            raise ValueError(
                f"the targets have the shape {tuple(targets.shape)}, the logits {tuple(logits.shape)}; labels are "
                "class indices (N,) or one weight for each class (N, K)"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"loss_cls": self.loss(logits, targets)}

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def keep(self, name: str, values: Sequence[float]) -> None:
        """``values`` as a buffer that moves with the network but is in no checkpoint: the config holds them."""
        if list(values) == BALANCED:
            allowed = "numbers, one a class; the training tools count the classes and write them into config.yaml"
            raise Problem("the weights were not counted yet", values, allowed, f"MODEL.LOSS.{name.upper()}").error()
        self.register_buffer(name, torch.tensor(values) if len(values) else None, persistent=False)


@LOSS_REGISTRY.register()
class CrossEntropy(_Loss):
    """Softmax cross-entropy. With class weights w the mean is weighted, as torch's is for class indices:

    sum_i sum_c w_c t_ic (-log p_ic) / sum_i sum_c w_c t_ic

    and a vector with a single 1 gives what its index gives (torch would divide by N there).
    """

    multi_label = False
    class_weights: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.keep("class_weights", class_weights)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        if weight is None or targets.dim() == 1:
            return F.cross_entropy(logits, targets, weight=weight, label_smoothing=self.label_smoothing)
        total = F.cross_entropy(logits, targets, weight=weight, label_smoothing=self.label_smoothing, reduction="sum")
        return total / (targets * weight).sum()


@LOSS_REGISTRY.register()
class SoftmaxFocal(_Loss):
    """Focal loss over a softmax, for one class a picture: mean over the pictures of

    -sum_c w_c t_c (1 - p_c)^gamma log p_c

    Lin et al. 2017 (arXiv:1708.02002), equation 5, whose p_t is here the softmax's probability of the class that is
    there, and whose alpha_t is the class weight.
    """

    multi_label = False
    class_weights: Tensor | None

    def __init__(self, gamma: float = 2.0, class_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.gamma = gamma
        self.keep("class_weights", class_weights)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = _over_classes(targets, logits)
        if self.class_weights is not None:
            targets = targets * self.class_weights
        log_p = logits.log_softmax(dim=1)
        terms = -targets * _power(-torch.expm1(log_p), self.gamma) * log_p
        return terms.sum(dim=1).mean()


@LOSS_REGISTRY.register()
class BCE(_Loss):
    """Binary cross-entropy of each class through a sigmoid: mean over pictures and classes, as torch's and timm's.

    pos_weights: factors of the terms of classes that are there, one a class.
    label_smoothing e: targets t become t (1 - e) + e / K, as for cross-entropy.
    target_threshold: weights above it become 1 and the others 0 (before smoothing); 0: they stay weights. Of a picture
        that Mixup or CutMix made of two classes both are then there, as in Wightman et al. 2021 (arXiv:2110.00476),
        section 3.
    """

    pos_weights: Tensor | None

    def __init__(
        self, label_smoothing: float = 0.0, pos_weights: Sequence[float] = (), target_threshold: float = 0.0
    ) -> None:
        super().__init__()
        self.label_smoothing, self.target_threshold = label_smoothing, target_threshold
        self.keep("pos_weights", pos_weights)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = _over_classes(targets, logits)
        if self.target_threshold:
            targets = (targets > self.target_threshold).to(targets.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        weight = None if self.pos_weights is None else self.pos_weights.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)


@LOSS_REGISTRY.register()
class SigmoidFocal(_Loss):
    """Focal loss of each class through a sigmoid: Lin et al. 2017 (arXiv:1708.02002), equation 5,

    -alpha_t (1 - p_t)^gamma log p_t

    summed over the classes, mean over the pictures. alpha weighs the classes that are there, 1 - alpha those that are
    not; negative: neither is weighed.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25) -> None:
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = _over_classes(targets, logits)
        there = -_power(torch.sigmoid(-logits), self.gamma) * F.logsigmoid(logits)
        absent = -_power(torch.sigmoid(logits), self.gamma) * F.logsigmoid(-logits)
        if self.alpha >= 0:
            there, absent = self.alpha * there, (1 - self.alpha) * absent
        return (targets * there + (1 - targets) * absent).sum(dim=1).mean()


@LOSS_REGISTRY.register()
class Asymmetric(_Loss):
    """Asymmetric loss of each class through a sigmoid: Ridnik et al. 2021 (arXiv:2009.14119), equations 4 to 7,

    -(1 - p)^gamma_pos log p where the class is there, -p_m^gamma_neg log(1 - p_m) where it is not,
    p_m = max(p - clip, 0)

    summed over the classes, mean over the pictures. The defaults are the paper's for MS-COCO (section 4.1): easy
    negatives are discarded (clip 0.05) and the others fade (gamma_neg 4), positives are left alone (gamma_pos 0).
    """

    def __init__(self, gamma_pos: float = 0.0, gamma_neg: float = 4.0, clip: float = 0.05) -> None:
        super().__init__()
        self.gamma_pos, self.gamma_neg, self.clip = gamma_pos, gamma_neg, clip

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = _over_classes(targets, logits)
        there = -_power(torch.sigmoid(-logits), self.gamma_pos) * F.logsigmoid(logits)
        shifted = (torch.sigmoid(logits) - self.clip).clamp(min=0)
        # With a clip, 1 - p_m is at least the clip; without one, only the logarithm of the sigmoid stays finite.
        log_absent = torch.log1p(-shifted) if self.clip else F.logsigmoid(-logits)
        absent = -_power(shifted, self.gamma_neg) * log_absent
        return (targets * there + (1 - targets) * absent).sum(dim=1).mean()


def _over_classes(targets: Tensor, logits: Tensor) -> Tensor:
    """(N,) indices -> (N, K) with a single 1; (N, K) as they are, in the logits' dtype."""
    one_hot = F.one_hot(targets, logits.shape[1]) if targets.dim() == 1 else targets
    return one_hot.to(logits.dtype)


def _power(base: Tensor, gamma: float) -> Tensor | float:
    """base ** gamma with a finite derivative; 1 for gamma 0, so that no factor is computed."""
    return base.clamp(min=_EPS) ** gamma if gamma else 1.0


@register_check
def check_loss(cfg: CfgNode) -> list[Problem]:
    """The name is registered, and no key of another loss is set: it would be passed over in silence."""
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet" or "LOSS" not in cfg.MODEL:
        return []
    node, defaults = cfg.MODEL.LOSS, add_imgcls_config(get_cfg()).MODEL.LOSS
    if node.NAME not in LOSS_REGISTRY:
        allowed = ", ".join(name for name, _ in LOSS_REGISTRY)
        return [Problem("there is no such loss", node.NAME, allowed, "MODEL.LOSS.NAME")]
    read = {"NAME", *_keys_of(LOSS_REGISTRY.get(node.NAME), node)}
    return [
        Problem(f"{node.NAME} does not read this key", node[key], f"{default!r}, its default", f"MODEL.LOSS.{key}")
        for key, default in defaults.items()
        if key not in read and node[key] != default
    ]
