"""A mistake in the configuration, told in four parts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What is wrong, the value, what is allowed and which key to change; ``str()`` gives one line."""

    what: str
    value: object
    allowed: str
    key: str

    def __str__(self) -> str:
        return f"{self.what}: got {self.value!r}; allowed: {self.allowed}; change {self.key}"

    def error(self) -> ValueError:
        """The problem as the exception to raise."""
        return ValueError(str(self))
