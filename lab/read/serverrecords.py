"""The server's own record of each request: reads SGLang's export (`--export-metrics-to-file`, one JSON line a
request) in one pass and gives a frame per load, in order of arrival, with each request's prefix group and what a
cache that never forgets must find of it. Kept in arrays, not objects, so that a million requests fit."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

NAN = float("nan")
GROUP_KEY = 64  # characters or token ids at a prompt's start that tell prefix groups apart


@dataclass(frozen=True, kw_only=True)
class ServerRecord:
    """What the lab reads of a line of the server's export; times in seconds, `*_ts` Unix times."""

    id: str
    request_received_ts: float
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    queue_time: float | None = None
    first_token_latency: float | None = None
    e2e_latency: float | None = None
    request_parameters: str = "{}"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The prompt inside `request_parameters`: text, or token ids with `--tokenize-prompt`."""

    text: str | None = None
    input_ids: list[int] | None = None


_RECORD = msgspec.json.Decoder(ServerRecord)
_SENT = msgspec.json.Decoder(Sent)


def export_records(folder: Path) -> Iterator[ServerRecord | str]:
    """Every line of the export's hourly files: a record, or a text that says which line could not be read."""
    for path in sorted(folder.glob("sglang-request-metrics-*.log")):
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield _RECORD.decode(raw)
                except msgspec.MsgspecError as error:
                    yield f"{path.name} line {number}: {error}"


def read_export(
    folder: Path, windows: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """A frame for each load, and the lines that could not be read.

    `windows` gives each load's start and end (Unix times, the server runs on the client's machine). A record
    outside of all of them is of no load: the request the server warms itself up with.
    """
    return by_load(export_records(folder), windows)


def by_load(
    records: Iterable[ServerRecord | str], windows: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """As `read_export`, for records from wherever; a text says what could not be read."""
    loads = {name: _Collector() for name in windows}
    unread: list[str] = []
    for record in records:
        if isinstance(record, str):
            unread.append(record)
            continue
        for name, (start, end) in windows.items():
            if start <= record.request_received_ts <= end:
                loads[name].add(record)
                break
    return {name: collector.frame() for name, collector in loads.items()}, unread


def server_frame(records: Iterable[ServerRecord]) -> pd.DataFrame:
    """The records of one load in order of arrival, with columns as `_Collector.frame` says."""
    collector = _Collector()
    for record in records:
        collector.add(record)
    return collector.frame()


NUMBERS = (
    "received",
    "prompt",
    "completion",
    "cached",
    "retractions",
    "queue",
    "first_token",
    "e2e",
    "group",
    "length",
)


class _Collector:
    """The records of one load: `NUMBERS` of each in one flat array (a double holds any token count), ids in a list."""

    def __init__(self) -> None:
        self.rid: list[str] = []
        self.numbers = array("d")
        self.groups: dict[str | tuple[int, ...], int] = {}
        self.model: list[str | list[int]] = []  # per group, the first of its prompts that was read
        self.shared: list[int] = []  # per group, the length of what all its prompts have in common

    def add(self, record: ServerRecord) -> None:
        prompt = _prompt(record)
        key = prompt[:GROUP_KEY] if isinstance(prompt, str) else tuple(prompt[:GROUP_KEY])
        group = self.groups.setdefault(key, len(self.groups))
        if group == len(self.model):
            self.model.append(prompt)
            self.shared.append(len(prompt))
        self.shared[group] = _common(self.model[group], prompt, at_most=self.shared[group])
        self.rid.append(record.id)
        self.numbers.extend(
            (
                record.request_received_ts,
                record.prompt_tokens,
                record.completion_tokens,
                record.cached_tokens,
                record.num_retractions,
                NAN if record.queue_time is None else record.queue_time,
                NAN if record.first_token_latency is None else record.first_token_latency,
                NAN if record.e2e_latency is None else record.e2e_latency,
                group,
                len(prompt) or 1,
            )
        )

    def frame(self) -> pd.DataFrame:
        """Rows in order of arrival; groups numbered in that order too.

        Two prompts are of one group when they start alike (`GROUP_KEY`). `predicted_share` of all but a group's
        first request is the part of the prompt that the whole group shares, by length of text (or token ids):
        what a cache that never forgets must find. It is computed from the prompts alone.
        """
        rows = np.array(self.numbers, dtype=float).reshape(-1, len(NUMBERS))
        order = np.argsort(rows[:, 0], kind="stable")
        column = dict(zip(NUMBERS, rows[order].T, strict=True))
        group = column["group"].astype(np.int64)
        frame = pd.DataFrame(
            {
                "rid": pd.Series(self.rid, dtype=object).iloc[order].to_numpy(),
                "received": column["received"],
                "server_prompt": column["prompt"].astype(np.int64),
                "server_completion": column["completion"].astype(np.int64),
                "server_cached": column["cached"].astype(np.int64),
                "retractions": column["retractions"].astype(np.int64),
                "queue_ms": 1000 * column["queue"],
                "server_ttft_ms": 1000 * column["first_token"],
                "server_e2e_ms": 1000 * column["e2e"],
                "group": pd.factorize(group)[0].astype(np.int64),
            }
        )
        frame["group_order"] = frame.groupby("group").cumcount()
        share = (
            np.array(self.shared, dtype=float)[group] / column["length"] if len(group) else column["length"]
        )
        frame["predicted_share"] = np.where(frame["group_order"] == 0, 0.0, share)
        return frame


def _prompt(record: ServerRecord) -> str | list[int]:
    try:
        sent = _SENT.decode(record.request_parameters)
    except msgspec.MsgspecError:
        return record.id  # an unreadable prompt is a group of its own
    return sent.text if sent.text is not None else (sent.input_ids or record.id)


def _common(a: str | list[int], b: str | list[int], *, at_most: int) -> int:
    """Length of the common prefix, by bisection: comparing slices is far quicker than comparing in a loop."""
    low, high = 0, min(len(a), len(b), at_most)
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
