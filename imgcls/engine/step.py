"""The one training step. Both loops call it; nothing else in imgcls calls backward or steps an optimizer."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imgcls.data import Mixing, mix
from imgcls.engine.ranks.sharding import gathered, is_sharded, own_share, scattered, without_averaging
from imgcls.solver import Average, build_average, clip_gradients
from imgcls.solver.optimizer_state import fitted_state, names_by_number
from imgcls.solver.schedules import apply_current
from imgcls.structures import Batch

logger = logging.getLogger(__name__)

Samples = Batch | list[dict[str, Any]]

# Of a loss, to which GradScaler may halve its own; a gradient that overflows then is the network's fault.
LEAST_SCALE = 1.0


def seed_iteration(seed: int, iteration: int, micro: int = 0) -> None:
    """Set torch's generators for what an iteration draws on this rank: mixing first, then dropout and the like.

    micro: number of the micro-batch. Without the 0, so that the first draws the same whatever follows.
    """
    counters = (iteration, comm.get_rank(), micro) if micro else (iteration, comm.get_rank())
    number = mix(seed, *counters)
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        torch.manual_seed(number)
    else:
        # It is all there is to seed; the function above spends a tenth of a millisecond on devices that are not there.
        torch.default_generator.manual_seed(number)


class TrainStep:
    """Forward, backward, update and schedule for one global batch.

    model: the network to call (DDP-wrapped where there are ranks).
    seed: dropout and the like draw from (seed, iteration, rank), so a resumed run draws what the first would have.
    amp_dtype: autocast to float16 (with a loss scaler) or bfloat16; None: full precision. Works on the CPU too.
    clip: called with the parameters when their gradients are complete and unscaled.
    mixing: Mixup and CutMix; None: batches stay as they come. It draws first, from the same seed as dropout.
    accumulate: micro-batches that a batch is cut into; their gradients add up to those of the mean loss.
    average: takes the weights in after the updates; None: none is kept.
    most_skipped: steps to leave out for a loss or gradient that is not finite; one more is a ``ValueError``.

    Whether all numbers are finite is decided on the device, for all ranks. On a GPU, with an optimizer that can be told
    there to change nothing, the host reads it one step later (:meth:`settle`) and so never waits for the device.

    signal: what this rank asks of all ranks with its next step, a number; agreed_signal: the largest that was asked.
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
        mixing: Mixing | None = None,
        accumulate: int = 1,
        average: Average | None = None,
        most_skipped: int = 0,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.seed, self.amp_dtype, self.clip, self.mixing = seed, amp_dtype, clip, mixing
        self.accumulate, self.average, self.most_skipped = accumulate, average, most_skipped
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.last_lr = 0.0  # of the first parameter group, in the step that was taken last
        self.skipped = 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self.signal = self.agreed_signal = 0
        # The scaler reads its own verdict at once in any case; weights that are cut up were not tried masked.
        reads_at_once = self.scaler.is_enabled() or is_sharded(model)
        self.late = self.device.type == "cuda" and can_be_masked(optimizer) and not reads_at_once
        self._unsettled: _Unsettled | None = None
        # Running statistics, which a forward pass changes before anybody can know that its loss is not finite.
        self._buffers = list(model.buffers())
        self._held = [buffer.clone() for buffer in self._buffers]

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
            mixing=Mixing.from_cfg(cfg),
            accumulate=cfg.SOLVER.ACCUMULATE,
            average=build_average(cfg, unwrapped(model)),
            most_skipped=cfg.SOLVER.NON_FINITE_MOST if cfg.SOLVER.NON_FINITE == "skip" else 0,
        )

    def __call__(self, batch: Samples, iteration: int) -> dict[str, Tensor]:
        """Train on ``batch``; returns the losses, detached.

        Where a loss or a gradient is not finite, on any rank, no rank changes anything: the step is left out, or is
        :class:`NonFinite` on all of them, here or when the next one is asked for. Collective.
        """
        if not self.model.training:
            raise RuntimeError("the model is in eval mode; call model.train() before training it")
        self.settle()
        torch._foreach_copy_(self._held, self._buffers)
        losses = self.gradients(batch, iteration)
        found = verdict(losses, [] if self._scale_is_to_blame() else self._gradients(), self.signal)
        self._unsettled = _Unsettled(iteration, losses, sample_ids(batch), _on_its_way(found), masked=self.late)
        self.last_lr = float(self.optimizer.param_groups[0]["lr"])
        if self.late:
            self._update(found[0])
        else:
            self.settle()
        return losses

    def settle(self) -> None:
        """Read the verdict on the latest step and draw the consequences; whoever saves or evaluates asks for it.

        Raises :class:`NonFinite`. Collective where a number was not finite.
        """
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        bad, signal = step.verdict()
        self.agreed_signal = int(signal)
        if bad:
            torch._foreach_copy_(self._buffers, self._held)
            self.optimizer.zero_grad(set_to_none=True)
            self._leave_out(step)
            self.scaler.update()  # which waits for it after each unscaling; a run that stops keeps the scale
        else:
            if not step.masked:
                self._update()
            if self.average is not None:
                self.average.update(unwrapped(self.model), step.iteration)
        self._advance_schedule()

    def gradients(self, batch: Samples, iteration: int) -> dict[str, Tensor]:
        """Forward and backward: the losses of ``batch``, detached, and the gradients of their sum, unscaled."""
        seed_iteration(self.seed, iteration)
        if self.mixing is not None:
            batch = self.mixing(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        parts = _parts(batch, self.accumulate)
        sums: dict[str, Tensor] = {}
        for micro, part in enumerate(parts):
            if micro:
                seed_iteration(self.seed, iteration, micro)
            # The ranks' gradients are averaged once, with the last micro-batch.
            with nullcontext() if micro + 1 == len(parts) else self._without_averaging():
                losses = self._losses(part)
                share = len(part) / len(batch)
                self.scaler.scale(torch.stack(list(losses.values())).sum() * share).backward()
            for name, loss in losses.items():
                sums[name] = sums[name] + share * loss.detach() if micro else share * loss.detach()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        return sums

    def rewrap(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Give the network another wrapper, which ``wrap`` makes. Collective.

        The parameters and the optimizer stay: what gets no gradient takes no step. So do this rank's running
        statistics, in whose place DDP puts those of the first rank when it is built.
        """
        self.settle()
        torch._foreach_copy_(self._held, self._buffers)
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.model, DistributedDataParallel):
            self.model = unwrapped(self.model)
            # The old one lies in reference cycles; until it is gone, its hooks hang on the parameters.
            gc.collect()
        self.model = wrap(self.model)
        torch._foreach_copy_(self._buffers, self._held)

    def _update(self, bad: Tensor | None = None) -> None:
        """Take the step. bad: a number on the device; where it is not 0 the optimizer changes nothing."""
        if self.clip is not None:
            self.clip(self.parameters)
        if bad is not None:
            # torch's fused optimizers know it from GradScaler.
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if bad is not None:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def _scale_is_to_blame(self) -> bool:
        """Whether a gradient may be infinite because its loss was scaled; the scaler leaves such steps out itself."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE

    def _gradients(self) -> list[Tensor]:
        return own_share(parameter.grad for parameter in self.parameters if parameter.grad is not None)

    def _without_averaging(self) -> AbstractContextManager[None]:
        if is_sharded(self.model):
            return without_averaging(self.model)
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _advance_schedule(self) -> None:
        with warnings.catch_warnings():
            # The first steps may be left out, by the scaler or by us; torch then thinks that the order is wrong.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            self.schedule.step()

    def _losses(self, batch: Samples) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.model(batch)

    def _leave_out(self, step: _Unsettled) -> None:
        self.skipped += 1
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in step.losses.items())
        ids = comm.all_gather(step.ids)
        what = (
            f"a loss or gradient is not finite at iteration {step.iteration} ({values} on rank {comm.get_rank()}; "
            f"learning rate {self.last_lr:g}; samples {_few([i for rank in ids for i in rank])})"
        )
        if self.skipped <= self.most_skipped:
            logger.warning("%s; the step is left out, %d of at most %d", what, self.skipped, self.most_skipped)
            return
        raise NonFinite(
            f"{what}. No weight was changed by it. Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_EPOCHS or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True; --resume goes on from the last checkpoint",
            step.iteration,
            ids,
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule, scaler, the count of steps left out, and the average's count of updates."""
        return {
            "optimizer": gathered(self.optimizer.state_dict()),
            "optimizer_names": names_by_number(self.optimizer, unwrapped(self.model)),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "average_updates": self.average.updates if self.average else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; rates, decays and betas are the config's. Collective if sharded."""
        names = names_by_number(self.optimizer, unwrapped(self.model))
        fitted = fitted_state(self.optimizer, names, state["optimizer"], state.get("optimizer_names"))
        self.optimizer.load_state_dict(scattered(fitted, self.optimizer))
        # Only its place in the run: the rates are the config's.
        self.schedule.load_state_dict({**state["scheduler"], "base_lrs": self.schedule.base_lrs})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = state.get("skipped", 0)
        apply_current(self.schedule)


class NonFinite(ValueError):
    """A loss or gradient that is no finite number. ids: the samples of the iteration, a list for each rank."""

    def __init__(self, message: str, iteration: int, ids: list[list[int]]) -> None:
        super().__init__(message)
        self.iteration, self.ids = iteration, ids


@dataclass(frozen=True)
class _Unsettled:
    """A step whose verdict the host has not read. masked: the optimizer obeys it already."""

    iteration: int
    losses: dict[str, Tensor]
    ids: list[int]
    found: tuple[Tensor, torch.cuda.Event | None]
    masked: bool

    def verdict(self) -> list[float]:
        """:func:`verdict`'s numbers; waits for the device if it has not come that far."""
        numbers, arrived = self.found
        if arrived is not None:
            arrived.synchronize()
        return numbers.tolist()


def verdict(losses: dict[str, Tensor], gradients: Sequence[Tensor], signal: int = 0) -> Tensor:
    """(2,) float32 on the device: 1 where a loss or gradient of any rank is not finite; the largest signal. Collective.

    signal: this rank's.
    """
    values = list(losses.values())
    # The largest magnitude: a sum of squares may overflow where each gradient is finite. On CPUs torch finds it several
    # times more slowly than the root of that sum, which is tried first there.
    on_cpu = values[0].device.type == "cpu"
    bad = _non_finite(values, gradients, 2.0 if on_cpu else float("inf"))
    if on_cpu and bad:
        bad = _non_finite(values, gradients, float("inf"))
    found = torch.stack([bad, bad.new_full((), signal)])
    if comm.get_world_size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def _non_finite(values: Sequence[Tensor], gradients: Sequence[Tensor], order: float) -> Tensor:
    """1.0 where a value or the norm of a gradient is not finite. order: of the norms."""
    norms = torch._foreach_norm(list(gradients), order) if gradients else ()
    return (~torch.stack([*values, *norms]).isfinite()).any().float()


def _on_its_way(found: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """``found`` on the host, once the event has come; nobody waits for it here."""
    if found.device.type != "cuda":
        return found, None
    numbers = torch.empty(found.shape, pin_memory=True).copy_(found, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return numbers, arrived


def can_be_masked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a number on the device can keep ``optimizer`` from its step: torch's fused ones, as GradScaler has it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _parts(batch: Samples, count: int) -> Sequence[Samples]:
    if count == 1:
        return [batch]
    if isinstance(batch, Batch):
        return batch.parts(count)
    size = -(-len(batch) // count)
    return [batch[first : first + size] for first in range(0, len(batch), size)]


def sample_ids(batch: Samples) -> list[int]:
    """The ids of a batch's samples; -1 or nothing where they are not known."""
    if isinstance(batch, Batch):
        return [] if batch.ids is None else batch.ids.tolist()
    return [int(sample.get("image_id", -1)) for sample in batch]


def _few(ids: list[int], shown: int = 8) -> str:
    return f"{', '.join(map(str, ids[:shown]))}{f' and {len(ids) - shown} more' if len(ids) > shown else ''}"
