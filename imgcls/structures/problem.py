"""What went wrong, in one line: a mistake in the configuration in four parts, another library's error in its first."""

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


def first_line(error: BaseException) -> str:
    """What ``error`` says before it goes on; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
