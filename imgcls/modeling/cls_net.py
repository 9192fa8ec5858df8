"""ClsNet, the meta-architecture: a trunk, a head and a loss behind one ``forward`` for every form of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn

from imgcls.modeling.backbone_base import Architecture, Trunk
from imgcls.modeling.build import make_trunk
from imgcls.modeling.distillation import Distillation
from imgcls.modeling.heads import FAMILY_HEAD, make_head
from imgcls.modeling.losses import CrossEntropy, build_loss
from imgcls.modeling.spec import family_of
from imgcls.structures import Batch, PreprocessingContract, Problem

# A float batch inside this range was normalised already, or scaled to 0..1: either would train a wrong network.
SUSPICIOUS_RANGE = 10.0
# Of several classes a picture, those whose score reaches this are predicted, until thresholds were tuned.
DEFAULT_THRESHOLD = 0.5


@META_ARCH_REGISTRY.register()
class ClsNet(nn.Module):
    """Classifier over a detectron2 backbone. State-dict keys are ``backbone.*`` and ``head.*``.

    Images are RGB with values 0..255 (uint8 or float) and are normalised here, on the device, once.
    """

    # For type checkers: buffers are known to torch as "Tensor or Module".
    pixel_mean: Tensor
    pixel_scale: Tensor
    # What stays in eval mode while the rest trains; a tuple of modules is no submodule.
    frozen: tuple[nn.Module, ...] = ()

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: nn.Module,
        loss: nn.Module,
        contract: PreprocessingContract,
        channels_last: bool = False,
        auxiliary_weight: float = 0.3,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        if contract.input_format != "RGB":
            raise Problem("ClsNet takes RGB only", contract.input_format, "RGB", "INPUT.FORMAT").error()
        self.backbone = backbone
        self.head = head
        self.loss = loss
        self.contract = contract
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.feature = list(backbone.output_shape())[-1]  # type: ignore[operator]
        self.auxiliary_weight = auxiliary_weight
        self.multi_label = multi_label
        # Of a run that learns from a teacher; no module, and so in no state dict.
        self.distillation: Distillation | None = None
        # Of several labels a picture: from which score on a class is predicted, one for each class or one for all.
        self.thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,)
        self.register_buffer("pixel_mean", _per_channel(contract.pixel_mean), persistent=False)
        self.register_buffer("pixel_scale", 1.0 / _per_channel(contract.pixel_std), persistent=False)
        self.to(memory_format=self.memory_format)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        node = cfg.MODEL.HEAD
        if node.NUM_CLASSES < 1:
            allowed = "a positive number; the training tools count the classes of DATASETS.TRAIN"
            raise Problem(
                "the number of classes is not set", node.NUM_CLASSES, allowed, "MODEL.HEAD.NUM_CLASSES"
            ).error()
        return {
            "backbone": backbone,
            "head": _head_over(backbone, node),
            "auxiliary_weight": node.AUX_WEIGHT,
            "multi_label": node.MULTI_LABEL,
            "loss": build_loss(cfg.MODEL.LOSS),
            "contract": PreprocessingContract.from_cfg(cfg),
            "channels_last": cfg.MODEL.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> ClsNet:
        """As in torch, but frozen modules stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, inputs: Any, targets: Tensor | None = None, *, normalized: bool = False) -> Any:
        """Losses in training, predictions in evaluation.

        inputs: a tensor (N, C, H, W), a :class:`Batch`, or detectron2's list of dicts with ``image`` (C, H, W) and,
            in training, ``label`` (an int, or a float vector over the classes). Images of one list may differ in size.
        targets: with tensors, (N,) int64 or (N, K) float.
        normalized: the images went through (x - mean) / std already.

        Returns in training a dict of scalar losses. In evaluation logits (N, K) for tensors and batches; for a list of
        dicts a list of dicts with ``logits`` (K,), ``scores`` (K,) after softmax, and ``pred_class`` (int); of a
        network for several labels a picture ``scores`` (K,) after sigmoid, and ``pred_classes``: the indices, rising,
        of those that reach the class's threshold.
        """
        batch = self.to_batch(inputs, targets)
        if not (normalized or isinstance(inputs, Batch)):
            # What a Batch holds is known; a loader made it.
            _require_pixel_values(batch.images)
        if self.training:
            if batch.targets is None:
                raise ValueError("training needs targets: call model(images, targets), or put 'label' into every dict")
            return self._losses(batch.images, batch.targets, normalized)
        logits = self._all_logits(batch.images, normalized)[""]
        if not isinstance(inputs, (list, tuple)):
            return logits
        return _with_several(logits, self.thresholds) if self.multi_label else _with_one(logits)

    def to_batch(self, inputs: Any, targets: Tensor | None = None) -> Batch:
        """The one place that tells the forms of input apart; the result lies on the model's device."""
        if isinstance(inputs, Batch):
            batch = inputs
        elif isinstance(inputs, Tensor):
            if inputs.dim() != 4:
                raise ValueError(f"a batch of images is (N, C, H, W); got a tensor of shape {tuple(inputs.shape)}")
            batch = Batch(inputs, targets)
        elif isinstance(inputs, (list, tuple)) and inputs and all(isinstance(item, dict) for item in inputs):
            batch = _from_dicts(inputs)
        else:
            raise ValueError(
                f"ClsNet takes a tensor (N, C, H, W) or a list of dicts with 'image'; got {type(inputs).__name__}"
            )
        return batch.to(self.device)

    def logits(self, images: Tensor | Sequence[Tensor], *, normalized: bool = False) -> Tensor:
        """(N, K). Each image gets the logits it would get alone: sizes are never padded to one another."""
        if not normalized:
            _require_pixel_values(images)
        return self._all_logits(images, normalized)[""]

    def _losses(self, images: Tensor | Sequence[Tensor], targets: Tensor, normalized: bool) -> dict[str, Tensor]:
        logits = self._all_logits(images, normalized)
        main = logits.pop("")
        losses: dict[str, Tensor] = self.loss(main, targets)
        for name, values in logits.items():
            own = self.loss(values, targets)
            losses.update({f"{loss}_{name}": self.auxiliary_weight * value for loss, value in own.items()})
        if self.distillation is None:
            return losses
        if normalized:
            raise ValueError("a teacher normalises images itself: give the network images in 0..255 to train on")
        return self.distillation(losses, main, images)

    def _all_logits(self, images: Tensor | Sequence[Tensor], normalized: bool) -> dict[str, Tensor]:
        """Logits of the head (under ""), and in training of each auxiliary head (under the name of its map)."""
        if isinstance(images, Tensor):
            maps = self.backbone(self._prepare(images, normalized))
            auxiliary = getattr(self.head, "auxiliary", {}) if self.training else {}
            return {"": self.head(maps[self.feature]), **{name: auxiliary[name](maps[name]) for name in auxiliary}}
        by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(index)
        order = [index for group in by_size.values() for index in group]
        groups = [self._all_logits(torch.stack([images[i] for i in g]), normalized) for g in by_size.values()]
        back = torch.tensor(order, device=self.device).argsort()
        return {name: torch.cat([group[name] for group in groups])[back] for name in groups[0]}

    def _prepare(self, images: Tensor, normalized: bool) -> Tensor:
        if images.shape[1] != len(self.pixel_mean):
            raise ValueError(
                f"the network takes {len(self.pixel_mean)} channels; got a batch of shape {tuple(images.shape)}"
            )
        if normalized:
            return images.to(self.pixel_mean.dtype, memory_format=self.memory_format)
        return self.normalize(images)

    def normalize(self, images: Tensor) -> Tensor:
        """(x - mean) / std of images with values 0..255; the argument is left as it is."""
        # A copy even from float to float: the arithmetic below is in place.
        values = images.to(self.pixel_mean.dtype, copy=True, memory_format=self.memory_format)
        return values.sub_(self.pixel_mean).mul_(self.pixel_scale)


