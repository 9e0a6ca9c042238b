"""Event files of the probe, written by hand: for tests of what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

from lab.probe.labprobe.schema import EVENTS, SCHEMA

SECOND = 1_000_000_000
UNIX = 1_790_000_000


def header(**changes: object) -> dict[str, object]:
    """Monotonic second 0 is Unix second UNIX."""
    row = {"e": "header", "t_ns": 0, "unix_ns": UNIX * SECOND, "schema": SCHEMA, "pid": 7, "sglang": "0.5.21"}
    return {**row, "level": "cache", **changes}


def event(kind: str, at_s: float, **values: object) -> dict[str, object]:
    assert set(values) <= set(EVENTS[kind][1]), set(values) - set(EVENTS[kind][1])
    return {"e": kind, "t_ns": round(at_s * SECOND), **dict.fromkeys(EVENTS[kind][1]), **values}


def batch(at_s: float, mode: str, requests: int, **values: object) -> dict[str, object]:
    """A pass launched at `at_s` that took 10 ms and was processed 1 ms after its end, in 2 ms."""
    start = round(at_s * SECOND)
    usual: dict[str, object] = {
        "forward": 0,
        "mode": mode,
        "requests": requests,
        "new_tokens": requests,
        "cached_tokens": 0,
        "running": requests if mode == "decode" else 0,
        "waiting": 0,
        "policy": "fcfs",
        "chunked": False,
        "idle_turns": 0,
        "form_ns": 500_000,
        "run_at_ns": start,
        "run_ns": 10_000_000,
        "done_at_ns": start + 11_000_000,
        "done_ns": 2_000_000,
        "slots_used": requests,
        "slots_free": 8 - requests,
        "kv_used": 10 * requests,
        "kv_free": 100 - 10 * requests,
        "kv_evictable": 0,
        "kv_protected": 0,
    }
    return event("batch", at_s + 0.013, **{**usual, **values})


def write(folder: Path, *rows: dict[str, object], rank: str = "pp0-tp0", cut: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"events-{rank}-7.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    return path
