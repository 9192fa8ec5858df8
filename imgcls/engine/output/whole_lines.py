"""A text file that grows by whole lines."""

from __future__ import annotations

import os
from pathlib import Path


class WholeLines:
    """Appends to ``path``; what finds no room leaves the file as it was, and raises ``OSError``.

    Python's own files keep what they could not write in a buffer, half of a line perhaps, and try again with the next
    line and at the end of the process. It stands in for one where that is only written, flushed and closed.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, text: str) -> int:
        """Append ``text``, which is whole lines."""
        data, end = text.encode("utf-8", "backslashreplace"), os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            if os.fstat(self._file).st_size > end:
                os.ftruncate(self._file, end)
            raise
        return len(text)

    def flush(self) -> None:
        """Nothing waits here."""

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class WaitingLines(WholeLines):
    """The same; what found no room is written before the next line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._waiting = ""

    def write(self, text: str) -> int:
        self._waiting += text
        super().write(self._waiting)
        self._waiting = ""
        return len(text)

    def close(self) -> None:
        try:
            if self._waiting:
                self.write("")
        finally:
            super().close()
