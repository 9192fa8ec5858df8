"""Weights of other libraries as a hand-over file: for detectors, and with its head for classifiers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from imgcls.checkpoint import (
    apply_key_rules,
    load_weights,
    read_checkpoint,
    trunk_weights,
    without_counters,
    write_tensors,
)
from imgcls.data.imagenet import imagenet_classes
from imgcls.modeling import (
    ClsNet,
    Family,
    Source,
    family_of,
    fit_channels,
    input_convolution,
    make_classifier,
    plain,
)
from imgcls.structures import KeyRule, LoadReport, PreprocessingContract, Problem
from imgcls.transfer.handover import Handover
from imgcls.transfer.parity import logits_difference, maps_difference, maps_reference, to_our_keys, trunk_of
from imgcls.transfer.pretrained import Pretrained, fetch, stated_preprocessing
from imgcls.transfer.probe import bare_trunk, measure
from imgcls.transfer.references import BUILDERS, build_reference

# Relative, in float32: rounding stays far below, another epsilon or padding far above.
LARGEST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Imported:
    """What :func:`import_weights` made.

    handover: to be written; report: what became of each tensor of the classifier, by ClsNet's names.
    difference: largest difference of the logits to the library's own network on a random image, relative to the
        largest logit; None where the library is not installed, or there is no head; why_not says which.
    compared: what ``difference`` is of: "logits", or "maps" where the library's head has no counterpart here.
    left: tensors of the file, by its names, that have no place here because they stand behind the last map.
    """

    handover: Handover
    report: LoadReport
    origin: str
    difference: float | None
    why_not: str = ""
    compared: str = "logits"
    left: tuple[str, ...] = ()


def import_weights(
    library: str,
    variant: str,
    file: str | Path | None = None,
    *,
    tag: str = "",
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Imported:
    """``variant`` with the weights of ``library``: those in ``file``, or the library's own trained ones.

    tag: which of the library's trained weights, e.g. "IMAGENET1K_V2"; it also tells which preprocessing a ``file`` had.
    mean, std: of images in 0..255, where the weights were trained with others than the library states.
    in_channels: of the images; the first convolution is adapted (see ``modeling/input_channels.py``).
    Every tensor on either side must find its counterpart, but that a file may hold the trunk alone (a self-supervised
    encoder, a detector's backbone). ``ValueError`` otherwise, naming the tensors.
    """
    source, row = source_of(variant, library), family_of(variant).variants[variant]
    given = _given(library, source.names[variant], file, tag)
    given = replace(given, contract=_normalised_by(given.contract, mean, std))
    mapped = to_our_keys(apply_key_rules(given.tensors, source.rules_for(row)))
    headless = not any(name.startswith("head.fc.") for name in mapped)
    net = _classifier(variant, mapped, given.contract)
    report = load_weights(net, mapped, may_be_new=lambda name: headless and _is_classifiers(name, family_of(variant)))
    report.require_complete(given.origin, f"It should be {library}'s {source.names[variant]} ({variant})")
    if source.maps_only:
        difference: float | None = _compare_maps(library, source, variant, given)
        why_not = ""
    else:
        difference, why_not = _compare(net.eval(), library, source, variant, given, headless)
    compared = "maps" if source.maps_only else "logits"
    if difference is not None and not difference <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"with the weights of {given.origin} {variant} gives other {compared} than {library}'s own network: "
            f"the largest difference is {difference:.1e} of the largest value (limit {LARGEST_DIFFERENCE:.0e}). All "
            f"tensors fit, but {library} builds it in another way for its trained weights; nothing was written"
        )
    # Of a head that stayed random nothing is kept; a class token travels even where there was no head.
    classifier_only = {
        name: tensor for name, tensor in _classifier_only(net, family_of(variant)).items() if name in report.loaded
    }
    return Imported(
        _handover(net, variant, given.contract, classifier_only, in_channels),
        report,
        given.origin,
        difference,
        why_not,
        compared=compared,
        left=_dropped(given.tensors, source.rules_for(row)) if source.maps_only else (),
    )


def write_import(imported: Imported, output: str | Path, *, overwrite: bool = False) -> None:
    """Write the hand-over file (.pth)."""
    output = Path(output)
    if output.suffix != ".pth":
        raise ValueError(f"the hand-over file is a .pth; got {output}; change --output")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another --output, or add --overwrite")
    write_tensors(output, imported.handover.to_content())


def source_of(variant: str, library: str) -> Source:
    """Where the weights of ``library`` go in ``variant``; a ``ValueError`` lists the libraries that have some."""
    sources = family_of(variant).sources
    offering = [name for name, source in sources.items() if variant in source.names]
    if library not in offering:
        allowed = ", ".join(offering) or "none: this network has no counterpart elsewhere"
        raise Problem(f"{variant} takes no weights from there", library, allowed, "--from").error()
    return sources[library]


def _given(library: str, name: str, file: str | Path | None, tag: str) -> Pretrained:
    if file is None:
        return fetch(library, name, tag)
    content = read_checkpoint(file, check_digest=False)
    tensors = {key: torch.as_tensor(value) for key, value in content["model"].items()}
    return Pretrained(tensors, stated_preprocessing(library, name, tag), str(file))


def _normalised_by(
    contract: PreprocessingContract, mean: Sequence[float] | None, std: Sequence[float] | None
) -> PreprocessingContract:
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) not in (1, len(contract.pixel_mean)):
            raise Problem("as many values as channels are needed", list(values), "1 or 3 values", name).error()
    count = len(contract.pixel_mean)
    return replace(
        contract,
        pixel_mean=contract.pixel_mean if mean is None else tuple(mean) * (count // len(mean)),
        pixel_std=contract.pixel_std if std is None else tuple(std) * (count // len(std)),
    )


def _classifier(variant: str, mapped: Mapping[str, Tensor], contract: PreprocessingContract) -> ClsNet:
    last = [tensor for name, tensor in mapped.items() if name.startswith("head.fc.")]
    classes = int(last[-1].shape[0]) if last else 1
    auxiliary = any(name.startswith("head.auxiliary.") for name in mapped)
    return make_classifier(plain(variant), classes, contract, auxiliary=auxiliary)


def _compare(
    net: ClsNet, library: str, source: Source, variant: str, given: Pretrained, headless: bool
) -> tuple[float | None, str]:
    if headless:
        return None, "the file holds no head"
    if library not in BUILDERS:
        return None, f"no network of {library} to compare with"
    try:
        row = family_of(variant).variants[variant]
        reference = build_reference(library, source.names[variant], source.options_for(row))
    except ImportError as error:
        return None, str(error)
    reference.load_state_dict(given.tensors)
    side = max(source.sizes[0], 64)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return logits_difference(net, reference.eval(), x), ""


def _compare_maps(library: str, source: Source, variant: str, given: Pretrained) -> float:
    side = family_of(variant).variants[variant].image_size
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    reference = maps_reference(variant, library, given.tensors)
    return max(maps_difference(trunk_of(variant, source, given.tensors), reference, x).values())


def _dropped(tensors: Mapping[str, Tensor], rules: Sequence[KeyRule]) -> tuple[str, ...]:
    dropping = [re.compile(rule.theirs) for rule in rules if rule.change == "drop"]
    return tuple(name for name in without_counters(tensors) if any(rule.search(name) for rule in dropping))


def _classifier_only(net: ClsNet, family: Family) -> dict[str, Tensor]:
    tensors = without_counters(net.state_dict())
    return {name: tensor for name, tensor in tensors.items() if _is_classifiers(name, family)}


def _is_classifiers(name: str, family: Family) -> bool:
    """Whether ``name`` (ClsNet's) is a tensor that no detector has."""
    return name.startswith("head.") or family.is_classifier_only(name.removeprefix("backbone."))


def _handover(
    net: ClsNet, variant: str, contract: PreprocessingContract, classifier_only: Mapping[str, Tensor], in_channels: int
) -> Handover:
    family = family_of(variant)
    weights = {
        name: tensor for name, tensor in trunk_weights(net.state_dict()).items() if not family.is_classifier_only(name)
    }
    if in_channels != len(contract.pixel_mean):
        key = f"{input_convolution(net.backbone)[0]}.weight"  # type: ignore[arg-type]
        weights[key] = fit_channels(weights[key], in_channels)
        contract = for_channels(contract, in_channels)
    architecture = plain(variant)
    trunk = bare_trunk(architecture, weights, in_channels)
    outputs = [tensor.shape[0] for name, tensor in classifier_only.items() if name == "head.fc.weight"]
    known = outputs == [len(imagenet_classes())]
    return Handover(
        weights=weights,
        architecture=architecture,
        contract=contract,
        folded=False,
        probe=measure(trunk, contract),
        metrics={},
        classes=imagenet_classes() if known else (),
        classifier=classifier_only,
    )


def for_channels(contract: PreprocessingContract, channels: int) -> PreprocessingContract:
    """The contract for images of another number of channels: one takes the mean of all, more repeat them in turn."""
    given = len(contract.pixel_mean)

    def fitted(values: tuple[float, ...]) -> tuple[float, ...]:
        if channels == 1:
            return (sum(values) / given,)
        return tuple(values[index % given] for index in range(channels))

    return replace(contract, pixel_mean=fitted(contract.pixel_mean), pixel_std=fitted(contract.pixel_std))
