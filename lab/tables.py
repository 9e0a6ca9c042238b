"""A run's raw files as tidy tables, one CSV each under tables/: trials, loads, requests, batches, metrics,
groups, checks. Reads only the run directory; the same raw files always give the same tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from lab import lru, prom, serverlog
from lab.errors import LabError
from lab.plan import LoadStep, Trial, read_plan
from lab.requestlog import COLUMNS, ServerRecord, client_frame, export_records, join, server_frame
from lab.rundir import LoadFiles, Run, TrialFiles, read_json
from lab.validity import Check, load_checks, server_arguments

TABLES = ("trials", "loads", "requests", "batches", "metrics", "groups", "checks")
LOST_SHARE = 0.5  # a prefix is called evicted when less than this of what was predicted is found again

Row = dict[str, object]


@dataclass
class Rows:
    """What one trial adds to the tables."""

    loads: list[Row] = field(default_factory=list)
    requests: list[pd.DataFrame] = field(default_factory=list)
    batches: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tabulate(run: Run) -> dict[str, pd.DataFrame]:
    """Make every table of the run and write it; returns them by name."""
    plan = read_plan(run)
    trials: list[Row] = []
    all_rows = Rows()
    for trial in plan.trials:
        rows = Rows()
        trials.append(_trial(run, trial, rows))
        all_rows.loads += rows.loads
        all_rows.requests += rows.requests
        all_rows.batches += rows.batches
        all_rows.metrics += rows.metrics
        all_rows.checks += rows.checks
    requests = (
        pd.concat(all_rows.requests, ignore_index=True)
        if all_rows.requests
        else pd.DataFrame(columns=["trial", "variant", "repeat", "load", "role", *COLUMNS])
    )
    tables = {
        "trials": pd.DataFrame(trials),
        "loads": pd.DataFrame(all_rows.loads, columns=LOAD_COLUMNS),
        "requests": requests,
        "batches": pd.DataFrame(all_rows.batches, columns=("trial", "load", *serverlog.BATCH_COLUMNS)),
        "metrics": pd.DataFrame(
            all_rows.metrics, columns=("trial", "load", "name", "labels", "delta", "state")
        ),
        "groups": _groups(requests),
        "checks": pd.DataFrame(all_rows.checks, columns=("trial", "load", "name", "ok", "detail")),
    }
    run.tables.mkdir(exist_ok=True)
    for name, table in tables.items():
        table.to_csv(run.tables / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    return tables


LOAD_COLUMNS = (
    *("trial", "variant", "repeat", "load", "role", "requests", "succeeded", "duration_s"),
    *("prompt_tokens", "cached_tokens", "generated_tokens", "evicted_tokens", "retracted_requests"),
    *("pool_tokens", "working_set_tokens", "hit_rate", "predicted_hit_rate", "hit_rate_lost"),
    *("lru_hit_rate", "lru_agreement", "groups", "groups_evicted"),
)


def _trial(run: Run, trial: Trial, rows: Rows) -> Row:
    """One row of `trials`; fills `rows` with the rest. A trial that failed half-way keeps what can be read."""
    files = run.trial(trial.name)
    row: Row = {"trial": trial.name, "variant": trial.variant, "repeat": trial.repeat}
    if not files.status.exists():
        return {**row, **_state("not run", "not run", "the run ended before it")}
    status = read_json(files.status)
    row["ready_s"] = status.get("ready_s")
    if status.get("status") != "ok":
        reason = f"{status.get('phase')}: {status.get('reason')}"
        if status.get("status") == "running":
            reason = f"{status.get('phase')}: the lab was killed during this trial"
        return {**row, **_state("failed", "failed", reason)}
    try:
        return row | _measured(trial, files, status, rows)
    except LabError as error:  # a file that cannot be read costs its trial, not the report on the others
        what = error.problem.replace(f"{run.path}/", "")
        return row | _state("ok", "invalid", what) | {"unreadable": what}


def _measured(trial: Trial, files: TrialFiles, status: dict[str, object], rows: Rows) -> Row:
    """State, log lines and what was unreadable of a trial that ran to its end; fills `rows`."""
    info = read_json(files.server_info).get("server_info")
    info = info if isinstance(info, dict) else {}
    checks = [("", server_arguments(_resolved(trial, status), info))]
    log = serverlog.read(files.server_log)
    records = list(export_records(files.export))
    unread = [r for r in records if isinstance(r, str)]
    pool = info.get("max_total_num_tokens")
    for step in trial.loads:
        found = _load(
            trial,
            step,
            files.load(step.name),
            records=[r for r in records if not isinstance(r, str)],
            pool_tokens=float(pool) if isinstance(pool, (int, float)) else float("nan"),
            rows=rows,
        )
        checks += [(step.name, check) for check in found]
    _batches(trial, files, log, rows)
    if log.crashes():
        checks.append(("", Check(name="server did not crash", ok=False, detail=str(log.crashes()[0].values))))
    unread += [f"server.log line {u.line}: {u.reason}" for u in log.unreadable]
    unread += rows.notes
    rows.checks += [{"trial": trial.name, "load": load, **asdict(check)} for load, check in checks]
    bad = [f"{load + ': ' if load else ''}{c.name}: {c.detail}" for load, c in checks if not c.ok]
    row = _state("ok", "invalid" if bad else "valid", "; ".join(bad))
    return row | {"log_lines": log.lines, "unreadable": "; ".join(unread[:20])}


def _state(status: str, validity: str, reason: str) -> Row:
    return {"status": status, "validity": validity, "reason": reason}


def _resolved(trial: Trial, status: dict[str, object]) -> tuple[str, ...]:
    """The planned server arguments that name no place of the machine; the port is the one that was used."""
    words: list[str] = []
    argv = trial.server.argv
    for i, word in enumerate(argv):
        if "${" in word or (i + 1 < len(argv) and word.startswith("--") and "${" in argv[i + 1]):
            if word == "--port":
                words += ["--port", str(status.get("port"))]
            continue
        words.append(word)
    return tuple(words)


def _load(
    trial: Trial,
    step: LoadStep,
    files: LoadFiles,
    *,
    records: list[ServerRecord],
    pool_tokens: float,
    rows: Rows,
) -> list[Check]:
    status = read_json(files.status)
    window = (float(str(status["started"])), float(str(status["ended"])))
    client, said = client_frame(files, dataset=step.dataset)
    rows.notes += [f"{step.name}: {text}" for text in said]
    ours = [r for r in records if window[0] <= r.request_received_ts <= window[1]]
    key: Row = {
        "trial": trial.name,
        "variant": trial.variant,
        "repeat": trial.repeat,
        "load": step.name,
        "role": step.role,
    }
    requests = join(client, server_frame(ours)) if len(client) else pd.DataFrame(columns=list(COLUMNS))
    if step.hit_rate == 0:  # no cache, or nothing planned to share: nothing is predicted, whatever is alike
        requests["predicted_share"] = requests["lru_share"] = 0.0
    elif step.concurrency == 1 and step.rate_per_s is None and pool_tokens < step.working_set_tokens:
        requests["lru_share"] = _lru_share(requests, pool_tokens=int(pool_tokens))
    deltas = prom.difference(prom.read(files.before), prom.read(files.after))
    for delta in deltas:
        if delta.delta != 0:
            labels = ",".join(f"{k}={v}" for k, v in delta.labels if k != "model_name")
            rows.metrics.append(
                {
                    "trial": trial.name,
                    "load": step.name,
                    "name": delta.name,
                    "labels": labels,
                    "delta": delta.delta,
                    "state": delta.state,
                }
            )
    numbers = _load_numbers(step, requests, deltas, pool_tokens=pool_tokens)
    numbers["duration_s"] = window[1] - window[0]
    rows.loads.append({**key, **numbers})
    if len(requests):
        for place, (name, value) in enumerate(key.items()):
            requests.insert(place, name, str(value) if name != "repeat" else trial.repeat)
        rows.requests.append(requests)
    return load_checks(step, numbers, requests)


def _load_numbers(
    step: LoadStep, requests: pd.DataFrame, deltas: tuple[prom.CounterDelta, ...], *, pool_tokens: float
) -> dict[str, float]:
    def counted(name: str) -> float:
        return prom.total(deltas, f"sglang:{name}", default=0.0)

    prompt, cached = counted("prompt_tokens_total"), counted("cached_tokens_total")
    tokens = requests["prompt_tokens"].astype(float)
    predicted = (tokens * requests["predicted_share"].astype(float)).sum() / max(1.0, tokens.sum())
    lru_rate = (tokens * requests["lru_share"].astype(float)).sum() / max(1.0, tokens.sum())
    hit_rate = cached / prompt if prompt else 0.0
    again = requests[requests["group_order"] > 0]
    half = LOST_SHARE * again["predicted_share"].astype(float)
    agree = (again["cached_share"] >= half) == (again["lru_share"] >= half)
    return {
        "requests": float(step.requests),
        "succeeded": float(requests["success"].sum()),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "generated_tokens": counted("generation_tokens_total"),
        "evicted_tokens": counted("evicted_tokens_total"),
        "retracted_requests": counted("num_retracted_requests_total"),
        "pool_tokens": pool_tokens,
        "working_set_tokens": float(step.working_set_tokens),
        "hit_rate": hit_rate,
        "predicted_hit_rate": float(predicted),
        "hit_rate_lost": float(predicted) - hit_rate,
        "lru_hit_rate": float(lru_rate),
        "lru_agreement": float(agree.mean()) if len(again) else float("nan"),
        "groups": float(requests["group"].nunique()),
        "groups_evicted": float(requests.loc[lost(requests), "group"].nunique()),
    }


def _lru_share(requests: pd.DataFrame, *, pool_tokens: int) -> pd.Series[float]:
    """The cached share that a least-recently-used cache of the pool's size must show, by request."""
    columns = ["group", "group_order", "prompt_tokens", "completion_tokens", "predicted_share"]
    rows = requests[columns].astype(float)
    if rows.isna().any(
        axis=None
    ):  # a request that failed or was not matched: the order of accesses is not known
        return pd.Series(float("nan"), index=requests.index)
    shared = (rows["predicted_share"] * rows["prompt_tokens"]).where(rows["group_order"] > 0)
    prefix = shared.groupby(rows["group"]).transform("median").fillna(rows["prompt_tokens"])
    found = lru.predict(
        rows["group"].astype(int).tolist(),
        rows["prompt_tokens"].astype(int).tolist(),
        prefix.astype(int).tolist(),
        rows["completion_tokens"].astype(int).tolist(),
        pool_tokens=pool_tokens,
    )
    return pd.Series(found, index=requests.index, dtype=float) / rows["prompt_tokens"]


