"""Read a JSONL file that another program wrote: bytes go in; out come one dict per line that holds a JSON
object and one `Problem` per line that does not. Nothing is dropped silently, and a broken line does not hide
the lines after it: a benchmark that was killed leaves its last line cut, and the rest is good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from lab.errors import LabError

Row: TypeAlias = dict[str, object]

SHOWN_CHARACTERS = 200


class Problem(NamedTuple):
    """One line that is not a JSON object."""

    line: int
    """Number of the line, from 1; 0 speaks of the whole file."""
    text: str
    """The line as far as it can be shown: its first 200 characters, undecodable bytes as `\\xNN`."""
    reason: str


def read(path: Path) -> tuple[list[Row], list[Problem]]:
    """All rows of the file in order, and all its problems. Raises LabError when the file cannot be opened.

    Bare `NaN`, `Infinity` and `-Infinity` are read as floats: bench_serving writes an unlimited request rate
    as `Infinity`. An empty file is one problem, on line 0.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for item in scan(path):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            rows.append(item)
    return rows, problems


def scan(path: Path) -> Iterator[Row | Problem]:
    """As `read`, one line at a time and in the file's order, for files that should not be held in memory."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _row(number, raw)
    except OSError as error:
        raise LabError(
            f"cannot read {path}",
            why=error.strerror or str(error),
            fix="check that the run is complete and that you may read it",
        ) from error
    if number == 0:
        yield Problem(0, "", "the file is empty")


def _row(number: int, raw: bytes) -> Row | Problem:
    body = raw.rstrip(b"\r\n")
    if not body.strip():
        return Problem(number, "", "the line is empty")
    try:
        value = json.loads(body.decode())
    except UnicodeDecodeError as error:
        return _problem(number, body, f"byte {error.start + 1} of the line is not UTF-8")
    except json.JSONDecodeError as error:
        cut = "" if raw.endswith(b"\n") else "the file ends inside this line: "
        return _problem(number, body, f"{cut}not JSON at character {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:
        # An integer with more than 4,300 digits, or nesting deeper than Python's stack: JSON, but not ours.
        return _problem(number, body, f"JSON that cannot be read: {error}")
    if not isinstance(value, dict):
        return _problem(number, body, f"a JSON {type(value).__name__}, not an object")
    return value


def _problem(number: int, body: bytes, reason: str) -> Problem:
    # Four bytes a character is the most UTF-8 takes, so this decodes only what is shown.
    shown = body[: 4 * SHOWN_CHARACTERS].decode(errors="backslashreplace")[:SHOWN_CHARACTERS]
    return Problem(number, shown, reason)
