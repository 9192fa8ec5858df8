"""FSDP2: weights, gradients and optimizer state cut up over the ranks (``SOLVER.PARALLEL fsdp2``).

torch's ``fully_shard`` does it. What is evaluated, looked at and saved is the whole network beside it, so checkpoints
are the same files as without, and any number of ranks goes on with them, sharded or not.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isinf
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from imgcls.config import register_check
from imgcls.engine.machine.compiling import compile_modules
from imgcls.modeling import Trunk, is_classifier
from imgcls.solver.groups import blocks_of
from imgcls.structures import Problem

logger = logging.getLogger(__name__)

KEY = "SOLVER.PARALLEL"
FSDP2 = "fsdp2"
# These look at one element, or at the norm of one tensor, which is the same cut up; Muon multiplies whole matrices.
OPTIMIZERS = ("SGD", "AdamW", "Adam", "NAdam", "RAdam", "Adagrad", "RMSprop", "RMSpropTF", "LAMB", "LARS", "Lion")


class Sharded:
    """A network in two forms: ``network``, cut up over the ranks, which trains, and ``whole``, as it was before.

    Both have the same buffers, one and the same tensors. The weights of ``whole`` are those of the moment when
    :meth:`gather` was called; with the next step of ``network`` their memory goes.

    Weights travel, and gradients are averaged, in float32: autocast alone makes them narrower, as it does under DDP.
    With FSDP2's own mixed precision the norms' weights would be bfloat16 too, which not every kernel takes.
    """

    def __init__(self, whole: nn.Module, *, compiled: str = "") -> None:
        self.whole, self.network = whole, copy.deepcopy(whole)
        for mine, theirs in zip(self.network.modules(), whole.modules(), strict=True):
            mine._buffers.update(theirs._buffers)
        for parameter in self.network.parameters():
            # fully_shard takes no weights in channels-last order; maps may be in it all the same.
            parameter.data = parameter.data.contiguous()
        # Views that somebody changes in place; tests/test_sharding.py compares the families' trunks with DDP.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(next(whole.parameters()).device.type, (comm.get_world_size(),))
        cut = list(blocks(self.network))
        compile_modules(compiled, [*cut, self.network.get_submodule("head")])
        for block in cut:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        self.network.register_forward_pre_hook(self._before_step, prepend=True)
        self._forms = [(parameter.size(), parameter.stride()) for parameter in whole.parameters()]
        self._current = True
        logger.info("weights cut up over %d ranks, %d blocks (FSDP2)", comm.get_world_size(), len(cut))

    @classmethod
    def from_cfg(cls, cfg: CfgNode, whole: nn.Module) -> Sharded | None:
        """What ``SOLVER.PARALLEL`` asks for; None where nothing is cut up: under DDP, or on one rank."""
        if cfg.SOLVER.PARALLEL != FSDP2:
            return None
        if comm.get_world_size() == 1:
            logger.info("%s fsdp2: one rank, nothing is cut up", KEY)
            return None
        return cls(whole, compiled=cfg.MODEL.COMPILE)

    @torch.no_grad()
    def gather(self) -> None:
        """Give ``whole`` the weights of now. Collective."""
        if self._current:
            return
        for (mine, theirs), (size, stride) in zip(self._pairs(), self._forms, strict=True):
            mine.data = torch.empty_strided(size, stride, dtype=mine.dtype, device=mine.device)
            mine.copy_(theirs.full_tensor())
        self._current = True

    @torch.no_grad()
    def scatter(self) -> None:
        """Give ``network`` the weights of ``whole``, into which others were loaded. Collective."""
        for mine, theirs in self._pairs():
            theirs.copy_(distribute_tensor(mine.detach(), theirs.device_mesh, theirs.placements))

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Any]]:
        return zip(self.whole.parameters(), self.network.parameters(), strict=True)

    def _before_step(self, *_: object) -> None:
        """Let go of the memory of the weights of ``whole``, which are about to be of the past."""
        if isinstance(self.whole.backbone, Trunk):
            # It asks for a state dict, which in the middle of a forward pass would cut the weights up again.
            self.whole.backbone.require_arrival()
            self.network.backbone._arrival_settled = True  # type: ignore[union-attr] # a Trunk as well
        for parameter in self.whole.parameters():
            parameter.data = parameter.data.new_empty(0)
        self._current = False


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What is cut up, and gathered again, as one: the blocks of the trunk's stages; what has no block stays behind."""
    stages = model.backbone.stage_modules() if isinstance(model.backbone, Trunk) else []
    for _, stage in stages:
        yield from (block for block in blocks_of(stage) if any(True for _ in block.parameters()))


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` is the ``network`` of a :class:`Sharded`."""
    return isinstance(model, FSDPModule)


@contextmanager
def without_averaging(model: Any) -> Iterator[None]:
    """Within, gradients add up on each rank, in full; the backward pass behind it averages and cuts them up."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def own_share(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each tensor the part that lies on this rank; nothing of those that have none here."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return [part for part in parts if part.numel()]


def gathered(state: Any) -> Any:
    """``state`` with whole tensors, on the CPU of rank 0, for those cut up; empty ones on other ranks. Collective."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()
    return whole.cpu() if comm.is_main_process() else whole.new_empty(0)


def scattered(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's ``state`` with what is of a parameter's shape cut up as the parameter is. Collective."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    moments = {
        index: {name: cut(value, parameters[index]) for name, value in own.items()}
        for index, own in state["state"].items()
    }
    return {**state, "state": moments}


@register_check
def check_sharding(cfg: CfgNode) -> list[Problem]:
    """What does not go together with ``SOLVER.PARALLEL fsdp2``."""
    if not is_classifier(cfg) or cfg.SOLVER.PARALLEL != FSDP2:
        return []
    node, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    averages = "False with SOLVER.PARALLEL fsdp2 (an average needs every weight at every step), or SOLVER.PARALLEL ddp"
    rows = [
        (node.EMA.ENABLED, "SOLVER.EMA.ENABLED", True, averages),
        (node.SWA.ENABLED, "SOLVER.SWA.ENABLED", True, averages),
        (bool(node.FREEZE), "SOLVER.FREEZE", node.FREEZE, "[] with SOLVER.PARALLEL fsdp2, or SOLVER.PARALLEL ddp"),
        (
            node.OPTIMIZER not in OPTIMIZERS,
            "SOLVER.OPTIMIZER",
            node.OPTIMIZER,
            f"{', '.join(OPTIMIZERS)} with SOLVER.PARALLEL fsdp2, or SOLVER.PARALLEL ddp",
        ),
        (
            clip.ENABLED and clip.CLIP_TYPE != "value" and isinf(clip.NORM_TYPE),
            "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
            clip.NORM_TYPE,
            "a finite number with SOLVER.PARALLEL fsdp2, or SOLVER.PARALLEL ddp",
        ),
        (cfg.MODEL.DEVICE == "mps", "MODEL.DEVICE", "mps", "cuda or cpu with SOLVER.PARALLEL fsdp2"),
    ]
    what = "this does not work on weights that are cut up over the ranks"
    return [Problem(what, value, allowed, key) for wrong, key, value, allowed in rows if wrong]
