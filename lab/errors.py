"""The one exception that is meant for the user."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LabError(Exception):
    """Something the user can fix: what is wrong, why, and what to type next.

    `tasks.py` prints it without a traceback and exits with 1. Every other exception is a bug of the
    lab and keeps its traceback.
    """

    def __init__(self, problem: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.problem]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    @property
    def brief(self) -> str:
        """What and why in one line, where what to type would be out of place."""
        return f"{self.problem} ({self.why})" if self.why else self.problem


def unknown_name(kind: str, name: str, known: Iterable[str]) -> LabError:
    """The error for a name that does not exist: it lists the right ones and the closest."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return LabError(
        f"unknown {kind} {name!r}",
        why=f"the lab knows: {', '.join(names) or 'none'}",
        fix=f"{hint}use one of these names",
    )
