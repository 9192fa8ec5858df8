"""Whether a network is its reference: the reference's weights, put into ours, must give the same logits, or maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from imgcls.checkpoint import apply_key_rules, load_weights
from imgcls.modeling import ClsNet, Source, Trunk, family_of, make_classifier, make_trunk, plain
from imgcls.structures import PreprocessingContract
from imgcls.transfer.references import build_maps_reference, build_reference

# Largest difference of the logits, relative to the largest logit.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}

LEAST_SPREAD = 1e-4

NEUTRAL = PreprocessingContract("RGB", (0.0,) * 3, (1.0,) * 3, 224, 256, "bilinear")


@dataclass(frozen=True)
class Parity:
    """Ours against the reference, on the same random weights and normalised images.

    differences: "float64 97x97" -> largest difference of the logits relative to the largest.
    parameters: of ours and of theirs.
    spread: smallest difference of the reference's logits between two images, relative to the largest: were they alike,
        agreeing with them would mean nothing.
    """

    reference: str
    differences: Mapping[str, float]
    parameters: tuple[int, int]
    spread: float = 1.0

    @property
    def equal(self) -> bool:
        """Whether every difference is within :data:`LIMITS` and the parameters are as many."""
        limits = {str(dtype).removeprefix("torch."): limit for dtype, limit in LIMITS.items()}
        within = all(value <= limits[case.split()[0]] for case, value in self.differences.items())
        telling = bool(self.differences) and self.spread > LEAST_SPREAD
        return within and telling and self.parameters[0] == self.parameters[1]


def measure_parity(variant: str, library: str, *, seed: int = 0) -> Parity:
    """Compare ``variant`` with its reference in ``library``, in fp32 and fp64, at every size of the source."""
    family = family_of(variant)
    source, row = family.sources[library], family.variants[variant]
    torch.manual_seed(seed)
    reference = build_reference(library, source.names[variant], source.options_for(row))
    randomise(reference, seed)
    if source.maps_only:
        return _measure_maps(variant, library, reference.state_dict(), seed)
    ours = import_into(variant, source, reference.state_dict(), classes=_classes(reference, source))
    differences, spreads = {}, []
    for dtype in (torch.float32, torch.float64):
        reference, ours = reference.to(dtype), ours.to(dtype)
        for size in source.sizes:
            x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed + size)).to(dtype)
            name = f"{str(dtype).removeprefix('torch.')} {size}x{size}"
            differences[name] = logits_difference(ours, reference, x)
            spreads.append(_spread(reference, x))
    counts = tuple(sum(p.numel() for p in network.parameters()) for network in (ours, reference))
    return Parity(f"{library} {source.names[variant]}", differences, (counts[0], counts[1]), min(spreads))


def _measure_maps(variant: str, library: str, tensors: Mapping[str, Tensor], seed: int) -> Parity:
    source, row = family_of(variant).sources[library], family_of(variant).variants[variant]
    ours, reference = trunk_of(variant, source, tensors), maps_reference(variant, library, tensors)
    differences, spreads = {}, []
    for dtype in (torch.float32, torch.float64):
        reference, ours = reference.to(dtype), ours.to(dtype)
        x = torch.randn(2, 3, row.image_size, row.image_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        found = maps_difference(ours, reference, x)
        differences[f"{str(dtype).removeprefix('torch.')} {row.image_size}x{row.image_size}"] = max(found.values())
        with torch.no_grad():
            spreads += [float((value[0] - value[1]).abs().max() / value.abs().max()) for value in reference(x)]
    counts = [sum(p.numel() for p in network.parameters()) for network in (ours, reference)]
    return Parity(f"{library} {source.names[variant]}", differences, (counts[0], counts[1]), min(spreads))


def trunk_of(variant: str, source: Source, tensors: Mapping[str, Tensor]) -> Trunk:
    """The trunk of ``variant``, returning every map, with a foreign checkpoint's tensors, in eval mode."""
    row = family_of(variant).variants[variant]
    names = list(dict.fromkeys(name for name, *_ in row.maps))
    trunk = make_trunk(plain(variant), out_features=names)
    report = load_weights(trunk, apply_key_rules(tensors, source.rules_for(row)))
    report.require_complete("the checkpoint", f"Check the variant; {variant} takes {source.names[variant]}")
    return trunk.eval()


