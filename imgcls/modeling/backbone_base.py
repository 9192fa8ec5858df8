"""What every trunk shares: stages booked with stride and channels, real freezing, and the check that weights came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

from imgcls.layers import dilate, recomputed


@dataclass(frozen=True)
class Architecture:
    """What must be the same where the weights come from and where they go: values of MODEL.BACKBONE's keys.

    options: those of the family's options that shape the tensors (the sandbox's rows, the size of a position grid).
    """

    variant: str
    stem: str = "standard"
    norm: str = "BN"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, loadable with ``weights_only``."""
        return asdict(self)


class NoSuchMap(ValueError):
    """A map was asked for that the network has not; ``missing`` and ``known`` are names of maps."""

    def __init__(self, network: str, missing: Sequence[str], known: Sequence[str]) -> None:
        super().__init__(
            f"{network} has no feature map {', '.join(map(repr, missing))}; allowed: {', '.join(known)}; "
            "change MODEL.BACKBONE.OUT_FEATURES or the IN_FEATURES that ask for it"
        )
        self.missing, self.known = tuple(missing), tuple(known)


def require_maps(network: str, wanted: Iterable[str], known: Sequence[str]) -> None:
    """Raise :class:`NoSuchMap` where ``wanted`` names a map that is not among ``known``."""
    missing = [name for name in wanted if name not in known]
    if missing:
        raise NoSuchMap(network, missing, known)


class Trunk(Backbone):
    """A backbone that detectron2's classes can be mixed with; see :class:`StagedTrunk` for one's own networks.

    Freezing is requires_grad plus eval: no module is replaced, so keys and classes stay what they were.
    """

    architecture = Architecture("")
    # Why the weights must have come before training starts; empty: they need not.
    weights_expected = ""
    detector_only: tuple[str, ...] = ()
    # Whether the modules of stage_modules() return (N, C, H, W); otherwise only the trunk's own maps can be compared.
    stages_return_maps = True
    # Gradient checkpointing, stage by stage.
    checkpointing = False
    # Parameters beside the modules that belong to the first stage (position embeddings).
    first_stage_parameters: tuple[str, ...] = ()
    _frozen: tuple[nn.Module, ...] = ()

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        """The stages in order with their names: ("stem", ...), ("res2", ...) and so on."""
        raise TypeError(f"{type(self).__name__} does not say what its stages are")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W), normalised -> feature name -> (N, channels, ceil(H / stride), ceil(W / stride)).

        One stage after another; a trunk that is no chain of its stages has a forward of its own.
        """
        if self.training:
            self.require_arrival()
        maps = {}
        for name, stage in self.stage_modules():
            x = self.run_stage(stage, x)
            if name in self._out_features:
                maps[name] = x
        return maps

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """``stage(x)``, with its maps computed again in the backward pass where that was asked for."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return recomputed(stage, x)
        return stage(x)

    def dilate_to(self, output_stride: int) -> None:
        """Keep every stage at a stride of at most ``output_stride``: its convolutions are dilated instead."""
        strides, dilation = self._out_feature_strides, 1
        before = 1
        for name, stage in self.stage_modules():
            booked, own = strides.get(name, before), strides.get(name, before) // before
            if booked > output_stride and own > 1:
                dilation = dilate(stage, dilation, own)
            elif dilation > 1:
                dilate(stage, dilation, 1)
            before = booked
        for name, stride in strides.items():
            strides[name] = min(stride, output_stride)

    def freeze(self, freeze_at: int = 0) -> Trunk:
        """Freeze the first ``freeze_at`` stages (1: the stem, 2: the stem and res2, ...), running statistics too."""
        stages = self.stage_modules()
        if not 0 <= freeze_at <= len(stages):
            raise ValueError(
                f"cannot freeze {freeze_at} stages of {self.architecture.variant or type(self).__name__}; "
                f"allowed: 0 to {len(stages)}; change MODEL.BACKBONE.FREEZE_AT"
            )
        # A tuple of modules is no submodule: freezing adds no key to the state dict.
        self._frozen = tuple(stage for _, stage in stages[:freeze_at])
        for stage in self._frozen:
            stage.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if freeze_at and name in self.first_stage_parameters:
                parameter.requires_grad_(False)
            elif self.is_detector_only(name):
                # It comes from no classifier: frozen it would stay as it was initialised.
                parameter.requires_grad_(True)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Trunk:
        """As in torch, but frozen stages stay in eval mode."""
        super().train(mode)
        for stage in self._frozen:
            stage.eval()
        return self

    def watch_arrival(self) -> None:
        """From now on note which tensors ``load_state_dict`` brings; see :meth:`require_arrival`."""
        self._arrived: set[str] = set()
        self._arrival_settled = False
        self.register_load_state_dict_pre_hook(_note_arrivals)

    def require_arrival(self) -> None:
        """Raise ``ValueError`` if training would start on tensors that should have been loaded and were not.

        Called by the first forward in training mode: detectron2's checkpointer only warns when a file matches nothing.
        """
        if getattr(self, "_arrival_settled", True):
            return
        wanted = self._wanted_tensors()
        lost = [key for key in wanted if key not in self._arrived]
        if lost:
            reason = self.weights_expected or f"MODEL.BACKBONE.FREEZE_AT is {len(self._frozen)}"
            raise ValueError(
                f"{reason}, but {len(wanted) - len(lost)} of {len(wanted)} tensors of the backbone "
                f"{self.architecture.variant!r} were loaded; first missing: {', '.join(lost[:3])}. Give MODEL.WEIGHTS "
                "a file that convert_to_detection wrote for this network (verify_transfer tells what is wrong); "
                "or, to train from random weights, set MODEL.WEIGHTS '' and MODEL.BACKBONE.FREEZE_AT 0"
            )
        self._arrival_settled = True

    def _wanted_tensors(self) -> list[str]:
        if self.weights_expected:
            keys: Iterable[str] = self.state_dict()
        else:
            # A stage may stand under another name than its map's (RegNet's s1 gives res2).
            names = {id(module): name for name, module in self.named_modules()}
            keys = [f"{names[id(stage)]}.{key}" for stage in self._frozen for key in stage.state_dict()]
            keys += [key for key in self.state_dict() if self._frozen and key in self.first_stage_parameters]
        return [key for key in keys if not (is_bookkeeping(key) or self.is_detector_only(key))]

    def is_detector_only(self, key: str) -> bool:
        """Whether ``key`` is a tensor that only a detector's body has."""
        return any(fnmatch(key, pattern) for pattern in self.detector_only)


