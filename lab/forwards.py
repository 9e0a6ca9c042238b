"""What the probe saw inside the server, as tables: one row a forward pass, one a request's way through the scheduler, and
the numbers of a load made of them. In go the events of one rank (`lab.read.events`); out come frames and plain numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lab.probe.labprobe.schema import wanted
from lab.read.events import ProbeFile, frame

MS = 1e6  # nanoseconds

FORWARD_COLUMNS = (
    *(
        "forward",
        "mode",
        "requests",
        "new_tokens",
        "cached_tokens",
        "running",
        "waiting",
        "policy",
        "chunked",
    ),
    *("t_s", "form_ms", "run_ms", "step_ms", "process_ms", "gap_ms", "late"),
    *("slots_used", "slots_free", "kv_used", "kv_free", "kv_evictable", "kv_protected"),
)
# By the probe's level, from which on a load has the numbers.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "batches": (
        *("prefill_passes", "decode_passes", "joined_passes", "left_passes", "alternations"),
        *("running_max", "running_mean", "waiting_max", "gap_share", "late_share", "form_share"),
        *("kv_used_max", "kv_used_share_max", "slots_used_max", "asked_waiting_max", "fallback_waiting_min"),
        *("retraction_passes", "freed_tokens"),
    ),
    "requests": ("order_kept", "group_switches"),
    "cache": (
        *("stored_tokens", "held_tokens", "saved_share", "tree_tokens_max", "tree_tokens_end"),
        *("nodes_evicted", "evicted_old_first"),
    ),
}
PREFILL = ("prefill", "mixed")
NAN = float("nan")


def number_columns() -> tuple[str, ...]:
    """Every number that a load may get of the probe, in order."""
    return tuple(name for names in NUMBERS.values() for name in names)


def forward_table(file: ProbeFile, windows: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """One row a forward pass of the loads, in order: `load` and FORWARD_COLUMNS. Times in ms, `t_s` Unix seconds.

    `run_ms` is the call that runs the batch, on a GPU the launch alone; `step_ms` from this launch to the next, on either.
    `gap_ms` is from the end of the call before to this one; `step_ms` and `gap_ms` are empty where the scheduler had nothing to
    do in between, and at a load's end or begin. `late` is 1 when the pass's result was processed
    after the next pass had been launched, which is what the overlap scheduler does.
    """
    events = frame([file], "batch")
    for column in ("run_at_ns", "run_ns", "form_ns", "done_at_ns", "done_ns"):
        events[column] = pd.to_numeric(events[column])
    events["t_s"] = events["unix_s"] + (events["run_at_ns"] - events["t_ns"]) / 1e9
    table = pd.DataFrame(
        {
            "load": load_of(events["t_s"], windows),
            "form_ms": events["form_ns"] / MS,
            "run_ms": events["run_ns"] / MS,
            "step_ms": (events["run_at_ns"].shift(-1) - events["run_at_ns"]) / MS,
            "process_ms": events["done_ns"] / MS,
            "gap_ms": (events["run_at_ns"] - (events["run_at_ns"] + events["run_ns"]).shift()) / MS,
            "late": (events["done_at_ns"] >= events["run_at_ns"].shift(-1)).astype(float),
        }
    )
    worked = (pd.to_numeric(events["idle_turns"]) == 0) & (table["load"] == table["load"].shift())
    table["gap_ms"] = table["gap_ms"].where(worked)
    # The last pass before a pause has no next one, to be measured to or to be late for.
    goes_on = worked.shift(-1, fill_value=False)
    table["step_ms"], table["late"] = table["step_ms"].where(goes_on), table["late"].where(goes_on)
    for column in FORWARD_COLUMNS:
        if column not in table:
            words = column in ("mode", "policy")
            table[column] = events[column] if words else pd.to_numeric(events[column].astype(object))
    table["worked"] = worked
    return table.loc[table["load"] != "", ["load", *FORWARD_COLUMNS, "worked"]].reset_index(drop=True)


def load_of(times: pd.Series[float], windows: Mapping[str, tuple[float, float]]) -> pd.Series[str]:
    """The load in whose time each moment (Unix seconds) lies; "" for none."""
    found = pd.Series("", index=times.index, dtype=object)
    for name, (start, end) in windows.items():
        found[(times >= start) & (times <= end)] = name
    return found


def request_table(file: ProbeFile) -> pd.DataFrame:
    """One row a request: rid, `wait_ms` from being queued to the launch of the first pass that it is part of, `scheduled_s`
    (Unix seconds of that launch), `probe_retractions`. Empty below level "requests"."""
    columns = ["rid", "wait_ms", "scheduled_s", "probe_retractions"]
    if "scheduled" not in wanted(file.level):
        return pd.DataFrame(columns=columns)
    first = {
        kind: frame([file], kind).drop_duplicates("rid").set_index("rid") for kind in ("queued", "scheduled")
    }
    retracted = frame([file], "retracted").groupby("rid").size()
    launched = frame([file], "batch").set_index("forward")["run_at_ns"]
    table = first["scheduled"][["t_ns", "unix_s", "forward"]].join(
        first["queued"]["t_ns"].rename("queued_ns")
    )
    begun = pd.to_numeric(table["forward"].map(launched))  # the event itself is noted when the pass has ended
    table["wait_ms"] = (begun - table["queued_ns"]) / MS
    table["scheduled_s"] = table["unix_s"] + (begun - table["t_ns"]) / 1e9
    table["probe_retractions"] = retracted.reindex(table.index).fillna(0.0)
    return table.reset_index()[columns]


def batch_numbers(passes: pd.DataFrame, *, asked_policy: str, pool_tokens: float) -> dict[str, float]:
    """The load's numbers from its rows of `forward_table`."""
    prefill, decode = passes[passes["mode"].isin(PREFILL)], passes[passes["mode"] == "decode"]
    before = passes["mode"].shift()
    gap, run, form = (float(passes[c].sum()) for c in ("gap_ms", "run_ms", "form_ms"))
    sizes = decode["requests"]
    left = passes["requests"] < passes["requests"].shift()
    queue = prefill["waiting"] + prefill["requests"]  # what the policy had to order
    in_force = prefill["policy"] == asked_policy
    used = passes["kv_used"].max()
    return {
        "prefill_passes": float(len(prefill)),
        "decode_passes": float(len(decode)),
        "joined_passes": float((prefill["running"] > 0).sum()),
        "left_passes": float(
            (left & (passes["mode"] == "decode") & (before == "decode") & passes["worked"]).sum()
        ),
        "alternations": float((passes["mode"].isin(PREFILL) & (before == "decode") & passes["worked"]).sum()),
        "running_max": float(sizes.max()),
        "running_mean": float(sizes.mean()),
        "waiting_max": float(passes["waiting"].max()),
        "gap_share": gap / (gap + run) if gap + run else NAN,
        "late_share": float(passes["late"].mean()),
        "form_share": form / (gap + run) if gap + run else NAN,
        "kv_used_max": float(used),
        "kv_used_share_max": float(used / pool_tokens),
        "slots_used_max": float(passes["slots_used"].max()),
        "asked_waiting_max": float(queue[in_force].max()),
        "fallback_waiting_min": float(queue[~in_force].min()),
    }


