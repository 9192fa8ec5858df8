"""A probe image made from a seed and what a trunk makes of it: proof by a file alone that weights mean the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imgcls.modeling import Architecture, Trunk, make_trunk
from imgcls.structures import PreprocessingContract

SEED, SIZE = 20240417, 128

BATCH_NORMS = ("BN", "SyncBN", "naiveSyncBN", "FrozenBN")


def probe_image(seed: int = SEED, size: int = SIZE, channels: int = 3) -> Tensor:
    """(channels, size, size) uint8, in RGB; the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, size, size), generator=generator, dtype=torch.uint8)


def bare_trunk(architecture: Architecture, weights: Mapping[str, Tensor], channels: int) -> Trunk:
    """The trunk of an architecture, outside any model, with ``weights``, in eval mode, returning every map.

    A tensor that is missing or superfluous is a ``ValueError``.
    """
    from imgcls.checkpoint import load_weights

    if architecture.norm in BATCH_NORMS:
        # Running statistics are used alike by every kind of BatchNorm in eval mode.
        architecture = replace(architecture, norm="BN")
    trunk = make_trunk(architecture, in_channels=channels, for_detector=True)
    report = load_weights(trunk, weights)
    report.require_complete(f"a {architecture.variant} trunk", "The checkpoint and its own description disagree")
    return trunk.eval()


@torch.no_grad()
def features(
    body: nn.Module,
    image: Tensor,
    contract: PreprocessingContract,
    dtype: torch.dtype,
    *,
    swap_channels: bool = False,
) -> dict[str, Tensor]:
    """Maps of ``body`` for one uint8 RGB image (C, H, W), normalised as ``contract`` says, computed in ``dtype``.

    swap_channels: turn the channels' order round after normalising, to see whether the weights want it so.
    """
    channels = image if contract.input_format == "RGB" else image.flip(0)
    mean, std = (torch.tensor(v, dtype=dtype).view(-1, 1, 1) for v in (contract.pixel_mean, contract.pixel_std))
    normalised = (channels.to(dtype) - mean) / std
    if swap_channels:
        normalised = normalised.flip(0)
    body = body if dtype == torch.float32 else copy.deepcopy(body).to(dtype)
    was_training = body.training
    # forward, not a call: under a pyramid a call returns maps that were made to fit (modeling/fitting.py).
    maps = body.eval().forward(normalised[None])
    body.train(was_training)
    return {name: value[0] for name, value in maps.items()}


@torch.no_grad()
def stage_maps(trunk: Trunk, image: Tensor, contract: PreprocessingContract, dtype: torch.dtype) -> dict[str, Tensor]:
    """Like :func:`features`, with the map after every stage, whatever the trunk returns on its own."""
    if not trunk.stages_return_maps:
        return features(trunk, image, contract, dtype)
    outputs: dict[str, Tensor] = {}
    trunk = trunk if dtype == torch.float32 else copy.deepcopy(trunk).to(dtype)
    handles = [
        stage.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out[0].clone()))
        for name, stage in trunk.stage_modules()
    ]
    features(trunk, image, contract, dtype)
    for handle in handles:
        handle.remove()
    return outputs


def measure(trunk: Trunk, contract: PreprocessingContract) -> dict[str, Any]:
    """What goes into the file: seed, size, and per stage the float64 mean of each channel and the largest magnitude."""
    maps = stage_maps(trunk, probe_image(channels=len(contract.pixel_mean)), contract, torch.float64)
    return {
        "seed": SEED,
        "size": SIZE,
        "means": {name: value.mean(dim=(1, 2)) for name, value in maps.items()},
        "scales": {name: float(value.abs().max()) for name, value in maps.items()},
    }


def difference_to_probe(maps: Mapping[str, Tensor], probe: Mapping[str, Any]) -> dict[str, float]:
    """Per stage: the largest difference of the channels' means from the recorded ones, relative to the map's scale."""
    return {
        name: float((value.double().mean(dim=(1, 2)) - probe["means"][name]).abs().max())
        / (probe["scales"][name] or 1.0)
        for name, value in maps.items()
    }


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two maps relative to the first's largest magnitude."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(torch.finfo(ours.dtype).tiny))
