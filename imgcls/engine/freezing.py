"""Freezing by pattern: which weights train at an iteration is a pure function of the config and of the iteration."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from imgcls.config import iterations_for, register_check
from imgcls.engine.ranks.distributed import wrap_for_ranks
from imgcls.engine.step import TrainStep, unwrapped
from imgcls.modeling import ClsNet, is_classifier
from imgcls.structures import Problem

logger = logging.getLogger(__name__)

KEY = "SOLVER.FREEZE"
NEVER = 1 << 62  # an iteration that no run comes to
END = NEVER - 1  # behind the last iteration of any run: only what is frozen for good is frozen


class Freezing:
    """The rows of ``SOLVER.FREEZE``, seen from one network.

    rows: (pattern, first iteration that trains what it names, or NEVER). A pattern names parameters, or modules with
        all that is in them (``fnmatchcase`` of the dotted name); of several that match the last counts.

    Frozen parameters ask for no gradient. A module whose trainable parameters are all frozen is in eval mode, so that
    its running statistics stay and its dropout is off; no module is replaced. Parameters that did not train anyway
    (``MODEL.BACKBONE.FREEZE_AT``) are left to whoever froze them.
    """

    def __init__(self, network: nn.Module, rows: Sequence[tuple[str, int]]) -> None:
        self._rows = rows
        trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        thaws = {name: self._thaws(name) for name in trainable}
        self._require_matches(thaws)
        if thaws and all(thaws.values()):
            what, allowed = "every weight is frozen at the start", "rows that leave some out, such as the head's"
            raise Problem(what, [pattern for pattern, _ in rows], allowed, KEY).error()
        self.parameters = {name: thaw for name, thaw in thaws.items() if thaw}
        self.modules = dict(self._frozen_modules(network, {trainable[name]: thaw for name, thaw in thaws.items()}))
        self._boundaries = sorted({thaw for thaw in self.parameters.values() if thaw < NEVER})
        self._phase = self.phase(END)

    @classmethod
    def from_cfg(cls, cfg: CfgNode, network: nn.Module, num_images: int) -> Freezing:
        """num_images: of the training set, to turn epochs into iterations."""
        rows = [
            (pattern, iterations_for(epoch, num_images, cfg.SOLVER.IMS_PER_BATCH, key=KEY) or NEVER)
            for pattern, epoch in cfg.SOLVER.FREEZE
        ]
        freezing = cls(network, rows)
        random = [name for name in freezing.parameters if cfg.MODEL.HEAD.RESET and name.startswith("head.")]
        if random:
            what = f"the new head would be frozen at random weights ({random[0]})"
            raise Problem(what, cfg.SOLVER.FREEZE, "rows without the head, or MODEL.HEAD.RESET False", KEY).error()
        return freezing

    def phase(self, iteration: int) -> int:
        """A number that changes where what is frozen does."""
        return bisect_right(self._boundaries, iteration)

    def apply(self, network: ClsNet, iteration: int) -> None:
        """Freeze in ``network`` (or a copy of it, as an average is) what ``iteration`` does not train."""
        for name, parameter in network.named_parameters():
            if name in self.parameters:
                parameter.requires_grad_(iteration >= self.parameters[name])
        network.frozen = tuple(m for name, m in network.named_modules() if iteration < self.modules.get(name, 0))
        network.train(network.training)

    def follow(self, step: TrainStep, iteration: int) -> None:
        """Make ``step`` train what ``iteration`` trains; does nothing where that is as before. Collective otherwise."""
        if self.phase(iteration) == self._phase:
            return
        step.settle()
        network: Any = unwrapped(step.model)
        for each in [network, *([step.average.network] if step.average is not None else [])]:
            self.apply(each, iteration)
        # DDP averages the gradients of those weights only that were trainable when it was built.
        step.rewrap(wrap_for_ranks)
        self._phase = self.phase(iteration)
        frozen = [name for name, thaw in self.parameters.items() if iteration < thaw]
        logger.info("from iteration %d on %d of %d tensors are frozen", iteration, len(frozen), len(step.parameters))

    def _thaws(self, name: str) -> int:
        """The first iteration that trains the parameter or module ``name``; 0: it is not frozen."""
        matching = (thaw for pattern, thaw in reversed(self._rows) if _names(pattern, name))
        return next(matching, 0)

    def _frozen_modules(self, network: nn.Module, thaws: dict[nn.Parameter, int]) -> Iterator[tuple[str, int]]:
        """Name and first iteration that trains it, of each module that is ever frozen as a whole."""
        for name, module in network.named_modules():
            own = [thaws[parameter] for parameter in module.parameters() if parameter in thaws]
            thaw = min(own) if own else self._thaws(name)
            if thaw:
                yield name, thaw

    def _require_matches(self, names: Any) -> None:
        for pattern, _ in self._rows:
            if not any(_names(pattern, name) for name in names):
                what = "nothing that trains has a name like this"
                raise Problem(what, pattern, "a pattern such as backbone.* or backbone.stem", KEY).error()


def _names(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the dotted ``name``, or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


@register_check
def check_freeze(cfg: CfgNode) -> list[Problem]:
    """The rows of ``SOLVER.FREEZE``; whether a pattern matches is seen when the network is there."""
    if not is_classifier(cfg) or not cfg.SOLVER.FREEZE:
        return []
    allowed = "[pattern of names, epoch that ends it (0: it never ends)]"
    problems = [
        Problem("a row of what is frozen is no such row", row, allowed, KEY)
        for row in cfg.SOLVER.FREEZE
        if not _is_row(row)
    ]
    if not cfg.MODEL.WEIGHTS:
        what, allowed = "random weights would be frozen", "[], or weights to freeze in MODEL.WEIGHTS"
        problems.append(Problem(what, cfg.SOLVER.FREEZE, allowed, f"{KEY} or MODEL.WEIGHTS"))
    return problems


def _is_row(row: Any) -> bool:
    if not isinstance(row, list | tuple) or len(row) != 2 or not isinstance(row[0], str):
        return False
    epoch = row[1]
    return isinstance(epoch, int | float) and not isinstance(epoch, bool) and isfinite(epoch) and epoch >= 0
