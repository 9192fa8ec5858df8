"""Families of networks as data: a family is a table of variants and a function that builds one of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from imgcls.structures import Problem


@dataclass(frozen=True)
class Family:
    """One network family.

    name: as in ``build_imgcls_<name>_backbone``.
    variants: name of the variant -> row of the family's table (a frozen dataclass).
    build: ``build(row, in_channels=, norm=, out_features=, stem=)`` -> Trunk. ``norm`` is a kind from ``NORMS``.
    stems: values of MODEL.BACKBONE.STEM that the family knows.
    detector_only: patterns (fnmatch) of tensors that a detector's body has and a classifier's trunk has not.
    """

    name: str
    variants: Mapping[str, Any]
    build: Callable[..., Any]
    stems: tuple[str, ...] = ("standard",)
    detector_only: tuple[str, ...] = ()

    @property
    def builder(self) -> str:
        """The name of the family's builder in detectron2's BACKBONE_REGISTRY."""
        return f"build_imgcls_{self.name}_backbone"


_FAMILY_OF: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Enter ``family`` and its variants; a variant that another family has is a ``ValueError``."""
    for variant in family.variants:
        owner = _FAMILY_OF.get(variant)
        if owner is not None:
            raise ValueError(f"variant {variant!r} of {family.name} is taken by {owner.name}; rename one of them")
    _FAMILY_OF.update(dict.fromkeys(family.variants, family))
    return family


def all_variants() -> tuple[str, ...]:
    """Every registered variant, in the order of registration."""
    return tuple(_FAMILY_OF)


def variant_problem(variant: str) -> Problem | None:
    """None for a registered variant, otherwise the problem, with the nearest names."""
    if variant in _FAMILY_OF:
        return None
    near = difflib.get_close_matches(variant, _FAMILY_OF, n=3, cutoff=0.4)
    known = f"did you mean {' or '.join(near)}? All: " if near else "one of "
    allowed = known + ", ".join(_FAMILY_OF)
    return Problem("there is no such network", variant, allowed, "MODEL.BACKBONE.VARIANT (--variant)")


def family_of(variant: str) -> Family:
    """The family that ``variant`` belongs to; an unknown name is a ``ValueError`` that lists the nearest ones."""
    problem = variant_problem(variant)
    if problem is not None:
        raise problem.error()
    return _FAMILY_OF[variant]
