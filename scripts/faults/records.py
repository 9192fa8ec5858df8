"""What is written down of a case."""

from __future__ import annotations

from typing import Any

from faults.jobs import Variant
from faults.processes import Trainer

LONGEST = 300  # characters of a cause


def record(
    kind: str, variant: Variant, point: str, trainer: Trainer, problems: list[str], **more: Any
) -> dict[str, Any]:
    """One case: where it was run, what was done to it, how it ended and what was wrong with that.

    more: over what is said by default, the exit code, the last line on stderr and the seconds that it took.
    """
    code = trainer.code or 0
    found = {
        **{"kind": kind, **variant.described, "point": point},
        **{"exit_code": code if code >= 0 else 128 - code, "cause": trainer.last_line(), "seconds": trainer.seconds},
        **more,
        "problems": problems,
    }
    return {**found, "cause": found["cause"][:LONGEST], "seconds": round(found["seconds"], 2)}
