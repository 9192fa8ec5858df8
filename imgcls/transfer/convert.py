"""From a classifier's checkpoint to the hand-over file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from imgcls.checkpoint import read_checkpoint, trunk_weights, write_tensors
from imgcls.modeling import Architecture, Trunk, family_of, input_convolution
from imgcls.structures import PreprocessingContract
from imgcls.transfer.handover import Handover, is_classifier_checkpoint
from imgcls.transfer.probe import bare_trunk, measure


def convert(weights: str | Path, output: str | Path, *, fold: bool = False, overwrite: bool = False) -> Handover:
    """Write ``output`` (.pth) from the classifier's checkpoint ``weights``; returns what was written.

    fold: fold std and channel order into the first convolution, for detectors that keep detectron2's BGR input of
        standard deviation 1. The mean stays in the contract: folded into a convolution that pads, it would be wrong at
        the borders.
    """
    output = Path(output)
    if output.suffix != ".pth":
        raise ValueError(f"the hand-over file is a .pth (a .pkl would lose running statistics); got {output}")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another --output, or add --overwrite")
    handover = make_handover(weights, fold=fold)
    write_tensors(output, handover.to_content())
    return handover


def make_handover(weights: str | Path, *, fold: bool = False) -> Handover:
    """The hand-over of a classifier's checkpoint, in memory."""
    content = read_checkpoint(weights)
    if not is_classifier_checkpoint(content):
        raise ValueError(
            f"{weights} is no checkpoint of an imgcls classifier (it has no contract and architecture); "
            "give --weights a model_final.pth or model_best.pth of tools/train_net.py or train_net_builtin.py"
        )
    if not content["architecture"]:
        raise ValueError(
            f"{weights} has a backbone that is not imgcls' own; only registered variants can be handed over"
        )
    architecture = Architecture(**content["architecture"])
    contract = PreprocessingContract.from_dict(content["contract"])
    family = family_of(architecture.variant)
    tensors = {
        name: tensor for name, tensor in trunk_weights(content["model"]).items() if not family.is_classifier_only(name)
    }
    trunk = bare_trunk(architecture, tensors, len(contract.pixel_mean))
    if fold:
        contract = fold_normalization(trunk, contract)
        tensors = {name: value for name, value in trunk.state_dict().items() if name in tensors}
    return Handover(
        weights={name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        architecture=architecture,
        contract=contract,
        folded=fold,
        probe=measure(trunk, contract),
        metrics=content.get("metrics", {}),
        classes=tuple(content.get("classes", ())),
    )


@torch.no_grad()
def fold_normalization(trunk: Trunk, contract: PreprocessingContract) -> PreprocessingContract:
    """Change the first convolution so that it takes BGR - mean with std 1; returns the contract of that input."""
    _, conv = input_convolution(trunk)
    if conv.groups != 1:
        raise ValueError(f"{trunk.architecture.variant} does not begin with a plain convolution; nothing can be folded")
    std = torch.tensor(contract.pixel_std, dtype=torch.float64).view(1, -1, 1, 1)
    conv.weight.copy_((conv.weight.double() / std).flip(1))
    return replace(
        contract,
        input_format="BGR" if contract.input_format == "RGB" else "RGB",
        pixel_mean=contract.pixel_mean[::-1],
        pixel_std=(1.0,) * len(contract.pixel_std),
    )
