"""What an optimizer remembers, carried from a checkpoint into the optimizer that the present config makes.

torch's ``Optimizer.load_state_dict`` takes the checkpoint's rates, decays and betas with it, so that another
``SOLVER.BASE_LR`` would be passed over in silence, and knows parameters by their number, which another weight decay
changes where it puts them into other groups. Here the settings are the config's, and what is remembered finds its
parameter by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def names_by_number(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names in ``model`` of the optimizer's parameters, as its ``state_dict`` numbers them: 0, 1, ..."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def fitted_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], saved: Mapping[str, Any], saved_names: Sequence[str] | None
) -> dict[str, Any]:
    """A state dict for ``optimizer``, which has not taken a step, with what ``saved`` remembers of its parameters.

    names, saved_names: see :func:`names_by_number`; saved_names None: of a checkpoint that does not tell them, which
    fits parameters in the same groups only (otherwise a ``ValueError``). A parameter that is new begins anew.
    """
    ours, theirs = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if saved_names is None:
        _require_same_groups(ours, theirs)
        saved_names = names
    number_of = dict(zip(saved_names, _numbers(theirs), strict=True))
    group_of = {number: group for group in theirs for number in group["params"]}
    groups = []
    for group in ours:
        # Such as the count of steps, which timm's optimizers keep in the group.
        source: Mapping[str, Any] = group_of.get(number_of.get(names[group["params"][0]], -1), {})
        groups.append({**{key: value for key, value in source.items() if key not in group}, **group})
    remembered = saved["state"]
    state = {
        number: remembered[number_of[name]] for number, name in enumerate(names) if number_of.get(name) in remembered
    }
    return {"state": state, "param_groups": groups}


def _numbers(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [number for group in groups for number in group["params"]]


def _require_same_groups(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    sizes = [[len(group["params"]) for group in groups] for groups in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the config groups the parameters in another way ({sizes[0]}) than the checkpoint ({sizes[1]}), which "
            "does not tell their names: take the old SOLVER.WEIGHT_DECAY*, LAYER_DECAY and PARAM_OVERRIDES"
        )
