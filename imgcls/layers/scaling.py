"""Rounding of scaled widths, as the MobileNet, MnasNet and EfficientNet releases do it."""

from __future__ import annotations


def divisible(value: float, divisor: int = 8, lowest: int | None = None) -> int:
    """The multiple of ``divisor`` nearest to ``value`` (halves up), but never below 90 % of it, nor below ``lowest``.

    The rule of the MobileNetV2 authors' release, which the papers leave unsaid. ``lowest`` None is ``divisor``.
    """
    nearest = int(value + divisor / 2) // divisor * divisor
    rounded = max(divisor if lowest is None else lowest, nearest)
    return rounded + divisor if rounded < 0.9 * value else rounded
