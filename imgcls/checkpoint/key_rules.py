"""Applying a family's key rules to a foreign checkpoint."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from imgcls.structures import KeyRule

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda tensor: tensor,
    "to_conv": lambda tensor: tensor[..., None, None],
    "to_linear": lambda tensor: tensor[..., 0, 0],
}


def apply_key_rules(tensors: Mapping[str, Tensor], rules: Sequence[KeyRule]) -> dict[str, Tensor]:
    """``tensors`` under our names, changed as the rules say. Nothing is copied that need not be.

    Two tensors that would get one name, and a part without its neighbours, are a ``ValueError`` naming them.
    """
    whole: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], Tensor]] = defaultdict(dict)
    # Compiled here: a family that lists every tensor has more patterns than re's own cache keeps.
    patterns = [(re.compile(rule.theirs), rule) for rule in rules]
    for theirs, tensor in tensors.items():
        renamed = _rename(theirs, tensor, patterns)
        if renamed is None:
            continue
        ours, tensor, part = renamed
        taken = origin.get(ours) if part is None else (theirs if part in parts[ours] else None)
        if taken is not None:
            raise ValueError(f"{theirs} and {taken} would both become {ours}; the key rules do not fit this checkpoint")
        if part is None:
            whole[ours], origin[ours] = tensor, theirs
        else:
            parts[ours][part] = tensor
    for ours, pieces in parts.items():
        whole[ours] = _joined(ours, pieces)
    return whole


def _rename(
    name: str, tensor: Tensor, patterns: Sequence[tuple[re.Pattern[str], KeyRule]]
) -> tuple[str, Tensor, tuple[int, int] | None] | None:
    part = None
    for pattern, rule in patterns:
        if pattern.search(name) is None:
            continue
        if rule.change == "drop":
            return None
        name = pattern.sub(rule.ours, name)
        tensor = CHANGES[rule.change](tensor)
        part = rule.part or part
    return name, tensor, part


def _joined(name: str, pieces: Mapping[tuple[int, int], Tensor]) -> Tensor:
    count = next(iter(pieces))[1]
    wanted = [(index, count) for index in range(count)]
    missing = [str(index) for index, _ in wanted if (index, count) not in pieces]
    if missing:
        raise ValueError(f"{name} is made of {count} tensors; number {', '.join(missing)} is missing in the checkpoint")
    return torch.cat([pieces[key] for key in wanted])
