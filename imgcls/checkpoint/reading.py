"""Reading files of weights without running code from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from imgcls.checkpoint.manifest import content_digest, file_digest, floats_in, manifest_path, read_manifest
from imgcls.checkpoint.safe_load import read_arrays_pickle, read_torch
from imgcls.structures import LoadReport

TORCH_SUFFIXES = (".pth", ".pt", ".pyth", ".ckpt", ".tar", ".safetensors")


def read_checkpoint(path: str | Path, *, mmap: bool = False, check_digest: bool = True) -> dict[str, Any]:
    """The content of a file of weights, on the CPU, as a dict with at least the dict ``model``.

    .pth, .pt and the like are read with ``weights_only``, .safetensors as such, .pkl (detectron2's model zoo)
    through an unpickler that knows arrays and containers only. The digests in the manifest beside it and in the file
    itself must hold where there are any, and no weight may be NaN (check_digest False: the caller sees to both).
    Anything else, or a file that is torn, is a ``ValueError`` naming it.
    """
    path = local_path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; change what names it (MODEL.WEIGHTS, --weights or CHECKPOINT)")
    if check_digest:
        _require_digest(path)
    content = _read(path, mmap)
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict):
        kind = type(content["model"] if isinstance(content, dict) else content).__name__
        raise ValueError(f"{path} holds a {kind}, not a dict of tensors; it is no file of weights")
    if check_digest and "digest" in content and content["digest"] != content_digest(content):
        raise ValueError(f"{path} is damaged or was changed: its content is not what its digest was made of")
    content = content if "model" in content else {"model": content}
    if check_digest:
        _require_numbers(path, content["model"])
    return content


def local_path(path: str | Path) -> Path:
    """The file behind ``path``; a name such as "torchvision://resnet50" is fetched by detectron2's PathManager."""
    return Path(PathManager.get_local_path(str(path)) if "://" in str(path) else path)


def _read(path: Path, mmap: bool) -> Any:
    if path.suffix == ".pkl":
        return read_arrays_pickle(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path, mmap=mmap)
    allowed = ", ".join((*TORCH_SUFFIXES, ".pkl"))
    raise ValueError(f"cannot tell what kind of file {path} is; allowed endings: {allowed}")


def _require_digest(path: Path) -> None:
    manifest = read_manifest(path)
    if manifest is not None and manifest["sha256"] != file_digest(path):
        raise ValueError(
            f"{path} is damaged: its bytes are not those that {manifest_path(path).name} was written for; "
            "restore the file, or take an older checkpoint"
        )


def _require_numbers(path: Path, model: Mapping[str, Any]) -> None:
    for name, tensor in floats_in(model):
        if torch.isnan(tensor).any():
            raise ValueError(f"{path} holds NaN in {name}: its training had failed; take an older checkpoint")


def load_weights(
    module: nn.Module, weights: Mapping[str, Any], *, may_be_new: Callable[[str], bool] | None = None
) -> LoadReport:
    """Copy ``weights`` into ``module`` by exact name and report on each; on a misfit nothing is copied.

    weights: tensors, or numpy arrays as a .pkl has them; anything else is unexpected.
    may_be_new: whether a tensor of ``module`` may stay as it is when the file has it not.
    Counters of batches seen (num_batches_tracked) are neither missed nor unexpected.
    """
    tensors = {n: torch.as_tensor(v) for n, v in weights.items() if isinstance(v, (Tensor, np.ndarray))}
    own, given = without_counters(module.state_dict()), without_counters(tensors)
    fits = [name for name in own if name in given and given[name].shape == own[name].shape]
    absent = [name for name in own if name not in given]
    new = [name for name in absent if may_be_new is not None and may_be_new(name)]
    report = LoadReport(
        loaded=tuple(fits),
        missing=tuple(name for name in absent if name not in new),
        unexpected=tuple(name for name in without_counters(weights) if name not in own or name not in given),
        wrong_shape=tuple(
            (name, tuple(given[name].shape), tuple(own[name].shape))
            for name in own
            if name in given and name not in fits
        ),
        new=tuple(new),
    )
    if report.complete:
        module.load_state_dict(tensors, strict=False)
    return report


def notes_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its network (architecture, contract, classes); a hand-over file has it under imgcls."""
    return {**content, **content.get("imgcls", {})}


def classifier_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ``model`` of a checkpoint; of a hand-over file the trunk under ``backbone.``, and the head it carries."""
    weights = dict(content["model"])
    if not content.get("matching_heuristics"):
        return weights
    return {f"backbone.{name}": tensor for name, tensor in weights.items()} | notes_of(content).get("classifier", {})


def without_counters(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """``tensors`` but for those that count the batches a BatchNorm has seen."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def trunk_weights(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What travels to a detector: the tensors under ``backbone.``, without that prefix and without counters."""
    prefix = "backbone."
    trunk = {name.removeprefix(prefix): tensor for name, tensor in model.items() if name.startswith(prefix)}
    return without_counters(trunk)
