"""A run's raw files as tidy tables, one CSV each under tables/: trials, loads, requests, batches, metrics,
forwards, groups, checks. Reads only the run directory; the same raw files always give the same tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from lab.dialect import Dialect, dialect_of
from lab.errors import LabError
from lab.forwards import FORWARD_COLUMNS, load_of
from lab.gpurows import COLUMNS as GPU_COLUMNS
from lab.gpurows import machine_of, read_gpus
from lab.hardware.model import Hardware
from lab.loads import KEYS, LOAD_COLUMNS, METRIC_COLUMNS, Row, group_table, keys_of, read_load
from lab.plan import Plan, Trial, read_plan
from lab.probed import read_probe
from lab.read import serverlog
from lab.read.requestecho import Echo, Tokens, read_echo
from lab.read.requestlog import COLUMNS
from lab.read.serverrecords import read_export
from lab.rundir import Run, TrialFiles, read_json
from lab.validity import Check, load_checks, server_arguments

TABLES = ("trials", "loads", "requests", "batches", "forwards", "metrics", "groups", "checks")
DECIMALS = 6  # of every number in a CSV; a millisecond to the nanosecond, a share to a millionth


@dataclass
class Rows:
    """What the trials add to the tables."""

    trials: list[Row] = field(default_factory=list)
    loads: list[Row] = field(default_factory=list)
    requests: list[pd.DataFrame] = field(default_factory=list)
    batches: list[pd.DataFrame] = field(default_factory=list)
    forwards: list[pd.DataFrame] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)
    gpus: list[Row] = field(default_factory=list)

    def add(self, other: Rows) -> None:
        for name in ("trials", "loads", "requests", "batches", "forwards", "metrics", "checks", "gpus"):
            getattr(self, name).extend(getattr(other, name))


def tabulate(run: Run) -> dict[str, pd.DataFrame]:
    """Make every table of the run and write it; returns them by name."""
    rows = Rows()
    machine = machine_of(run)
    plan = read_plan(run)
    dialect = dialect_of(plan.sglang)
    for trial in plan.trials:
        rows.add(_trial(run, trial, plan=plan, machine=machine, dialect=dialect))
    requests = _joined(rows.requests, columns=(*KEYS, *COLUMNS))
    usable = [str(row["trial"]) for row in rows.trials if row["validity"] == "valid"]
    requests = same_answers(requests, reference=plan.variants[:1], usable=usable)
    tables = {
        "trials": pd.DataFrame(rows.trials),
        "loads": pd.DataFrame(rows.loads, columns=list(LOAD_COLUMNS)),
        "requests": requests,
        "batches": _joined(rows.batches, columns=("trial", "load", *serverlog.BATCH_COLUMNS)),
        "forwards": _joined(rows.forwards, columns=(*KEYS, *FORWARD_COLUMNS)),
        "metrics": pd.DataFrame(rows.metrics, columns=list(METRIC_COLUMNS)),
        "groups": group_table(requests),
        "checks": pd.DataFrame(rows.checks, columns=["trial", "load", "name", "ok", "detail"]),
    }
    if rows.gpus:  # a run without GPUs has no such table
        tables["gpus"] = pd.DataFrame(rows.gpus, columns=list(GPU_COLUMNS))
    run.tables.mkdir(exist_ok=True)
    for name, table in tables.items():
        _write(table, run, name)
    return tables


def load_table(run: Run, name: str) -> pd.DataFrame:
    """A table read back from its CSV."""
    return pd.read_csv(run.tables / f"{name}.csv")


def _joined(frames: list[pd.DataFrame], *, columns: tuple[str, ...]) -> pd.DataFrame:
    if not frames:
        return pd.DataFrame(columns=list(columns))
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def _write(table: pd.DataFrame, run: Run, name: str) -> None:
    """As CSV by Arrow, which writes a million rows in a second where pandas takes half a minute.

    Column by column, so that only one column at a time is in memory twice.
    """
    arrays = []
    for column in table.columns:
        values = table[column]
        if values.dtype == np.float64:
            values = values.round(DECIMALS)
        elif values.dtype == object and pd.api.types.infer_dtype(values) != "string":
            values = values.where(values.notna(), None).map(_text)
        arrays.append(pa.Array.from_pandas(values))
    with (run.tables / f"{name}.csv").open("wb") as file:
        csv.write_csv(
            pa.table(arrays, names=[str(c) for c in table.columns]),
            file,
            write_options=csv.WriteOptions(quoting_style="needed"),
        )


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else str(value)


def same_answers(
    requests: pd.DataFrame, *, reference: tuple[str, ...], usable: Collection[str]
) -> pd.DataFrame:
    """The requests with `same_answer` in place of `text`: 1 where the answer is that of the same request (repeat, load,
    order sent) to the reference variant in a `usable` trial, else 0; empty for the reference itself and without such."""
    if "text" not in requests.columns:
        return requests
    keys = ["repeat", "load", "order"]
    own = requests["variant"].isin(reference)
    wanted = requests[own & requests["trial"].isin(usable)].set_index(keys)["text"]
    asked = wanted.reindex(pd.MultiIndex.from_frame(requests[keys])).to_numpy()
    same = pd.Series(requests["text"].to_numpy() == asked, index=requests.index).astype(float)
    return requests.drop(columns="text").assign(same_answer=same.where(~own & pd.notna(asked)))


def _trial(run: Run, trial: Trial, *, plan: Plan, machine: Hardware | None, dialect: Dialect) -> Rows:
    """All rows of a trial. One that failed half-way keeps what can be read."""
    files = run.trial(trial.name)
    row: Row = {"trial": trial.name, "variant": trial.variant, "repeat": trial.repeat}
    if not files.status.exists():
        return Rows(trials=[row | _state("not run", "not run", "the run ended before it")])
    status = read_json(files.status)
    row["ready_s"] = status.get("ready_s")
    if status.get("status") != "ok":
        reason = f"{status.get('phase')}: {status.get('reason')}"
        if status.get("status") == "running":
            reason = f"{status.get('phase')}: the lab was killed during this trial"
        return Rows(trials=[row | _state("failed", "failed", reason)])
    try:
        rows, state = _measured(trial, files, status, plan=plan, machine=machine, dialect=dialect)
    except LabError as error:  # a file that cannot be read costs its trial, not the report on the others
        what = error.problem.replace(f"{run.path}/", "")
        return Rows(trials=[row | _state("ok", "invalid", what) | {"unreadable": what}])
    rows.trials.append(row | state)
    return rows


def _measured(
    trial: Trial,
    files: TrialFiles,
    status: dict[str, object],
    *,
    plan: Plan,
    machine: Hardware | None,
    dialect: Dialect,
) -> tuple[Rows, Row]:
    """The rows of a trial that ran to its end, and its state for the table of trials."""
    rows = Rows()
    info = read_json(files.server_info).get("server_info")
    info = info if isinstance(info, dict) else {}
    pool = info.get("max_total_num_tokens")
    checks = [("", server_arguments(_resolved(trial, status), info))]
    log = serverlog.read(files.server_log)
    windows = {step.name: _window(files, step.name) for step in trial.loads}
    said = _server_records(trial, files, windows, dialect=dialect)
    probed = read_probe(files, _served(said.frames, windows), level=plan.probe)
    passes, followed = probed.forwards(), probed.requests()
    answers = any(claim.measure.column == "same_answer" for claim in plan.claims)
    unread = [*said.unread, *probed.notes]
    tokens: dict[str, float] = {}
    for step in trial.loads:
        start, end = windows[step.name]
        load = read_load(
            trial,
            step,
            files.load(step.name),
            server=_followed(said.frames[step.name], followed),
            pool_tokens=float(pool) if isinstance(pool, (int, float)) else float("nan"),
            duration_s=end - start,
            dialect=dialect,
            apart=said.apart.get(step.name, Tokens()),
            logged_retractions=_retractions(log, windows[step.name]),
            answers=answers,
        )
        if plan.probe != "off":
            checks.append((step.name, probed.fits(step.name, load.numbers)))
        policy = str(info.get("schedule_policy", ""))
        probed.complete(load.numbers, load=step.name, passes=passes, asked_policy=policy)
        rows.loads.append({**keys_of(trial, step), **load.numbers})
        rows.metrics += load.metrics
        tokens[step.name] = float(load.requests["completion_tokens"].sum()) if len(load.requests) else 0.0
        if len(load.requests):
            rows.requests.append(load.requests)
        unread += load.notes
        checks += [(step.name, check) for check in load_checks(step, load.numbers, load.requests)]
    if plan.probe != "off":
        checks.append(("", probed.in_use()))
    rows.forwards.append(_with_keys(passes.drop(columns="worked"), trial))
    rows.batches.append(_batches(trial, log, windows))
    seen, found, problems = read_gpus(trial, files, status, windows=windows, tokens=tokens, machine=machine)
    rows.gpus += seen
    checks += [("", check) for check in found]
    unread += problems
    if log.crashes():
        checks.append(("", Check(name="server did not crash", ok=False, detail=str(log.crashes()[0].values))))
    unread += [f"server.log line {u.line}: {u.reason}" for u in log.unreadable]
    rows.checks += [{"trial": trial.name, "load": load, **asdict(check)} for load, check in checks]
    bad = [f"{load + ': ' if load else ''}{c.name}: {c.detail}" for load, c in checks if not c.ok]
    state = _state("ok", "invalid" if bad else "valid", "; ".join(bad))
    return rows, state | {"log_lines": log.lines, "unreadable": "; ".join(unread[:20])}


def _served(
    frames: Mapping[str, pd.DataFrame], windows: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Each load's time as the server saw it: from its first request to the next load's start."""
    names = sorted(windows, key=lambda name: windows[name][0])
    nexts = [*(windows[name][0] for name in names[1:]), float("inf")]
    return {
        name: (float(frames[name]["received"].min()) if len(frames[name]) else windows[name][0], end)
        for name, end in zip(names, nexts, strict=True)
    }


