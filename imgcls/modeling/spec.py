"""Families of networks as data: a family is a table of variants and a function that builds one of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from imgcls.structures import KeyRule, Problem


@dataclass(frozen=True)
class Source:
    """Another library whose weights a family takes, and which is the reference that it must equal.

    names: our variant -> the network's name there.
    rules: from its tensors' names to ours, or a function of the variant's row that returns them.
    options: keyword arguments that build the network there as ours is (beside "without weights"), or a function of the
        variant's row that returns them.
    sizes: pixels, sides of the square images on which both are compared: a usual one and an odd one.
    maps_only: the library's head has no counterpart here: what stands behind the last map is left, and parity is on the
        maps, which the row lists as ``maps`` with their numbers there (``indices``).
    """

    names: Mapping[str, str]
    rules: Sequence[KeyRule] | Callable[[Any], Sequence[KeyRule]]
    options: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    sizes: tuple[int, ...] = (64, 97)
    maps_only: bool = False

    def rules_for(self, row: Any) -> Sequence[KeyRule]:
        """The key rules of the variant whose row is ``row``."""
        return self.rules(row) if callable(self.rules) else self.rules

    def options_for(self, row: Any) -> Mapping[str, Any]:
        """How the library builds the variant whose row is ``row``."""
        return self.options(row) if callable(self.options) else self.options


@dataclass(frozen=True)
class Family:
    """One network family.

    name: as in ``build_imgcls_<name>_backbone``.
    variants: name of the variant -> row of the family's table (a frozen dataclass). A row whose ``own_norm`` is "LN"
        or "none" has norms that MODEL.BACKBONE.NORM cannot choose.
    build: ``build(row, in_channels=, norm=, out_features=, stem=, **options)`` -> Trunk. ``norm``: a kind of ``NORMS``.
    head: ``head(row, shapes, num_classes, dropout=, norm=)`` -> the paper's classifier over ``shapes``, the trunk's
        output_shape(); dropout None is the paper's own. None: global average pooling and one linear layer.
    other_heads: further heads of the same signature, by the MODEL.HEAD.NAME that chooses them ("dense").
    options: further keyword arguments that ``build`` takes: names in ``build.OPTIONS`` ("drop_path", ...).
    stems: values of MODEL.BACKBONE.STEM that the family knows.
    auxiliary: maps that the classifier's auxiliary heads read in training.
    dilatable: whether the last stages can keep their resolution (MODEL.BACKBONE.OUTPUT_STRIDE).
    detector_only: patterns (fnmatch) of tensors that a detector's body has and a classifier's trunk has not.
    classifier_only: patterns of a classifier's trunk's tensors that no detector has; they do not travel.
    pyramids: builders of the pyramid over it: the plain one, and the one with RetinaNet's P6 and P7.
    sources: name of a library -> where its weights go.
    without_gradient: patterns of parameters (ClsNet's names) that get none by mathematics -> the reason.
    """

    name: str
    variants: Mapping[str, Any]
    build: Callable[..., Any]
    head: Callable[..., Any] | None = None
    other_heads: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    stems: tuple[str, ...] = ("standard",)
    auxiliary: tuple[str, ...] = ()
    dilatable: bool = False
    detector_only: tuple[str, ...] = ()
    classifier_only: tuple[str, ...] = ()
    pyramids: tuple[str, str] = ("build_imgcls_fpn_backbone", "build_imgcls_retinanet_fpn_backbone")
    sources: Mapping[str, Source] = field(default_factory=dict)
    without_gradient: Mapping[str, str] = field(default_factory=dict)

    @property
    def builder(self) -> str:
        """The name of the family's builder in detectron2's BACKBONE_REGISTRY."""
        return f"build_imgcls_{self.name}_backbone"

    def own_norm(self, variant: str) -> str:
        """ "LN" or "none" for a variant whose norms cannot be chosen, otherwise ""."""
        return str(getattr(self.variants[variant], "own_norm", ""))

    def is_classifier_only(self, key: str) -> bool:
        """Whether ``key`` is a tensor of the trunk that only a classifier has: it does not travel."""
        return any(fnmatch(key, pattern) for pattern in self.classifier_only)


_FAMILY_OF: dict[str, Family] = {}
# "prefix:" -> the family of a name that begins so; for libraries whose networks nobody lists here.
_OPEN_FAMILIES: dict[str, Callable[[str], Family]] = {}


def register_family(family: Family) -> Family:
    """Enter ``family`` and its variants; a variant that another family has is a ``ValueError``."""
    for variant in family.variants:
        owner = _FAMILY_OF.get(variant)
        if owner is not None:
            raise ValueError(f"variant {variant!r} of {family.name} is taken by {owner.name}; rename one of them")
    _FAMILY_OF.update(dict.fromkeys(family.variants, family))
    return family


def register_open_family(prefix: str, family_of_name: Callable[[str], Family]) -> None:
    """Have ``family_of_name(variant)`` asked for every variant that begins with ``prefix`` (e.g. "timm:")."""
    _OPEN_FAMILIES[prefix] = family_of_name


def all_variants() -> tuple[str, ...]:
    """Every registered variant, in the order of registration."""
    return tuple(_FAMILY_OF)


def families() -> tuple[Family, ...]:
    """Every registered family, in the order of registration."""
    return tuple({family.name: family for family in _FAMILY_OF.values()}.values())


def variant_problem(variant: str) -> Problem | None:
    """None for a registered variant, otherwise the problem, with the nearest names."""
    if variant in _FAMILY_OF:
        return None
    for prefix, family_of_name in _OPEN_FAMILIES.items():
        if variant.startswith(prefix):
            try:
                family_of_name(variant)
            except ValueError as error:
                return Problem(str(error), variant, f"a name behind {prefix}", "MODEL.BACKBONE.VARIANT (--variant)")
            return None
    near = difflib.get_close_matches(variant, _FAMILY_OF, n=3, cutoff=0.4)
    known = f"did you mean {' or '.join(near)}? All: " if near else "one of "
    allowed = known + ", ".join(_FAMILY_OF)
    return Problem("there is no such network", variant, allowed, "MODEL.BACKBONE.VARIANT (--variant)")


def same_network(one: str, other: str) -> bool:
    """Whether two variants are one network under two names ("mobilenet_v2" is "mobilenet_v2_1.0")."""
    mine, theirs = family_of(one), family_of(other)
    return mine.name == theirs.name and mine.variants[one] == theirs.variants[other]


def family_of(variant: str) -> Family:
    """The family that ``variant`` belongs to; an unknown name is a ``ValueError`` that lists the nearest ones."""
    problem = variant_problem(variant)
    if problem is not None:
        raise problem.error()
    if variant in _FAMILY_OF:
        return _FAMILY_OF[variant]
    return next(make(variant) for prefix, make in _OPEN_FAMILIES.items() if variant.startswith(prefix))
