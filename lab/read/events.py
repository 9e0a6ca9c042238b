"""Read what the in-server probe wrote (`lab/probe`): a folder of JSON-lines files goes in, one per scheduler process; out
come their events by kind, as rows with Unix times, and as frames for the tables. A file that was cut off, that lost
events, or whose clock went back is read as far as it goes, and says so; a newer schema is refused."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import pandas as pd

from lab.errors import LabError, unknown_name
from lab.probe.labprobe.schema import EVENTS, SCHEMA, wanted
from lab.read.jsonl import Problem, Row, scan

PATTERN = "events-*.jsonl"
# Noted by the thread that writes, while the scheduler notes others that are written after them.
WRITERS_OWN = ("memory", "counters")
# Both clocks are read one after the other; between the two the process may be put aside for so long.
STEP_MS = 100.0


@dataclass(frozen=True, kw_only=True)
class ProbeFile:
    """What one scheduler process wrote, in the file's order."""

    path: Path
    rank: str
    """As in the file's name: "pp0-tp1", or "unknown"."""
    pid: int
    sglang: str
    level: str
    """batches | requests | cache; a kind of event above it is not in the file."""
    header: Row
    events: Mapping[str, Sequence[Row]]
    """By kind, each row with at least `t_ns`."""
    problems: tuple[Problem, ...]
    """Lines that could not be read. That of a killed server's file is often its last."""
    backwards: int
    """Events of the scheduler's earlier than its one before."""

    @property
    def complete(self) -> bool:
        """Whether the process wrote its last counters: false after SIGKILL, which is how SGLang ends its schedulers."""
        counters = self.events.get("counters", ())
        return bool(counters) and bool(counters[-1].get("end"))

    @property
    def dropped(self) -> int:
        """Events that the process had no room for, as far as it could still say."""
        return self._counter("dropped")

    @property
    def errors(self) -> int:
        """Hook bodies that raised, as far as the process could still say."""
        return self._counter("errors")

    @property
    def not_hooked(self) -> tuple[str, ...]:
        """Why hook points are not in use, a sentence each."""
        rows = self.events.get("hook", ())
        return tuple(f"{row.get('target')}: {row.get('status')}, {row.get('detail')}" for row in rows)

    @cached_property
    def _anchors(self) -> tuple[list[int], list[int]]:
        """Monotonic times and what the Unix clock showed then, in nanoseconds."""
        pairs = [
            (row.get("t_ns"), row.get("unix_ns")) for row in (self.header, *self.events.get("counters", ()))
        ]
        good = sorted((at, unix) for at, unix in pairs if isinstance(at, int) and isinstance(unix, int))
        return [at for at, _ in good], [unix for _, unix in good]

    def unix_s(self, t_ns: int) -> float:
        """Unix time of a monotonic one. Where the Unix clock was set, it is what the clock showed at that moment."""
        times, unix = self._anchors
        at = max(0, bisect_right(times, t_ns) - 1)
        return (unix[at] + t_ns - times[at]) / 1e9

    @property
    def clock_step_ms(self) -> float:
        """By how much the Unix clock was set while the process ran; 0 below `STEP_MS`. Forward is positive."""
        times, unix = self._anchors
        offsets = [wall - at for at, wall in zip(times, unix, strict=True)]
        moves = [(after - before) / 1e6 for before, after in pairwise(offsets)]
        largest = max(moves, key=abs, default=0.0)
        return largest if abs(largest) > STEP_MS else 0.0

    def _counter(self, name: str) -> int:
        counters = self.events.get("counters", ())
        value = counters[-1].get(name) if counters else 0
        return value if isinstance(value, int) else 0


def read_events(folder: Path) -> tuple[tuple[ProbeFile, ...], tuple[str, ...]]:
    """The files of a folder by rank, and a sentence for each that holds nothing. No folder: nothing, no error.

    Raises LabError for a newer schema than this lab's, and for a file that cannot be opened.
    """
    files: list[ProbeFile] = []
    empty: list[str] = []
    for path in sorted(folder.glob(PATTERN)):
        read = read_file(path)
        if isinstance(read, ProbeFile):
            files.append(read)
        else:
            empty.append(read)
    return tuple(sorted(files, key=lambda file: (file.rank, file.pid))), tuple(empty)


