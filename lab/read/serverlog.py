"""Read SGLang's server log: lines go in, as a file yields them; out come one record per Prefill or Decode
line, per retraction and per fact (pool sizes, cache, ready, crash), the number of other lines, and every line
that looks like one of these but could not be read. Each line is in exactly one of the five. Spellings:
0.4.6.post5 (`Prefill batch.`) and those of 0.5.4 to 0.5.23 (`Prefill batch,`, `Prefill batch [12],`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from lab.errors import LabError
from lab.read.logmessage import FACTS, FactValues, UnreadError, read_fields

SHOWN_CHARACTERS = 300


class Batch(NamedTuple):
    """One Prefill or Decode line. None: the line does not hold this field.

    The server writes every prefill batch but only every `--decode-log-interval`-th decode step, and /health
    checks show up as prefills of one token.
    """

    line: int
    """From 1."""
    time: str
    """The server's local time as printed, with milliseconds under SGLANG_LOG_MS=1."""
    rank: str
    """As printed: "TP0", "DP1 TP0", or "" on a single rank."""
    iteration: int | None
    """Forward pass, under SGLANG_LOG_FORWARD_ITERS=1."""
    kind: str
    """prefill | decode"""
    new_seqs: int | None
    new_tokens: int | None
    """Prompt tokens computed in this batch. A retracted request is computed again and counts again."""
    cached_tokens: int | None
    """Prompt tokens found in the cache; as for `new_tokens`, a retracted request counts again."""
    pending_tokens: int | None
    """Prompt tokens that still wait to be computed."""
    running_reqs: int | None
    queued_reqs: int | None
    used_tokens: int | None
    """KV slots in use (`#token`)."""
    token_usage_share: float | None
    """0 to 1, two decimals."""
    graph: bool | None
    graph_label: str
    """As printed: "cuda graph", "cpu graph", or ""."""
    input_throughput_tok_s: float | None
    gen_throughput_tok_s: float | None
    accept_len_tokens: float | None
    extra: str
    """Fields the lab does not know, as printed: "accept rate: 0.53, #inflight-req: 1"."""


class Retraction(NamedTuple):
    """One retraction: running requests were thrown out of the pool and queued again.

    Every tensor-parallel rank prints its own line, so count the lines of one rank.
    """

    line: int
    time: str
    rank: str
    kind: str
    """pool_full | testing (SGLANG_TEST_RETRACT; 0.4.6.post5 prints the pool_full text for both)"""
    retracted_reqs: int
    gained_tokens: int | None
    ratio_before: float | None
    """The scheduler's new_token_ratio: the share of each request's output that it reserves room for."""
    ratio_after: float | None
    extra: str


class Fact(NamedTuple):
    """One line that says something about the server as a whole; names and values in `lab.read.logmessage`."""

    line: int
    time: str
    rank: str
    name: str
    values: FactValues


class Unreadable(NamedTuple):
    """A line that looks like one of the above and could not be read in full."""

    line: int
    text: str
    reason: str


BATCH_COLUMNS = Batch._fields
RETRACTION_COLUMNS = Retraction._fields


@dataclass(frozen=True, kw_only=True)
class LogRecords:
    """What `parse` found. `lines` is the sum of the five kinds."""

    lines: int
    batches: tuple[Batch, ...]
    retractions: tuple[Retraction, ...]
    facts: tuple[Fact, ...]
    unreadable: tuple[Unreadable, ...]
    other: int

    def first(self, name: str) -> Fact | None:
        """The first fact of this name, or None."""
        return next((fact for fact in self.facts if fact.name == name), None)

    def crashes(self) -> tuple[Fact, ...]:
        """The crash lines before the server began to stop.

        On a normal stop SGLang 0.5.21 kills its scheduler and then reports it as crashed, exit code -9.
        """
        stop = self.first("stopping")
        return tuple(f for f in self.facts if f.name == "crash" and (stop is None or f.line < stop.line))


_STAMP = r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?)((?: [A-Z_]+\d+)*)\] "
_PREFIX = re.compile(_STAMP, re.ASCII)
_BATCH = re.compile(r"(Prefill|Decode) batch(?: \[(\d{1,18})\])?[.,] ", re.ASCII)
_RETRACTIONS = {
    "KV cache pool is full. Retract requests. ": "pool_full",
    "Decode out of memory happened. ": "pool_full",
    "Testing retraction. ": "testing",
}
_STARTS = ("Prefill batch", "Decode batch", *_RETRACTIONS, *(start for start, _, _ in FACTS))
# A record inside another line: two processes wrote at once. Only a request's own text may quote one.
_BURIED = re.compile(_STAMP + "(?:" + "|".join(re.escape(start) for start in _STARTS) + ")", re.ASCII)
_TAIL = re.compile(r"#(?:new-seq|new-token|cached-token|running-req|queue-req|token|retracted_reqs): -?\d")
_REQUEST_ECHOES = ("Receive", "Finish", "{")

_NEEDED = {
    "Prefill": ("#new-seq", "#new-token", "#cached-token", "#running-req", "#queue-req"),
    "Decode": ("#running-req", "gen throughput (token/s)", "#queue-req"),
}
_Record: TypeAlias = Batch | Retraction | Fact


