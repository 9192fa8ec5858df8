"""``MODEL.COMPILE``: torch.compile over the network, in place, so that names in the state dict stay what they are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from imgcls.modeling import Trunk
from imgcls.structures import Problem, first_line

logger = logging.getLogger(__name__)

KEY = "MODEL.COMPILE"
# The graphs are taken as torch's tracer gives them; no code is generated and no compiler needed. To find faults with.
WITHOUT_CODE = "aot_eager"
# Forms that one piece of code is compiled for before torch runs the others as they are: modes, types and sizes of
# image, of trunk, head and average alike. torch's own 8 are for one module in one mode.
MOST_FORMS = 64


def compile_network(cfg: CfgNode, network: nn.Module) -> None:
    """Have trunk and head of ``network`` compiled by their first call; does nothing where ``MODEL.COMPILE`` is empty.

    The loss, auxiliary heads and what tells the forms of input apart stay as they are. A second size of image or batch
    makes torch compile once more, for any size. Raises ``ValueError`` where nothing can be compiled here.
    """
    mode = cfg.MODEL.COMPILE
    if not mode:
        return
    _require_it_works(mode, cfg.MODEL.DEVICE)
    compile_copy(mode, network)
    # A check of the first step that asks for the state dict, which cannot be traced.
    network.register_forward_pre_hook(_require_arrival)
    logger.info("%s %s: trunk and head are compiled in their first calls, which takes a while", KEY, mode)


def compile_copy(mode: str, network: nn.Module) -> None:
    """The same for a copy of a network that went through it, such as the average of its weights."""
    compile_modules(mode, [network.get_submodule(name) for name in ("backbone", "head")])


def compile_modules(mode: str, modules: Iterable[nn.Module]) -> None:
    """Compile each of ``modules`` in place; does nothing where ``mode`` is empty."""
    for module in modules if mode else ():
        module.compile(**_options(mode))


def _options(mode: str) -> dict[str, Any]:
    return {"backend": mode} if mode == WITHOUT_CODE else {"mode": mode}


def _require_arrival(network: nn.Module, inputs: object) -> None:
    if network.training and isinstance(network.backbone, Trunk):
        network.backbone.require_arrival()


def _require_it_works(mode: str, device: str) -> None:
    """Compile next to nothing now: what is missing is missing for the network too."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_FORMS)
    try:
        torch.compile(torch.nn.functional.relu, **_options(mode))(torch.zeros(2, device=device))
    except (RuntimeError, ImportError, OSError, AssertionError) as error:
        compiler = "" if shutil.which("c++") or shutil.which("g++") else ". There is no C++ compiler here: install g++"
        what = f"torch.compile does not work here ({first_line(error)}){compiler}"
        raise Problem(what, mode, f"'' (not compiled), or {WITHOUT_CODE} to look for faults", KEY).error() from error
