"""One row a request: what the client saw, joined with what the server recorded of the same request.

In go a load's client file (bench_serving's details or the chat program's lines) and the frame of the server's
records (`serverrecords`); out comes a frame with `COLUMNS`, and what could not be read. Nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import msgspec
import numpy as np
import pandas as pd

from lab.read import jsonl
from lab.rundir import LoadFiles

Floats: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]

COLUMNS = (
    *("order", "group", "group_order", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("cached_share", "predicted_share", "lru_share", "ttft_ms", "itl_ms", "e2e_ms"),
    *("server_ttft_ms", "server_e2e_ms", "queue_ms", "received_s", "retractions"),
    *("success", "error", "joined", "tpot_ms", "wait_ms", "service_order"),
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the lab reads of bench_serving's line: parallel lists, one entry a request in the order sent; seconds."""

    input_lens: list[float | None] = field(default_factory=list)
    output_lens: list[float | None] = field(default_factory=list)
    cached_tokens: list[float | None] = field(default_factory=list)
    ttfts: list[float | None] = field(default_factory=list)
    itls: list[list[float]] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class BenchWithAnswers(Bench):
    """The same with what was generated, which takes much memory and is read only where requests are told apart by it."""

    generated_texts: list[str] = field(default_factory=list)


_BENCH = msgspec.json.Decoder(Bench)
_WITH_ANSWERS = msgspec.json.Decoder(BenchWithAnswers)