def read(path: Path) -> LogRecords:
    """`parse` over the file; bytes that are not UTF-8 become `\\xNN`. LabError when it cannot be opened."""
    try:
        # newline="\n": a progress bar's carriage returns stay inside their line.
        with path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            return parse(file)
    except OSError as error:
        raise LabError(f"cannot read {path}", why=error.strerror or str(error)) from error


def parse(lines: Iterable[str]) -> LogRecords:
    """Sort every line into batches, retractions, facts, unreadable and other.

    Lines must keep their line ends (iterate a file, or `splitlines(keepends=True)`): a last line without one
    was cut while it was written, and its last number cannot be trusted. ValueError when an earlier line has
    none.
    """
    found: dict[type[_Record], list[_Record]] = {Batch: [], Retraction: [], Fact: []}
    unreadable: list[Unreadable] = []
    other = number = 0
    whole = True
    for number, raw in enumerate(lines, start=1):
        if not whole:
            raise ValueError(f"line {number - 1} has no line end: pass lines as the file holds them")
        whole = raw.endswith("\n")
        try:
            record = _record(number, raw.rstrip("\r\n"), whole)
        except UnreadError as problem:
            unreadable.append(Unreadable(number, _shown(raw), str(problem)))
            continue
        if record is None:
            other += 1
        else:
            found[type(record)].append(record)
    return LogRecords(
        lines=number,
        batches=tuple(r for r in found[Batch] if isinstance(r, Batch)),
        retractions=tuple(r for r in found[Retraction] if isinstance(r, Retraction)),
        facts=tuple(r for r in found[Fact] if isinstance(r, Fact)),
        unreadable=tuple(unreadable),
        other=other,
    )


def _record(number: int, body: str, whole: bool) -> _Record | None:
    """The record in this line, None for another line; raises UnreadError."""
    prefix = _PREFIX.match(body)
    if prefix is None:
        if not whole and body.startswith("["):
            raise UnreadError("the log ends inside this line, before its message")
        _check_nothing_buried(body)
        return None
    message = body[prefix.end() :]
    reader = _reader(message)
    if reader is None:
        if not whole and not message:
            raise UnreadError("the log ends inside this line, before its message")
        if message and any(start.startswith(message) for start in _STARTS):
            raise UnreadError("the message is cut")
        if not message.startswith(_REQUEST_ECHOES):
            _check_nothing_buried(body)
        return None
    if not whole:
        raise UnreadError("the log ends inside this line: it has no line end")
    time, ranks = prefix.groups()
    return reader(number, time, ranks.lstrip(), message)


_Reader: TypeAlias = Callable[[int, str, str, str], _Record]


def _reader(message: str) -> _Reader | None:
    if message.startswith(("Prefill batch", "Decode batch")):
        return _batch
    if message.startswith(tuple(_RETRACTIONS)):
        return _retraction
    if message.startswith(_FACT_STARTS):
        return _fact
    return None


_FACT_STARTS = tuple(start for start, _, _ in FACTS)


def _check_nothing_buried(body: str) -> None:
    if _BURIED.search(body):
        raise UnreadError("other text stands before the record's timestamp")
    if _TAIL.search(body):
        raise UnreadError("fields of a record without its beginning")


def _batch(number: int, time: str, rank: str, message: str) -> Batch:
    head = _BATCH.match(message)
    if head is None:
        raise UnreadError("the message is cut, or its beginning is spelled in an unknown way")
    kind, iteration = head.groups()
    fields = read_fields(message[head.end() :])
    integers, decimals, graph, label, ratio, extra = fields
    for key in _NEEDED[kind]:
        if key not in integers and key not in decimals:
            raise UnreadError(f"no {key!r}")
    if ratio is not None:
        raise UnreadError("a retraction's field in a batch line")
    return Batch(
        number,
        time,
        rank,
        int(iteration) if iteration else None,
        kind.lower(),
        integers.get("#new-seq"),
        integers.get("#new-token"),
        integers.get("#cached-token"),
        integers.get("#pending-token"),
        integers.get("#running-req"),
        integers.get("#queue-req"),
        integers.get("#token"),
        decimals.get("token usage"),
        graph,
        label,
        decimals.get("input throughput (token/s)"),
        decimals.get("gen throughput (token/s)"),
        decimals.get("accept len"),
        extra,
    )


def _retraction(number: int, time: str, rank: str, message: str) -> Retraction:
    start, kind = next((start, kind) for start, kind in _RETRACTIONS.items() if message.startswith(start))
    fields = read_fields(message[len(start) :])
    if "#retracted_reqs" not in fields.integers:
        raise UnreadError("no '#retracted_reqs'")
    if kind == "pool_full" and fields.ratio is None:
        raise UnreadError("no '#new_token_ratio'")
    before, after = fields.ratio or (None, None)
    gained = fields.integers.get("#new_tokens_gained")
    return Retraction(
        number, time, rank, kind, fields.integers["#retracted_reqs"], gained, before, after, fields.extra
    )


def _fact(number: int, time: str, rank: str, message: str) -> Fact:
    name, read_values = next((name, reader) for start, name, reader in FACTS if message.startswith(start))
    return Fact(number, time, rank, name, read_values(message))


def _shown(raw: str) -> str:
    # The server's arguments may hold its API key, and nothing secret is written into a run's tables.
    hidden = raw.find("server_args=")
    if hidden >= 0:
        return raw[: hidden + len("server_args=")] + "..."
    return raw.rstrip("\r\n")[:SHOWN_CHARACTERS]