def lost(requests: pd.DataFrame) -> pd.Series[bool]:
    """Requests whose prefix had been computed before and was not found again."""
    share, predicted = requests["cached_share"].astype(float), requests["predicted_share"].astype(float)
    return (requests["group_order"] > 0) & (share < LOST_SHARE * predicted)


def _groups(requests: pd.DataFrame) -> pd.DataFrame:
    """One row a prefix group that was asked for more than once: how often it was found and lost."""
    columns = ["trial", "variant", "load", "group", "requests", "found_again", "evicted", "lost_at"]
    if requests.empty:
        return pd.DataFrame(columns=columns)
    rows: list[Row] = []
    marked = requests.assign(lost=lost(requests))
    for (trial, variant, load, group), part in marked.groupby(["trial", "variant", "load", "group"]):
        if len(part) < 2:
            continue
        at = [str(int(n)) for n in part.loc[part["lost"], "order"]]
        rows.append(
            {
                "trial": trial,
                "variant": variant,
                "load": load,
                "group": int(group),
                "requests": len(part),
                "found_again": len(part) - 1 - len(at),
                "evicted": len(at),
                "lost_at": " ".join(at),
            }
        )
    return pd.DataFrame(rows, columns=columns)


def _batches(trial: Trial, files: TrialFiles, log: serverlog.LogRecords, rows: Rows) -> None:
    """The server's batch lines, each with the load in whose time it was printed."""
    windows = []
    for step in trial.loads:
        status = read_json(files.load(step.name).status)
        windows.append((step.name, float(str(status["started"])), float(str(status["ended"]))))
    for batch in log.batches:
        at = pd.Timestamp(batch.time).timestamp()
        load = next((name for name, start, end in windows if start <= at <= end + 0.001), "")
        rows.batches.append({"trial": trial.name, "load": load, **batch._asdict()})


def load_table(run: Run, name: str) -> pd.DataFrame:
    """A table read back from its CSV."""
    return pd.read_csv(Path(run.tables) / f"{name}.csv")
