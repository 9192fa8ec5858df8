"""The mean of several checkpoints of one network: a "model soup" (Wortsman et al. 2022, arXiv:2203.05482)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from imgcls.checkpoint.manifest import file_digest
from imgcls.checkpoint.reading import read_checkpoint

# What must be one and the same, and what else of a checkpoint holds for the mean as well.
SAME = ("architecture", "contract", "classes")
KEPT = (*SAME, "imgcls_version")


def average_checkpoints(paths: Sequence[Path], shares: Sequence[float] = ()) -> dict[str, Any]:
    """The content of a file of weights: the mean of ``model`` of the classifiers' checkpoints ``paths``.

    shares: of each file, >= 0, of which their sum is taken to be the whole; empty: equal shares.
    Floating tensors, running statistics among them, are added up in float64; of others (counters) the last file's
    stand. Other architectures, contracts, classes, names or shapes are a ``ValueError``. The result has no state to
    resume from, and no metrics: it was not evaluated. ``averaged`` tells name, SHA-256 and share of each file.
    """
    if len(paths) < 2:
        raise ValueError(f"a mean needs two checkpoints at least; got {len(paths)}")
    portions = _portions(paths, shares)
    first: dict[str, Any] = {}
    total: dict[str, Tensor] = {}
    for path, portion in zip(paths, portions, strict=True):
        content = read_checkpoint(path)
        _require_same(first, paths[0], content, path)
        first = first or content
        for name, tensor in content["model"].items():
            if tensor.is_floating_point():
                added = tensor.double() * portion
                total[name] = total[name] + added if name in total else added
            else:
                total[name] = tensor
    files = [
        {"file": path.name, "sha256": file_digest(path), "share": portion}
        for path, portion in zip(paths, portions, strict=True)
    ]
    weights = {name: tensor.to(first["model"][name].dtype) for name, tensor in total.items()}
    return {"model": weights, **{key: first[key] for key in KEPT if key in first}, "averaged": files}


def _portions(paths: Sequence[Path], shares: Sequence[float]) -> list[float]:
    """Shares that add up to 1."""
    shares = list(shares) or [1.0] * len(paths)
    sound = len(shares) == len(paths) and all(0 <= share < float("inf") for share in shares)
    if not sound or not sum(shares):
        raise ValueError(
            f"the shares do not fit: got {shares}; allowed: {len(paths)} numbers >= 0, one for each checkpoint, not "
            "all of them 0; change --shares"
        )
    return [share / sum(shares) for share in shares]


def _require_same(first: Mapping[str, Any], first_path: Path, content: Mapping[str, Any], path: Path) -> None:
    absent = [key for key in SAME if not content.get(key)]
    if absent:
        raise ValueError(
            f"{path} is no checkpoint of an imgcls classifier (it has no {', '.join(absent)}); give the model_*.pth of "
            "tools/train_net.py or train_net_builtin.py"
        )
    if not first:
        return
    for key in SAME:
        if content[key] != first[key]:
            ours, theirs = _different(first[key], content[key])
            raise ValueError(
                f"{path} has another {key} than {first_path}: {theirs} to {ours}; only checkpoints of one network, of "
                "one input and one list of classes have a mean"
            )
    shapes = [{name: tuple(tensor.shape) for name, tensor in each["model"].items()} for each in (first, content)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"{path} has other tensors than {first_path}: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}; only "
            "checkpoints of one network have a mean"
        )


def _different(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """What differs of two notes, not all of them."""
    if isinstance(ours, Mapping):
        keys = [key for key in ours if ours[key] != theirs.get(key)] or list(ours)
        return {key: ours[key] for key in keys}, {key: theirs.get(key) for key in keys}
    extra = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    return (extra[0][:4], extra[1][:4]) if any(extra) else ("those in one order", "the same in another order")