def maps_reference(variant: str, library: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The library's own network of the maps of ``variant``, with the whole network's ``tensors``."""
    source, row = family_of(variant).sources[library], family_of(variant).variants[variant]
    options = {**source.options_for(row), "out_indices": row.indices}
    return build_maps_reference(library, source.names[variant], tensors, options)


@torch.no_grad()
def maps_difference(ours: Trunk, reference: nn.Module, x: Tensor) -> dict[str, float]:
    """Per map: largest difference for the normalised images ``x``, relative to the map's largest value."""
    row = family_of(ours.architecture.variant).variants[ours.architecture.variant]
    maps = ours(x)
    theirs = dict(zip((name for name, *_ in row.maps), reference(x), strict=True))
    return {name: _relative(maps[name], theirs[name]) for name in theirs}


def _relative(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    found = float((ours - theirs).abs().max() / theirs.abs().max())
    # Of a map that is not finite or zero everywhere nothing can be said; NaN would pass through max().
    return found if isfinite(found) else float("inf")


def import_into(variant: str, source: Source, tensors: Mapping[str, Tensor], *, classes: int) -> ClsNet:
    """``variant`` as a classifier with a foreign checkpoint's tensors, in eval mode; a misfit is a ``ValueError``."""
    family = family_of(variant)
    mapped = to_our_keys(apply_key_rules(tensors, source.rules_for(family.variants[variant])))
    auxiliary = any(name.startswith("head.auxiliary.") for name in mapped)
    net = make_classifier(plain(variant), classes, NEUTRAL, auxiliary=auxiliary)
    report = load_weights(net, mapped)
    report.require_complete("the checkpoint", f"Check the variant; {variant} takes {source.names[variant]}")
    return net.eval()


def to_our_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ClsNet's keys: what belongs to no head belongs to the backbone."""
    return {name if name.startswith("head.") else f"backbone.{name}": tensor for name, tensor in tensors.items()}


@torch.no_grad()
def logits_difference(ours: ClsNet, reference: nn.Module, x: Tensor) -> float:
    """Largest difference of the logits for the normalised images ``x``, relative to the largest logit."""
    theirs = reference(x)
    return float((ours(x, normalized=True) - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def _spread(reference: nn.Module, x: Tensor) -> float:
    logits = reference(x)
    return float((logits[0] - logits[1]).abs().max() / logits.abs().max())


@torch.no_grad()
def randomise(network: nn.Module, seed: int) -> None:
    """Give every layer weights and statistics as unlike their initial ones as after training.

    Initial ones hide mistakes: a norm of weight 1, bias 0, mean 0 and variance 1 might as well not be there; biases and
    layer scales near zero hide what stands before them; and several libraries start depthwise kernels so small that the
    logits hardly depend on the image. Kernels are drawn so that layers keep their input's scale (He et al. 2015).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
            module.weight.normal_(0, (gain / module.weight[0].numel()) ** 0.5, generator=generator)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_mean" or (name == "bias" and tensor.dim() == 1):
                tensor.normal_(0, 0.1, generator=generator)
            elif name == "running_var" or (name == "weight" and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name in ("layer_scale", "gamma"):
                tensor.uniform_(0.5, 1.0, generator=generator)
            elif tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) < 1e-4:
                # Class tokens, biases of attention and the like that begin at zero.
                tensor.normal_(0, 0.1, generator=generator)


def _classes(reference: nn.Module, source: Source) -> int:
    return int(getattr(reference, "num_classes", 1000) or 1000)
