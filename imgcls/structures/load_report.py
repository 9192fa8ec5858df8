"""What became of every tensor when weights were loaded."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors, by outcome.

    loaded: in the file and in the network, same shape, copied.
    missing: in the network, not in the file.
    unexpected: in the file, not in the network.
    wrong_shape: (name, shape in the file, shape in the network).
    new: in the network only, and allowed to be (the head that was reset, a detector's own tensors).
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    new: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Whether every tensor went where it should, and at least one did."""
        return bool(self.loaded) and not (self.missing or self.unexpected or self.wrong_shape)

    @property
    def wanted(self) -> int:
        """How many of the network's tensors should have come from the file."""
        return len(self.loaded) + len(self.missing) + len(self.wrong_shape)

    def summary(self) -> str:
        """One line: k of n, and the names of the first few of each kind that went wrong."""
        parts = [f"{len(self.loaded)} of {self.wanted} tensors loaded"]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {label}: {_few(names)}")
        if self.wrong_shape:
            shapes = [
                f"{name} {list(theirs)} in the file, {list(ours)} here" for name, theirs, ours in self.wrong_shape
            ]
            parts.append(f"{len(shapes)} of another shape: {_few(shapes)}")
        if self.new:
            parts.append(f"{len(self.new)} new: {_few(self.new)}")
        return "; ".join(parts)

    def require_complete(self, source: str, remedy: str) -> LoadReport:
        """Raise ``ValueError`` with the counts, the names and the remedy unless :attr:`complete`."""
        if not self.complete:
            raise ValueError(f"weights from {source} do not fit: {self.summary()}. {remedy}")
        return self


def _few(names: tuple[str, ...] | list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"
