"""Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019): pictures of a batch mixed in pairs, and their labels too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from imgcls.structures import Batch


class Mixing:
    """Mixes a batch with itself, rotated by half its length; one amount for the whole batch, drawn by torchvision.

    Half a batch away lies another picture even where repeated augmentation puts copies of one next to each other.
    All draws come from torch's CPU generator.

    mixup_alpha, cutmix_alpha: of Beta(alpha, alpha), from which the share of a picture that stays is drawn; 0: off.
    probability: of mixing a batch at all. cutmix_share: of the mixed batches that get CutMix, when both are on.
    num_classes: for labels that are class indices.
    """

    def __init__(
        self,
        mixup_alpha: float,
        cutmix_alpha: float,
        *,
        probability: float = 1.0,
        cutmix_share: float = 0.5,
        num_classes: int = 0,
    ) -> None:
        self.mixup = v2.MixUp(alpha=mixup_alpha) if mixup_alpha else None
        self.cutmix = v2.CutMix(alpha=cutmix_alpha) if cutmix_alpha else None
        self.probability, self.cutmix_share, self.num_classes = probability, cutmix_share, num_classes

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> Mixing | None:
        """What ``INPUT.MIXUP_ALPHA``, ``CUTMIX_ALPHA``, ``MIX_PROB`` and ``MIX_SWITCH_PROB`` say; None: no mixing."""
        node = cfg.INPUT
        if not (node.MIXUP_ALPHA or node.CUTMIX_ALPHA) or node.MIX_PROB == 0:
            return None
        return cls(
            node.MIXUP_ALPHA,
            node.CUTMIX_ALPHA,
            probability=node.MIX_PROB,
            cutmix_share=node.MIX_SWITCH_PROB,
            num_classes=cfg.MODEL.HEAD.NUM_CLASSES,
        )

    def __call__(
        self, batch: Batch | list[dict[str, Any]], device: torch.device | str = "cpu"
    ) -> Batch | list[dict[str, Any]]:
        """The batch on ``device``, mixed there: float pictures (0..255, memory format kept), targets (N, K) float.

        A list of dicts comes back as one. Raises ``ValueError`` where the pictures differ in size or lack labels.
        """
        if isinstance(batch, Batch):
            return self._mix(batch.to(device))
        images = [sample["image"] for sample in batch]
        labels = torch.stack([torch.as_tensor(sample["label"]) for sample in batch])
        same = all(image.shape == images[0].shape for image in images)
        mixed = self._mix(Batch(torch.stack(images) if same else images, labels).to(device))
        assert mixed.targets is not None
        return [
            {**sample, "image": image, "label": label}
            for sample, image, label in zip(batch, mixed.images, mixed.targets, strict=True)
        ]

    def _mix(self, batch: Batch) -> Batch:
        if isinstance(batch.images, list):
            raise ValueError(
                "mixing needs pictures of one size; change INPUT.TRAIN_TRANSFORMS, or set INPUT.MIXUP_ALPHA and "
                "INPUT.CUTMIX_ALPHA to 0"
            )
        if batch.targets is None:
            raise ValueError("mixing needs labels; set INPUT.MIXUP_ALPHA and INPUT.CUTMIX_ALPHA to 0")
        images, targets = batch.images.float(), self._weights(batch.targets)
        half = len(batch) // 2
        # Floats in any case: the network is to see one type.
        if float(torch.rand(())) < self.probability:
            if self._cuts():
                images, kept = self._cut(images, images.roll(half, 0))
            else:
                assert self.mixup is not None
                kept = self.mixup.make_params([])["lam"]
                images = images.roll(half, 0).lerp_(images, kept)
            targets = targets.roll(half, 0).lerp_(targets, kept)
        return replace(batch, images=images, targets=targets)

    def _cuts(self) -> bool:
        if self.mixup is None or self.cutmix is None:
            return self.mixup is None
        return float(torch.rand(())) < self.cutmix_share

    def _cut(self, images: Tensor, partners: Tensor) -> tuple[Tensor, float]:
        """The pictures with a box of their partners' pixels, and the share of the area that stayed their own."""
        assert self.cutmix is not None
        params = self.cutmix.make_params([images])
        left, top, right, bottom = params["box"]
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return mixed, params["lam_adjusted"]

    def _weights(self, targets: Tensor) -> Tensor:
        return targets.float() if targets.is_floating_point() else F.one_hot(targets, self.num_classes).float()
