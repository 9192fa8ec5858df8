"""log.txt: whole lines, and no traceback where the disk takes none."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from imgcls.engine.output.whole_lines import WholeLines

logger = logging.getLogger(__name__)


class LogFile(logging.Handler):
    """Appends each record to ``path``, as detectron2's own file has it, but never half of one.

    The first line that cannot be written is a warning; with detectron2's each costs a traceback on the console.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._name, self._failing = WholeLines(path), path.name, False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record) + "\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True  # first, for the warning comes here too
                logger.warning("%s is not written, training goes on: %s", self._name, error)

    def close(self) -> None:
        self._file.close()
        super().close()


def quiet_where_full(handler: logging.Handler) -> None:
    """Have ``handler``, of a console that leads into a file, say nothing of the lines that its disk does not take."""
    tell = handler.handleError

    def handle(record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            tell(record)

    handler.handleError = handle  # type: ignore[method-assign] # of this one, not of its class