def _followed(server: pd.DataFrame, followed: pd.DataFrame | None) -> pd.DataFrame:
    """The server's records with what the probe saw of each request."""
    if followed is None or followed.empty:
        return server
    return server.merge(followed, on="rid", how="left")


def _with_keys(passes: pd.DataFrame, trial: Trial) -> pd.DataFrame:
    """Rows of one trial with `KEYS` in front."""
    roles = {step.name: step.role for step in trial.loads}
    said = passes.assign(trial=trial.name, variant=trial.variant, repeat=trial.repeat)
    return said.assign(role=passes["load"].map(roles))[[*KEYS, *FORWARD_COLUMNS]]


def _server_records(
    trial: Trial, files: TrialFiles, windows: dict[str, tuple[float, float]], *, dialect: Dialect
) -> Echo:
    """What the server says of each request, from where the release says it."""
    if dialect.records == "log":
        extra = {step.name: dialect.extra_requests(step.dataset) for step in trial.loads}
        return read_echo(files.server_log, windows, extra=extra)
    frames, unread = read_export(files.export, windows)
    return Echo(frames=frames, apart={}, unread=unread)


def _state(status: str, validity: str, reason: str) -> Row:
    return {"status": status, "validity": validity, "reason": reason}


def _window(files: TrialFiles, load: str) -> tuple[float, float]:
    status = read_json(files.load(load).status)
    return float(str(status["started"])), float(str(status["ended"]))


