"""Words for bash: quoted, with `${NAME}` left to be expanded where NAME is one that the script sets, and long commands
wrapped; and the words with which a script asks a server what the lab itself asks it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable

from lab.dialect import Dialect


def quote(word: str, *, names: Collection[str]) -> str:
    """One word, in which the shell expands only `${NAME}` of these names."""
    parts = re.split(r"\$\{(" + "|".join(names) + r")\}", word)  # text, name, text, name, ..., text
    if len(parts) == 1:
        return shlex.quote(word)
    quoted = (
        f"${{{part}}}" if i % 2 else re.sub(r'([\\"`$])', r"\\\1", part) for i, part in enumerate(parts)
    )
    return f'"{"".join(quoted)}"'


def wrapped(lines: Iterable[Iterable[str]], *, names: Collection[str]) -> str:
    """One command of several lines, each of them some words."""
    return " \\\n  ".join(" ".join(quote(word, names=names) for word in line) for line in lines)


def by_flag(words: Iterable[str], *, also: Collection[str] = ()) -> list[list[str]]:
    """Words in lines: a new one starts at each `--flag`, and at each word of `also`."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") or word in also:
            lines.append([])
        lines[-1].append(word)
    return [line for line in lines if line]


def asked_of_server(dialect: Dialect) -> dict[str, str]:
    """For a script's text: the command that succeeds once the server is `ready`, the paths of `flush` and `metrics`."""
    server = "http://127.0.0.1:$PORT"
    ready = f'curl -sf -o "$TRIAL/health" "{server}{dialect.health}"'
    if dialect.warm_up_pending:  # -c, not -q: grep must read to the end, or curl fails
        counted = f"^sglang:{dialect.requests_total}"
        ready = f'curl -sf "{server}{dialect.metrics}" | grep -c "{counted}" > "$TRIAL/health"'
    return {"ready": ready, "flush": dialect.flush, "metrics": dialect.metrics}
