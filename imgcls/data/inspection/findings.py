"""What a look at the data found: one finding is one thing to do, or one thing to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SERIOUS, WARNING, NOTE = "serious", "warning", "note"
SEVERITIES = (SERIOUS, WARNING, NOTE)
# Examples that a finding shows, at most.
SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """severity: "serious" (figures would be wrong, or training ends), "warning" (worth a look) or "note" (to know).

    code: a stable name for scripts. where: "train", "val", "train, val" or "machine".
    count: of what is affected; what: in one line; examples: some of it, one line each; remedy: what to do, naming the
    key or file to change.
    """

    severity: str
    code: str
    where: str
    count: int
    what: str
    examples: tuple[str, ...] = ()
    remedy: str = ""


def first(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines that a finding shows of many."""
    return tuple(line for line, _ in zip(lines, range(SHOWN), strict=False))


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest first; among equals the order in which they were found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
