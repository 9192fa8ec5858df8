"""The preprocessing contract: what a network's input must have gone through. It travels with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PreprocessingContract:
    """Channel order, value range and normalisation that a network was trained with.

    input_format: "RGB" or "BGR", the channel order of ``pixel_mean`` and of the first convolution.
    pixel_mean, pixel_std: per channel, on values in 0..255: the network sees (x - mean) / std.
    size, resize: pixels, side of the centre crop in evaluation and the short side before it (0: no crop).
    interpolation: of that resize.
    """

    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    size: int
    resize: int
    interpolation: str
    max_value: float = 255.0

    @classmethod
    def from_cfg(cls, cfg: Any) -> PreprocessingContract:
        """The contract that a classification config states."""
        return cls(
            input_format=cfg.INPUT.FORMAT,
            pixel_mean=tuple(float(value) for value in cfg.MODEL.PIXEL_MEAN),
            pixel_std=tuple(float(value) for value in cfg.MODEL.PIXEL_STD),
            size=int(cfg.INPUT.TEST_SIZE),
            resize=int(cfg.INPUT.TEST_RESIZE),
            interpolation=cfg.INPUT.INTERPOLATION,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessingContract:
        """Read back what :meth:`to_dict` wrote; a missing or unknown entry is a ``ValueError`` naming it."""
        fields = set(cls.__dataclass_fields__)
        if set(values) != fields:
            raise ValueError(
                f"the preprocessing contract has the entries {sorted(values)}; it needs exactly {sorted(fields)}; "
                "convert the classifier again with convert_to_detection"
            )
        floats = {key: tuple(float(v) for v in values[key]) for key in ("pixel_mean", "pixel_std")}
        return cls(**{**values, **floats})

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, loadable with ``weights_only``."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def differences(self, cfg: Any) -> list[str]:
        """Lines naming each input key of a detector's ``cfg`` that contradicts the contract, with both values."""
        stated = {
            "INPUT.FORMAT": (cfg.INPUT.FORMAT, self.input_format),
            "MODEL.PIXEL_MEAN": (list(cfg.MODEL.PIXEL_MEAN), list(self.pixel_mean)),
            "MODEL.PIXEL_STD": (list(cfg.MODEL.PIXEL_STD), list(self.pixel_std)),
        }
        return [
            f"{key} is {ours!r} in the config, the weights need {theirs!r}"
            for key, (ours, theirs) in stated.items()
            if not _same(ours, theirs)
        ]


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str):
        return ours == theirs
    # Values printed with three decimals count as equal; a wrong channel order or scale does not.
    return len(ours) == len(theirs) and all(
        abs(a - b) <= 1e-3 * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)
    )
