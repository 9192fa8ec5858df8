"""Knowledge distillation: a trained network, the teacher, shows the one in training what it makes of the same images.

The teacher is held as a function. It is no module of the student: not in its state dict, its optimizer or its DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Teacher:
    """The logits of a trained network for the student's classes, without gradients.

    network: normalised images (N, C, H, W) -> logits (N, K); in eval mode, its parameters without gradients.
    pixel_mean, pixel_std: per channel, of images in 0..255: the network's own, whatever the student's are.
    order: for each of the student's classes the index of the teacher's output.
    size: pixels, side of the square that images are resized to before; 0: they stay as the student gets them.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        order: Sequence[int],
        size: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.size = network, size
        self.mean = torch.tensor(pixel_mean, device=device).view(-1, 1, 1)
        self.scale = 1.0 / torch.tensor(pixel_std, device=device).view(-1, 1, 1)
        self.order = torch.tensor(order, device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """RGB images in 0..255, (N, C, H, W) or a list of (C, H, W), -> logits (N, K), float32."""
        if not isinstance(images, Tensor):
            return torch.cat([self(image[None]) for image in images])
        values = images.float()
        if self.size and values.shape[-2:] != (self.size, self.size):
            values = F.interpolate(values, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network((values - self.mean) * self.scale).float()[:, self.order]


class Distillation:
    """Adds the teacher's loss to those of the labels: ``(1 - alpha) label losses + alpha loss_distill``.

    kind: "soft": Hinton et al. 2015 (arXiv:1503.02531): the divergence of the student's softened probabilities from the
        teacher's, times temperature squared, so that its gradients keep their size whatever the temperature.
        "hard": Touvron et al. 2021 (arXiv:2012.12877, equation 3): cross-entropy with the class that the teacher would
        choose.
    alpha: share of the teacher, 0..1; 1: labels are not used (Beyer et al. 2022, arXiv:2106.05237).
    temperature: > 0, logits of both are divided by it; of "soft" only.
    """

    def __init__(self, teacher: Teacher, *, kind: str, alpha: float, temperature: float) -> None:
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature
        self.loss = {"soft": self.soft, "hard": self.hard}[kind]

    def __call__(
        self, losses: dict[str, Tensor], logits: Tensor, images: Tensor | Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The weighed ``losses`` of the labels, with ``loss_distill`` of the student's ``logits`` (N, K)."""
        weighed = {name: (1.0 - self.alpha) * loss for name, loss in losses.items()}
        student = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {**weighed, "loss_distill": self.alpha * self.loss(student, self.teacher(images))}

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        """Itself: an average of the student is a copy of it, and needs no teacher of its own."""
        return self

    def soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the images."""
        ours, theirs = (logits.div(self.temperature).log_softmax(dim=1) for logits in (student, teacher))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2

    def hard(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(student, teacher.argmax(dim=1))
