"""What a check of the machine comes to: one row of the table that `invoke doctor` prints; and the small readers of text files
that the checks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: what was checked, its state, why it matters, what to type. `blocks` stops every experiment."""

    check: str
    good: bool
    state: str
    matters: str
    fix: str = ""
    blocks: bool = False


def finding(
    check: str, *, good: bool, state: str, matters: str, fix: str = "", blocks: bool = False
) -> Finding:
    """A row that says what to type only where something is to be done."""
    return Finding(
        check=check, good=good, state=state, matters=matters, fix="" if good else fix, blocks=blocks
    )


def text_of(path: Path) -> str | None:
    """The file's text; None when it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def value_of(path: Path, key: str) -> str | None:
    """What stands behind `key:` in a file of such lines; None where it does not stand there."""
    for line in (text_of(path) or "").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None
