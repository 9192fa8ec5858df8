"""The one training step. Both loops call it; nothing else in imgcls calls backward or steps an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import Tensor, nn

from imgcls.data import mix
from imgcls.solver import clip_gradients
from imgcls.solver.schedules import apply_current
from imgcls.structures import Batch


class TrainStep:
    """Forward, backward, update and schedule for one global batch.

    model: the network to call (DDP-wrapped where there are ranks).
    seed: dropout and the like draw from (seed, iteration, rank), so a resumed run draws what the first would have.
    amp_dtype: autocast to float16 (with a loss scaler) or bfloat16; None: full precision. Works on the CPU too.
    clip: called with the parameters when their gradients are complete and unscaled.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRMultiplier,
        *,
        seed: int,
        amp_dtype: torch.dtype | None = None,
        clip: Callable[[list[nn.Parameter]], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.seed, self.amp_dtype, self.clip = seed, amp_dtype, clip
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.last_lr = 0.0  # of the first parameter group, in the step that was taken last
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)

    @classmethod
    def from_cfg(
        cls, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRMultiplier
    ) -> TrainStep:
        """The step that ``SOLVER`` describes."""
        return cls(
            model,
            optimizer,
            schedule,
            seed=cfg.SEED,
            amp_dtype=getattr(torch, cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else None,
            clip=lambda parameters: clip_gradients(cfg, parameters),
        )

    def __call__(self, batch: Batch | list[dict[str, Any]], iteration: int) -> dict[str, Tensor]:
        """Train on ``batch``; returns the losses, detached. A loss that is not finite stops before anything changes."""
        if not self.model.training:
            raise RuntimeError("the model is in eval mode; call model.train() before training it")
        torch.manual_seed(mix(self.seed, iteration, comm.get_rank()))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self._require_finite(total, losses, batch, iteration)
        self.scaler.scale(total).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.clip(self.parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.last_lr = float(self.optimizer.param_groups[0]["lr"])
        self._advance_schedule()
        return {name: loss.detach() for name, loss in losses.items()}

    def _advance_schedule(self) -> None:
        with warnings.catch_warnings():
            # The scaler's first steps may be skipped while it finds its scale; torch then thinks the order is wrong.
            if self.scaler.is_enabled():
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            self.schedule.step()

    def _losses(self, batch: Batch | list[dict[str, Any]]) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            if isinstance(batch, Batch):
                return self.model(batch.images, batch.targets)
            return self.model(batch)

    def _require_finite(
        self, total: Tensor, losses: dict[str, Tensor], batch: Batch | list[dict[str, Any]], iteration: int
    ) -> None:
        if torch.isfinite(total):
            return
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
        raise ValueError(
            f"the loss is not finite at iteration {iteration} on rank {comm.get_rank()} ({values}; learning rate "
            f"{self.optimizer.param_groups[0]['lr']:g}; samples {_sample_ids(batch)}). No weight was changed by it. "
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_EPOCHS or set SOLVER.CLIP_GRADIENTS.ENABLED True; --resume "
            "goes on from the last checkpoint"
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule and scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        apply_current(self.schedule)


def _sample_ids(batch: Batch | list[dict[str, Any]], shown: int = 8) -> str:
    if isinstance(batch, Batch):
        ids = [] if batch.ids is None else batch.ids.tolist()
    else:
        ids = [sample.get("image_id", -1) for sample in batch]
    return f"{', '.join(map(str, ids[:shown]))}{f' and {len(ids) - shown} more' if len(ids) > shown else ''}"