def read_file(path: Path) -> ProbeFile | str:
    """One file, or why there is nothing in it: the process was killed before its first line was written."""
    rows = scan(path)
    header = next(rows)
    if isinstance(header, Problem) or header.get("e") != "header":
        reason = header.reason if isinstance(header, Problem) else "its first line is not a header"
        return f"{path.name}: {reason}"
    _check_schema(header, path)
    events: dict[str, list[Row]] = {kind: [] for kind in EVENTS}
    problems: list[Problem] = []
    last, backwards = 0, 0
    for number, row in enumerate(rows, start=2):
        reason = row.reason if isinstance(row, Problem) else _flaw(row)
        if isinstance(row, Problem) or reason:
            problems.append(row if isinstance(row, Problem) else Problem(number, str(row)[:200], reason))
            continue
        if row["e"] not in WRITERS_OWN:
            moment = _whole(row.get("t_ns"))
            backwards += moment < last
            last = moment
        events[str(row["e"])].append(row)
    return ProbeFile(
        path=path,
        rank=_rank(path),
        pid=_whole(header.get("pid")),
        sglang=str(header.get("sglang", "")),
        level=str(header.get("level", "")),
        header=header,
        events=events,
        problems=tuple(problems),
        backwards=backwards,
    )


def frame(files: Iterable[ProbeFile], kind: str) -> pd.DataFrame:
    """All events of a kind: columns rank, pid, unix_s, t_ns and the schema's fields; rows by rank, then in file order.

    A field that a row lacks is None. Raises LabError for a kind that does not exist.
    """
    if kind not in EVENTS:
        raise unknown_name("kind of event", kind, EVENTS)
    fields = EVENTS[kind][1]
    rows = [
        (file.rank, file.pid, file.unix_s(_whole(row.get("t_ns"))), row["t_ns"], *map(row.get, fields))
        for file in files
        for row in file.events[kind]
    ]
    return pd.DataFrame(rows, columns=["rank", "pid", "unix_s", "t_ns", *fields])


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over a file, to hold against the server's own counters. None: the file's level does not say.

    `requests`, `prompt`, `output` and `cached` are those of requests that ended, in a batch or while running;
    `computed` and `found` the prompt tokens of all prefill batches, in which a retracted request counts again.
    """

    computed_tokens: int
    found_tokens: int
    decoded_tokens: int
    evicted_tokens: int
    retracted_requests: int
    retracted_prompt_tokens: int
    retracted_output_tokens: int
    requests: int | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None


def totals(file: ProbeFile, *, window: tuple[float, float] | None = None) -> Totals:
    """The sums of one rank, within a window of Unix seconds if one is given. Every rank of a server shows the same."""
    start, end = window or (float("-inf"), float("inf"))

    def rows(kind: str) -> list[Row]:
        return [row for row in file.events[kind] if start <= file.unix_s(_whole(row.get("t_ns"))) <= end]

    batches = rows("batch")
    prefills = [row for row in batches if row.get("mode") in ("prefill", "mixed")]
    retractions = rows("retraction")
    ended = None
    if "finished" in wanted(file.level):
        ended = rows("finished") + [row for row in rows("aborted") if row.get("where") == "running"]
    return Totals(
        computed_tokens=_sum(prefills, "new_tokens"),
        found_tokens=_sum(prefills, "cached_tokens"),
        decoded_tokens=_sum([row for row in batches if row.get("mode") == "decode"], "new_tokens"),
        evicted_tokens=_sum(rows("evict"), "tokens"),
        retracted_requests=_sum(retractions, "requests"),
        retracted_prompt_tokens=_sum(retractions, "prompt_tokens"),
        retracted_output_tokens=_sum(retractions, "output_tokens"),
        requests=None if ended is None else len(ended),
        prompt_tokens=None if ended is None else _sum(ended, "prompt_tokens"),
        output_tokens=None if ended is None else _sum(ended, "output_tokens"),
        cached_tokens=None if ended is None else _sum(ended, "cached_tokens"),
    )


def _check_schema(header: Row, path: Path) -> None:
    schema = header.get("schema")
    if not isinstance(schema, int) or not isinstance(header.get("t_ns"), int):
        raise LabError(
            f"{path.name} has no schema number or no clock",
            why="it was not written by the lab's probe",
            fix="restore the file, or run the trial again",
        )
    if schema > SCHEMA:
        raise LabError(
            f"{path.name} has event schema {schema}, this lab knows up to {SCHEMA}",
            why="the run was made by a newer lab",
            fix="update the lab: git pull && pip install -e .",
        )


def _flaw(row: Row) -> str:
    if row.get("e") not in EVENTS:
        return f"no kind of event that schema {SCHEMA} has: {row.get('e')!r}"
    return "" if isinstance(row.get("t_ns"), int) else "no time"


def _rank(path: Path) -> str:
    return path.stem.removeprefix("events-").rpartition("-")[0]


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _sum(rows: Iterable[Row], field: str) -> int:
    return sum(_whole(row.get(field)) for row in rows)