def _resolved(trial: Trial, status: dict[str, object]) -> tuple[str, ...]:
    """The planned server arguments that name no place of the machine; the port is the one that was used."""
    words: list[str] = []
    argv = trial.server.argv
    for i, word in enumerate(argv):
        if "${" in word or (i + 1 < len(argv) and word.startswith("--") and "${" in argv[i + 1]):
            if word == "--port":
                words += ["--port", str(status.get("listens", status.get("port")))]
            continue
        words.append(word)
    return tuple(words)


def _batches(
    trial: Trial, log: serverlog.LogRecords, windows: dict[str, tuple[float, float]]
) -> pd.DataFrame:
    """The server's batch lines, each with the load in whose time it was printed."""
    frame = pd.DataFrame(log.batches, columns=list(serverlog.BATCH_COLUMNS))
    times = _seconds(frame["time"])
    # Printed to the millisecond.
    frame.insert(
        0, "load", load_of(times, {name: (start, end + 0.001) for name, (start, end) in windows.items()})
    )
    frame.insert(0, "trial", trial.name)
    return frame


def _seconds(printed: pd.Series[str]) -> pd.Series[float]:
    """Times of the server's log as Unix times; its clock is UTC."""
    return pd.to_datetime(printed).astype("datetime64[ns]").astype("int64") / 1e9


def _retractions(log: serverlog.LogRecords, window: tuple[float, float]) -> float:
    """Requests that were retracted in this time; every rank prints its own line, so those of the first are counted."""
    lines = pd.DataFrame(log.retractions, columns=list(serverlog.RETRACTION_COLUMNS))
    times = _seconds(lines["time"])
    lines = lines[(times >= window[0]) & (times <= window[1] + 0.001)]
    return float(lines.loc[lines["rank"] == lines["rank"].min(), "retracted_reqs"].sum())
