"""The server's record of each request out of its log, for releases that write no file of them: `--log-requests` at
level 2 gives a line `Receive:` with the prompt and a line `Finish:` with the answer and the counts. In goes a server.log,
out come the same frames as of `serverrecords`, with a column `answer`, by which requests are told apart; what the log does
not have is NaN."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from lab.read.serverrecords import NAN, ServerRecord, by_load

_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_LINE = re.compile(
    r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?)[^\]]*\] (Receive|Finish): obj=GenerateReqInput\(",
    re.ASCII,
)
_PROMPT = re.compile(rf"text=({_STRING}|None), input_ids=(\[[\d, ]*\]|None), ", re.DOTALL)
_RID = re.compile(rf"rid=({_STRING}), ")
_ANSWER = re.compile(rf"out=\{{'text': ({_STRING}), 'meta_info': \{{'id': ", re.DOTALL)
_COUNTS = re.compile(
    r"'meta_info': \{'id': '(?P<id>[^']*)', .*'prompt_tokens': (?P<prompt>\d+), .*'completion_tokens': (?P<completion>\d+), "
    r"'cached_tokens': (?P<cached>\d+), .*'e2e_latency': (?P<e2e>[\d.e-]+)"
)
OWN = "HEALTH_CHECK"  # the server's own requests are named so


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of some requests, as the server's counters count them."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(frozen=True, kw_only=True)
class Echo:
    """What the log says of the requests: a frame for each load, by its name; the sums over the requests that were set
    `apart` from a load; and the lines that could not be read."""

    frames: dict[str, pd.DataFrame]
    apart: dict[str, Tokens]
    unread: list[str]


def read_echo(log: Path, windows: Mapping[str, tuple[float, float]], *, extra: Mapping[str, int]) -> Echo:
    """Read a server.log; `windows` as in `serverrecords.read_export`.

    The first `extra` requests of a load are no part of it: its client sent them to warm up, and waited for their end.
    """
    answers: dict[str, str] = {}
    apart: dict[str, Tokens] = {}
    left = dict(extra)

    def of_loads() -> Iterator[ServerRecord | str]:
        for record in _records(log, answers):
            if isinstance(record, ServerRecord):
                at = record.request_received_ts
                name = next((n for n, (start, end) in windows.items() if start <= at <= end), "")
                if left.get(name, 0):
                    left[name] -= 1
                    apart[name] = _plus(apart.get(name, Tokens()), record)
                    continue
            yield record

    frames, unread = by_load(of_loads(), windows)
    for frame in frames.values():
        frame["answer"] = frame["rid"].map(answers)
        frame["retractions"] = NAN
    return Echo(frames=frames, apart=apart, unread=unread)


def _plus(sums: Tokens, record: ServerRecord) -> Tokens:
    return Tokens(
        prompt=sums.prompt + record.prompt_tokens,
        cached=sums.cached + record.cached_tokens,
        generated=sums.generated + record.completion_tokens,
    )


def _records(log: Path, answers: dict[str, str]) -> Iterator[ServerRecord | str]:
    """A record for each request that was finished, or what is wrong with a line; fills `answers` by request id."""
    received: dict[str, tuple[float, str]] = {}
    with log.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            head = _LINE.match(line)
            if head is None:
                continue
            try:
                if head[2] == "Receive":
                    rid, prompt = _received(line[head.end() :])
                    received[rid] = _seconds(head[1]), prompt
                else:
                    record, answer = _finished(line[head.end() :], received)
                    if not record.id.startswith(OWN):
                        answers[record.id] = answer
                        yield record
            except ValueError as error:
                yield f"{log.name} line {number}: {error}"


def _received(said: str) -> tuple[str, str]:
    """A request's id and its prompt, as the export would have it."""
    prompt = _PROMPT.match(said)
    rid = _RID.search(said, prompt.end()) if prompt else None
    if prompt is None or rid is None:
        raise ValueError("a request without a prompt or an id, or one of several prompts")
    text, ids = (ast.literal_eval(part) for part in prompt.groups())
    return str(ast.literal_eval(rid[1])), json.dumps({"text": text, "input_ids": ids})


def _finished(said: str, received: dict[str, tuple[float, str]]) -> tuple[ServerRecord, str]:
    """The record of a finished request and its answer; the prompt may quote anything, so the counts are searched from the end."""
    tail = said[max(0, said.rfind("'meta_info': {'id': '")) :]
    counts = _COUNTS.match(tail)
    answers = list(_ANSWER.finditer(said))
    if counts is None or not answers:
        raise ValueError("a finished request without its counts")
    if counts["id"] not in received:
        raise ValueError(f"request {counts['id']} is finished and was never received")
    at, prompt = received.pop(counts["id"])
    record = ServerRecord(
        id=counts["id"],
        request_received_ts=at,
        prompt_tokens=int(counts["prompt"]),
        completion_tokens=int(counts["completion"]),
        cached_tokens=int(counts["cached"]),
        e2e_latency=float(counts["e2e"]),
        request_parameters=prompt,
    )
    return record, str(ast.literal_eval(answers[-1][1]))


def _seconds(stamp: str) -> float:
    """A time of the log as Unix time; the server's clock is UTC."""
    return datetime.fromisoformat(stamp).replace(tzinfo=UTC).timestamp()
