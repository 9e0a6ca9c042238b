"""Reading a log file while a program still writes it: in goes a path, out come its last lines, or the lines
that are new since the last look. The program writes the file itself, so a slow reader never holds it up."""

from __future__ import annotations

import re
from pathlib import Path

LAST_LINES = 20
_TAIL_BYTES = 65_536
_LINE_CHARS = 500
_LINE_END = re.compile(r"\r\n|\n|\r")


def last_lines(path: Path, *, count: int = LAST_LINES) -> tuple[str, ...]:
    """The last `count` non-empty lines, oldest first; a last line without its newline counts too.

    A carriage return ends a line (progress bars), lines are cut after 500 characters, bytes that are not
    UTF-8 are replaced. A missing file has no lines.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ()
    lines = [line.rstrip() for line in _LINE_END.split(text)]
    return tuple(line[:_LINE_CHARS] for line in lines if line)[-count:]


def last_line(path: Path) -> str:
    """The last non-empty line, or an empty string."""
    return "".join(last_lines(path, count=1))


class LogReader:
    """Follows one log: `new_lines` gives what was completed since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_lines(self) -> tuple[str, ...]:
        """Complete lines, without their newline; a line still being written stays for the next call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return tuple(line.decode("utf-8", errors="replace") for line in data[:end].split(b"\n")[:-1])
