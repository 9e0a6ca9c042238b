"""One row a request: what the client saw, joined with what the server recorded of the same request.

In go a load's client file (bench_serving's details or the chat program's lines) and the server's export
(`--export-metrics-to-file`, one JSON line a request); out comes a frame with `COLUMNS` and a list of everything that
could not be read or matched. Nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from lab import jsonl
from lab.rundir import LoadFiles

GROUP_KEY = 64  # characters or token ids at a prompt's start that tell prefix groups apart

COLUMNS = (
    *("order", "group", "group_order", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("cached_share", "predicted_share", "lru_share", "ttft_ms", "itl_ms", "e2e_ms"),
    *("server_ttft_ms", "server_e2e_ms", "queue_ms", "received_s", "retractions"),
    *("success", "error", "joined"),
)


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


def server_frame(records: list[ServerRecord]) -> pd.DataFrame:
    """The server's records in order of arrival, each with its prefix group and predicted cached share.

    Two prompts are of one group when they start alike (`GROUP_KEY`). The prediction for all but a group's
    first request is the part of the prompt that the whole group shares, by length of text (or token ids):
    what a cache that never forgets must find. It is computed from the prompts alone.
    """
    records = sorted(records, key=lambda r: r.request_received_ts)
    model: dict[str | tuple[int, ...], tuple[int, str | list[int]]] = {}  # key → group, first prompt
    shared: list[int] = []  # per group, length of what all its prompts share
    groups = np.empty(len(records), dtype=np.int64)
    lengths = np.empty(len(records), dtype=np.int64)
    for i, record in enumerate(records):
        prompt = _prompt(record)
        key = prompt[:GROUP_KEY] if isinstance(prompt, str) else tuple(prompt[:GROUP_KEY])
        if key not in model:
            model[key] = (len(model), prompt)
            shared.append(len(prompt))
        group, first = model[key]
        shared[group] = _common(first, prompt, at_most=shared[group])
        groups[i], lengths[i] = group, max(1, len(prompt))
    frame = pd.DataFrame(
        {
            "rid": [r.id for r in records],
            "received": np.array([r.request_received_ts for r in records], dtype=float),
            "server_prompt": np.array([r.prompt_tokens for r in records], dtype=np.int64),
            "server_completion": np.array([r.completion_tokens for r in records], dtype=np.int64),
            "server_cached": np.array([r.cached_tokens for r in records], dtype=np.int64),
            "retractions": np.array([r.num_retractions for r in records], dtype=np.int64),
            "queue_ms": _ms([r.queue_time for r in records]),
            "server_ttft_ms": _ms([r.first_token_latency for r in records]),
            "server_e2e_ms": _ms([r.e2e_latency for r in records]),
            "group": groups,
        }
    )
    frame["group_order"] = frame.groupby("group").cumcount()
    share = np.array(shared, dtype=float)[groups] / lengths if len(records) else lengths.astype(float)
    frame["predicted_share"] = np.where(frame["group_order"] == 0, 0.0, share)
    return frame


def client_frame(files: LoadFiles, *, dataset: str) -> tuple[pd.DataFrame, list[str]]:
    """What the client wrote, in the order it sent: lengths, latencies, errors; and what could not be read."""
    path = files.chat if dataset == "chat" else files.bench
    if not path.exists():
        return pd.DataFrame(), [f"{path.name} is missing"]
    rows, problems = jsonl.read(path)
    said = [f"{path.name} line {p.line}: {p.reason}" for p in problems]
    if not rows:
        return pd.DataFrame(), said
    if dataset == "chat":
        return _chat_frame(rows), said
    return _bench_frame(rows[-1]), said


def join(client: pd.DataFrame, server: pd.DataFrame) -> pd.DataFrame:
    """Client rows with their server rows. `joined` says how: by `rid`, by `order` of arrival, by `tokens`, or `no`.

    bench_serving does not tell the server which request is which. One request at a time arrives in the
    order it was sent; with more in flight, requests are matched by prompt, cached and output tokens.
    """
    if "rid" in client.columns:
        merged = client.merge(server, on="rid", how="left")
        merged["joined"] = np.where(merged["received"].notna(), "rid", "no")
    elif len(client) == len(server) and _same_tokens(client, server):
        merged = pd.concat([client, server], axis=1)
        merged["joined"] = "order"
    else:
        merged = _join_by_tokens(client, server)
    return _finish(merged)


def _join_by_tokens(client: pd.DataFrame, server: pd.DataFrame) -> pd.DataFrame:
    keys = ["prompt_tokens", "completion_tokens", "cached_tokens"]
    left = client.copy()
    right = server.copy()
    right[keys] = right[["server_prompt", "server_completion", "server_cached"]]
    for frame in (left, right):
        frame["nth"] = frame.groupby(keys).cumcount()
    merged = left.merge(right, on=[*keys, "nth"], how="left")
    merged["joined"] = np.where(merged["received"].notna(), "tokens", "no")
    return merged


def _finish(merged: pd.DataFrame) -> pd.DataFrame:
    merged["cached_share"] = merged["cached_tokens"] / merged["prompt_tokens"].where(
        merged["prompt_tokens"] > 0
    )
    merged["received_s"] = merged["received"] - merged["received"].min()
    merged["order"] = np.arange(len(merged))
    merged["lru_share"] = merged["predicted_share"]
    return merged[list(COLUMNS)]


def _same_tokens(client: pd.DataFrame, server: pd.DataFrame) -> bool:
    return bool(
        (client["prompt_tokens"].to_numpy() == server["server_prompt"].to_numpy()).all()
        and (client["completion_tokens"].to_numpy() == server["server_completion"].to_numpy()).all()
    )


def _bench_frame(row: jsonl.Row) -> pd.DataFrame:
    """bench_serving's details: parallel lists, one entry a request in the order they were sent."""
    prompt = _numbers(row, "input_lens")
    errors = [str(e) for e in _list(row, "errors")]
    n = len(prompt)
    itls = _list(row, "itls")
    ttft = _numbers(row, "ttfts")
    sums = np.array([float(np.sum(x)) if isinstance(x, list) else np.nan for x in itls])
    return pd.DataFrame(
        {
            "prompt_tokens": prompt,
            "completion_tokens": _numbers(row, "output_lens"),
            "cached_tokens": _numbers(row, "cached_tokens") if "cached_tokens" in row else np.full(n, np.nan),
            "ttft_ms": 1000 * ttft,
            "itl_ms": np.array(
                [1000 * float(np.median(x)) if isinstance(x, list) and x else np.nan for x in itls]
            ),
            "e2e_ms": 1000 * (ttft + sums),
            "success": [not e for e in errors],
            "error": [e.splitlines()[-1] if e else "" for e in errors],
        }
    )


