"""Rules that turn the names of a foreign checkpoint's tensors into ours: data that a family holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KeyRule:
    """One step of renaming. A family's rules are applied in order, each to what the former have left of the name.

    theirs: regular expression, searched in the whole name (anchor it with ``^`` where it means the beginning).
    ours: what replaces every match, with ``\\1`` and so on for its groups. The result names a tensor of the trunk, or
        of the head when it begins with ``head.``.
    change: what happens to the tensors whose name matched: "" nothing; "drop" it has no counterpart here;
        "to_conv" (O, I) becomes (O, I, 1, 1); "to_linear" (O, I, 1, 1) becomes (O, I).
    part: (k, n): the tensor is the k-th of n that stand one above the other (along the first axis) in ours.
    """

    theirs: str
    ours: str = ""
    change: str = ""
    part: tuple[int, int] | None = None
