"""The 1,000 classes of ImageNet's challenge (Russakovsky et al. 2015), as the names of their folders."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def imagenet_classes() -> tuple[str, ...]:
    """WordNet ids ("n01440764", ...) in the usual order of the 1,000 outputs: sorted, as class folders are."""
    text = (resources.files("imgcls.data") / "imagenet_classes.txt").read_text(encoding="ascii")
    return tuple(text.split())