def client_frame(files: LoadFiles, *, dataset: str, answers: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """What the client wrote, in the order it sent: lengths, latencies, errors; and what could not be read.

    With `answers` bench_serving's frame has a column `answer`, the text that was generated.
    """
    path = files.chat if dataset == "chat" else files.bench
    if not path.exists():
        return pd.DataFrame(), [f"{path.name} is missing"]
    if dataset != "chat":
        try:
            return _bench_frame((_WITH_ANSWERS if answers else _BENCH).decode(path.read_bytes())), []
        except msgspec.MsgspecError:
            pass  # cut, or with the bare Infinity of older releases: read it the patient way
    rows, problems = jsonl.read(path)
    said = [f"{path.name} line {p.line}: {p.reason}" for p in problems]
    if not rows:
        return pd.DataFrame(), said
    if dataset == "chat":
        return _chat_frame(rows), said
    try:
        return _bench_frame(msgspec.convert(rows[-1], BenchWithAnswers if answers else Bench)), said
    except msgspec.ValidationError as error:
        return pd.DataFrame(), [*said, f"{path.name}: {error}"]


def join(client: pd.DataFrame, server: pd.DataFrame) -> pd.DataFrame:
    """Client rows with their server rows. `joined` says how: by `rid`, by `order` of arrival, by `tokens`, or `no`.

    bench_serving does not tell the server which request is which. One request at a time arrives in the
    order it was sent; with more in flight, requests are matched by prompt, cached and output tokens. Where the server's
    record has the answers, they tell which request is which, and its counts of tokens are taken: such a client only knows what
    it meant to send.
    """
    if "rid" in client.columns:
        merged = client.merge(server, on="rid", how="left")
        merged["joined"] = np.where(merged["received"].notna(), "rid", "no")
    elif "answer" in client.columns and "answer" in server.columns:
        merged = _join_by_answer(client, server)
    elif len(client) == len(server) and _same_tokens(client, server):
        merged = pd.concat([client, server.drop(columns="rid")], axis=1, copy=False)
        merged["joined"] = "order"
    else:
        merged = _join_by_tokens(client, server)
    return _finish(merged)


def _join_by_answer(client: pd.DataFrame, server: pd.DataFrame) -> pd.DataFrame:
    keys = ["answer", "completion_tokens"]
    left, right = client.copy(), server.assign(completion_tokens=server["server_completion"].astype(float))
    for frame in (left, right):
        frame["nth"] = frame.groupby(keys).cumcount()
    merged = left.merge(right, on=[*keys, "nth"], how="left")
    found = merged["received"].notna()
    merged["joined"] = np.where(found, "answer", "no")
    merged["prompt_tokens"] = merged["server_prompt"].where(found, merged["prompt_tokens"]).astype(float)
    merged["cached_tokens"] = merged["server_cached"].where(found, merged["cached_tokens"]).astype(float)
    return merged


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
    gaps = (merged["completion_tokens"].astype(float) - 1).clip(lower=0)
    merged["tpot_ms"] = (merged["e2e_ms"] - merged["ttft_ms"]) / gaps.where(gaps > 0)
    if "scheduled_s" in merged.columns:
        merged["service_order"] = merged["scheduled_s"].rank(method="first") - 1
        merged["retractions"] = merged["retractions"].fillna(merged["probe_retractions"])
        _by_service(merged)
    else:
        merged["wait_ms"] = merged["service_order"] = np.nan
    merged["lru_share"] = merged["predicted_share"]
    texts = merged[["answer"]].rename(columns={"answer": "text"}) if "answer" in merged.columns else None
    return pd.concat([merged[list(COLUMNS)], texts], axis=1) if texts is not None else merged[list(COLUMNS)]


def _by_service(merged: pd.DataFrame) -> None:
    """Where the order of service is known, it decides which request of a group is the first, the one that can find
    nothing, and not the order of arrival."""
    if merged["service_order"].isna().any() or merged.empty:
        return
    place = merged.groupby("group")["service_order"].rank(method="first") - 1
    share = merged["predicted_share"].where(merged["predicted_share"] > 0)
    usual = share.groupby(merged["group"]).transform("median")
    merged["predicted_share"] = share.fillna(usual).fillna(0.0).where(place > 0, 0.0)
    merged["group_order"] = place.astype(int)


def _same_tokens(client: pd.DataFrame, server: pd.DataFrame) -> bool:
    return bool(
        (client["prompt_tokens"].to_numpy() == server["server_prompt"].to_numpy()).all()
        and (client["completion_tokens"].to_numpy() == server["server_completion"].to_numpy()).all()
    )


def _bench_frame(bench: Bench) -> pd.DataFrame:
    n = len(bench.input_lens)
    lengths = [len(bench.output_lens), len(bench.ttfts), len(bench.itls), len(bench.errors)]
    answers = bench.generated_texts if isinstance(bench, BenchWithAnswers) else []
    lengths += [len(optional) for optional in (bench.cached_tokens, answers) if optional]
    if any(length != n for length in lengths):
        raise msgspec.ValidationError(f"its lists have different lengths: {[n, *lengths]}")
    medians, sums = _gaps(bench.itls)
    ttft = np.array(bench.ttfts, dtype=float)
    frame = pd.DataFrame(
        {
            "prompt_tokens": np.array(bench.input_lens, dtype=float),
            "completion_tokens": np.array(bench.output_lens, dtype=float),
            "cached_tokens": np.array(bench.cached_tokens, dtype=float)
            if bench.cached_tokens
            else np.full(n, np.nan),
            "ttft_ms": 1000 * ttft,
            "itl_ms": 1000 * medians,
            "e2e_ms": 1000 * (ttft + sums),
            # a success without a time to first token is none: the client never saw a token
            "success": [not e and not np.isnan(t) for e, t in zip(bench.errors, ttft, strict=True)],
            "error": [e.splitlines()[-1] if e else "" for e in bench.errors],
        }
    )
    return frame.assign(answer=answers) if answers else frame


def _gaps(itls: Sequence[Sequence[float]]) -> tuple[Floats, Floats]:
    """Median and sum of each request's gaps, requests with equally many taken together; no gaps: NaN and 0."""
    counts = np.fromiter((len(gaps) for gaps in itls), dtype=np.int64, count=len(itls))
    flat = np.fromiter(chain.from_iterable(itls), dtype=float, count=int(counts.sum()))
    starts = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(counts) else counts
    medians, sums = np.full(len(counts), np.nan), np.zeros(len(counts))
    for count in np.unique(counts[counts > 0]):
        which = np.flatnonzero(counts == count)
        rows = flat[starts[which][:, None] + np.arange(count)]
        medians[which], sums[which] = np.median(rows, axis=1), rows.sum(axis=1)
    return medians, sums


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