def retraction_numbers(file: ProbeFile, window: tuple[float, float]) -> dict[str, float]:
    """How often requests were put back in the window, and the KV slots that this freed."""
    rows = _within(frame([file], "retraction"), window)
    return {"retraction_passes": float(len(rows)), "freed_tokens": float(rows["freed_tokens"].sum())}


def tree_numbers(file: ProbeFile, window: tuple[float, float]) -> dict[str, float]:
    """What the radix tree did in the window; nothing below level "cache".

    `held_tokens` is what caches without sharing would hold of the requests that finished, `stored_tokens` by how much the
    tree grew; without a tree there is no share saved. A node counts as older by a millisecond or more: a request touches
    all nodes of its path one after the other.
    """
    if "insert" not in wanted(file.level):
        return {}
    inserts = _within(frame([file], "insert"), window)
    finished = _within(frame([file], "finished"), window)
    nodes = _within(frame([file], "evict_node"), window)
    stored = float(inserts["new_tokens"].sum())
    held = float((finished["prompt_tokens"] + finished["output_tokens"]).sum())
    sizes = inserts["kv_evictable"] + inserts["kv_protected"]
    passes = np.searchsorted(frame([file], "evict")["t_ns"].to_numpy(dtype=np.int64), nodes["t_ns"])
    touched = (nodes["t_ns"] - pd.to_numeric(nodes["age_ns"].astype(object))).reset_index(drop=True)
    neighbours = (passes == np.roll(passes, 1)) & (np.arange(len(touched)) > 0)
    in_order = (touched >= touched.shift() - MS)[neighbours]
    # With a GPU the probe knows only when a request ended at a node, which is not what the server goes by.
    by_use = bool((nodes["age_of"] == "path").all())
    return {
        "stored_tokens": stored,
        "held_tokens": held,
        "saved_share": 1 - stored / held if held and len(inserts) else NAN,
        "tree_tokens_max": float(sizes.max()),
        "tree_tokens_end": float(sizes.iloc[-1]) if len(sizes) else NAN,
        "nodes_evicted": float(len(nodes)),
        "evicted_old_first": float(in_order.mean()) if len(in_order) and by_use else NAN,
    }


def order_numbers(requests: pd.DataFrame) -> dict[str, float]:
    """From the joined requests of a load: how far service kept the order of arrival, and how often the prefix group changed
    from one request served to the next. Nothing where the probe did not follow requests."""
    if "service_order" not in requests or requests["service_order"].isna().all():
        return {}
    served = requests.sort_values("service_order")
    arrival = served["received_s"]
    return {
        "order_kept": float((arrival >= arrival.shift()).iloc[1:].mean()),
        "group_switches": float((served["group"] != served["group"].shift()).iloc[1:].sum()),
    }


def _within(rows: pd.DataFrame, window: tuple[float, float]) -> pd.DataFrame:
    return rows[(rows["unix_s"] >= window[0]) & (rows["unix_s"] <= window[1])]