def make_classifier(
    architecture: Architecture,
    num_classes: int,
    contract: PreprocessingContract,
    *,
    auxiliary: bool = False,
    drop_path: float = 0.0,
    head: str = FAMILY_HEAD,
) -> ClsNet:
    """The classifier of ``architecture`` without a config: random weights, cross-entropy.

    head: as ``MODEL.HEAD.NAME``; by default that of its paper.
    auxiliary: with the auxiliary heads that its paper trains it with.
    """
    family = family_of(architecture.variant)
    taps = [*family.auxiliary, "res5"] if auxiliary and family.auxiliary else None
    trunk = make_trunk(architecture, in_channels=len(contract.pixel_mean), out_features=taps, drop_path=drop_path)
    row, shapes = family.variants[architecture.variant], trunk.output_shape()
    made = make_head(head, family, row, shapes, num_classes, norm=architecture.norm)
    return ClsNet(backbone=trunk, head=made, loss=CrossEntropy(), contract=contract)


def _head_over(backbone: nn.Module, node: CfgNode) -> nn.Module:
    # Somebody else's backbone has no row; its head is the linear one.
    architecture = backbone.architecture if isinstance(backbone, Trunk) else None
    family = family_of(architecture.variant) if architecture else None
    return make_head(
        node.NAME,
        family,
        family.variants[architecture.variant] if family and architecture else None,
        backbone.output_shape(),  # type: ignore[operator]
        node.NUM_CLASSES,
        dropout=None if node.DROPOUT < 0 else node.DROPOUT,
        norm=architecture.norm if architecture else "BN",
    )


def _require_pixel_values(images: Tensor | Sequence[Tensor]) -> None:
    """Raise ``ValueError`` for float images that can be no values 0..255."""
    floats = [image for image in ([images] if isinstance(images, Tensor) else images) if image.is_floating_point()]
    for image in floats:
        low, high = (value.item() for value in image.aminmax())
        if low < -SUSPICIOUS_RANGE or high > SUSPICIOUS_RANGE:
            return
    if floats:
        raise ValueError(
            f"float images lie in [{low:.3g}, {high:.3g}]; expected RGB values in 0..255. Multiply images of 0..1 by "
            "255; for images that are normalised already say model(images, normalized=True)"
        )


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _from_dicts(samples: Sequence[dict[str, Any]]) -> Batch:
    images = [sample["image"] for sample in samples]
    same_size = all(image.shape == images[0].shape and image.dtype == images[0].dtype for image in images)
    labelled = all("label" in sample for sample in samples)
    targets = torch.stack([torch.as_tensor(sample["label"]) for sample in samples]) if labelled else None
    return Batch(torch.stack(images) if same_size else images, targets)


def _with_one(logits: Tensor) -> list[dict[str, Any]]:
    scores = logits.softmax(dim=1)
    best = scores.argmax(dim=1).tolist()
    return [
        {"logits": row, "scores": score, "pred_class": index}
        for row, score, index in zip(logits, scores, best, strict=True)
    ]


def _with_several(logits: Tensor, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    # In double precision, as thresholds are tuned: in float32 many scores near 1 are one number.
    chosen = logits.float().cpu().double().sigmoid() >= torch.tensor(thresholds, dtype=torch.float64)
    return [
        {"logits": row, "scores": row.sigmoid(), "pred_classes": picked.nonzero().flatten().tolist()}
        for row, picked in zip(logits, chosen, strict=True)
    ]