def _chat_frame(rows: list[jsonl.Row]) -> pd.DataFrame:
    def column(name: str) -> list[object]:
        return [row.get(name) for row in rows]

    gaps = [x if isinstance(x, list) else [] for x in column("itls_s")]
    return pd.DataFrame(
        {
            "rid": [str(x) for x in column("rid")],
            "prompt_tokens": pd.to_numeric(pd.Series(column("prompt_tokens"))),
            "completion_tokens": pd.to_numeric(pd.Series(column("completion_tokens"))),
            "cached_tokens": pd.to_numeric(pd.Series(column("cached_tokens"))),
            "ttft_ms": 1000 * pd.to_numeric(pd.Series(column("ttft_s"))),
            "itl_ms": [1000 * float(np.median(g)) if g else np.nan for g in gaps],
            "e2e_ms": 1000 * pd.to_numeric(pd.Series(column("e2e_s"))),
            "success": [not row.get("error") and row.get("ttft_s") is not None for row in rows],
            "error": [str(row.get("error") or "") for row in rows],
        }
    )


def _list(row: jsonl.Row, key: str) -> list[object]:
    value = row.get(key)
    return value if isinstance(value, list) else []


def _numbers(row: jsonl.Row, key: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([np.nan if v is None else v for v in _list(row, key)], dtype=float)


def _prompt(record: ServerRecord) -> str | list[int]:
    try:
        sent = _SENT.decode(record.request_parameters)
    except msgspec.MsgspecError:
        return record.id  # an unreadable prompt is a group of its own
    return sent.text if sent.text is not None else (sent.input_ids or record.id)


def _common(a: str | list[int], b: str | list[int], *, at_most: int) -> int:
    """Length of the common prefix, by bisection: comparing slices is far quicker than comparing in a loop."""
    low, high = 0, min(len(a), len(b), at_most)
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _ms(seconds: list[float | None]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return 1000 * np.array([np.nan if s is None else s for s in seconds], dtype=float)