def is_bookkeeping(key: str) -> bool:
    """Whether a state-dict key counts steps rather than holding weights: such keys do not travel."""
    return key.endswith("num_batches_tracked")


def _note_arrivals(trunk: Trunk, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    for key, own in trunk.state_dict().items():
        given = state_dict.get(prefix + key)
        if given is not None and given.shape == own.shape:
            trunk._arrived.add(key)


class StagedTrunk(Trunk):
    """A chain of stages. A family adds them in order; strides and channels are booked while it does."""

    def __init__(self) -> None:
        super().__init__()
        self._stage_names: list[str] = []
        self._out_features: list[str] = []
        self._out_feature_channels: dict[str, int] = {}
        self._out_feature_strides: dict[str, int] = {}

    def add_stage(self, name: str, stage: nn.Module, *, channels: int, stride: int) -> None:
        """Append ``stage``, which returns ``channels`` maps and divides height and width by ``stride`` (ceil)."""
        before = self._out_feature_strides[self._stage_names[-1]] if self._stage_names else 1
        self.add_module(name, stage)
        self._stage_names.append(name)
        self._out_feature_strides[name] = before * stride
        self._out_feature_channels[name] = channels
        self._out_features = [name]

    def keep(self, out_features: Iterable[str] | None) -> None:
        """Choose the maps to return (None: the last) and drop the stages after the last of them."""
        wanted = list(out_features or self._stage_names[-1:])
        require_maps(type(self).__name__, wanted, self._stage_names)
        last = max(self._stage_names.index(name) for name in wanted)
        for name in self._stage_names[last + 1 :]:
            # As in detectron2's ResNet: stages nobody reads cost memory, and DDP waits for their gradients.
            delattr(self, name)
        del self._stage_names[last + 1 :]
        self._out_features = wanted

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        return [(name, getattr(self, name)) for name in self._stage_names]
