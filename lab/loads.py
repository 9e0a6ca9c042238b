"""One load of a trial: its requests, joined, and its numbers (a row of the table `loads`), from raw files."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lab import lru
from lab.dialect import Dialect
from lab.forwards import number_columns, order_numbers
from lab.plan import LoadStep, Trial
from lab.read import prom
from lab.read.requestecho import Tokens
from lab.read.requestlog import COLUMNS, client_frame, join
from lab.rundir import LoadFiles

LOST_SHARE = 0.5  # a prefix is called evicted when less than this of what was predicted is found again
KEYS = ("trial", "variant", "repeat", "load", "role")

LOAD_COLUMNS = (
    *KEYS,
    *("requests", "succeeded", "duration_s"),
    *("prompt_tokens", "cached_tokens", "generated_tokens", "evicted_tokens", "retracted_requests"),
    *("pool_tokens", "working_set_tokens", "hit_rate", "predicted_hit_rate", "hit_rate_lost"),
    *("lru_hit_rate", "lru_agreement", "groups", "groups_evicted"),
    *("output_tokens_per_s", "total_tokens_per_s", "requests_per_s"),
    *number_columns(),
)
METRIC_COLUMNS = ("trial", "load", "name", "labels", "delta", "state")
GROUP_COLUMNS = ("trial", "variant", "load", "group", "requests", "found_again", "evicted", "lost_at")

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class LoadTables:
    """What a load adds to the tables. `requests` has `KEYS` and then the columns of `requestlog`."""

    numbers: dict[str, float]
    requests: pd.DataFrame
    metrics: list[Row]
    notes: list[str]


def keys_of(trial: Trial, step: LoadStep) -> dict[str, object]:
    """What a row of `loads` or `requests` begins with."""
    values = (trial.name, trial.variant, trial.repeat, step.name, step.role)
    return dict(zip(KEYS, values, strict=True))


def read_load(
    trial: Trial,
    step: LoadStep,
    files: LoadFiles,
    *,
    server: pd.DataFrame,
    pool_tokens: float,
    duration_s: float,
    dialect: Dialect,
    logged_retractions: float,
    apart: Tokens,
    answers: bool = False,
) -> LoadTables:
    """Join what client and server say of the load's requests, add the predictions, count.

    `server` are the server's records of the load (`serverrecords`), `pool_tokens` its KV slots; `logged_retractions`
    count where the release has no counter of them, `apart` is what the counters hold of other requests. With `answers`
    the requests have a column `text`.
    """
    client, notes = client_frame(files, dataset=step.dataset, answers=answers or dialect.records == "log")
    requests = join(client, server) if len(client) else pd.DataFrame(columns=list(COLUMNS))
    if not answers:
        requests = requests.drop(columns="text", errors="ignore")
    if step.hit_rate == 0:  # no cache, or nothing planned to share: nothing is predicted, whatever is alike
        requests["predicted_share"] = requests["lru_share"] = 0.0
    elif pool_tokens < step.working_set_tokens:  # with several in flight the order of accesses is not known
        known = step.one_by_one
        requests["lru_share"] = _lru_share(requests, pool_tokens=int(pool_tokens)) if known else float("nan")
    deltas = prom.difference(prom.read(files.before), prom.read(files.after))
    numbers = _numbers(step, requests, deltas, pool_tokens=pool_tokens, dialect=dialect, apart=apart)
    numbers |= {"duration_s": duration_s, **_rates(requests, numbers), **order_numbers(requests)}
    if not dialect.retracted_total:
        numbers["retracted_requests"] = logged_retractions
    for place, (name, value) in enumerate(keys_of(trial, step).items()):
        requests.insert(place, name, trial.repeat if name == "repeat" else str(value))
    return LoadTables(
        numbers=numbers,
        requests=requests,
        metrics=[_metric(trial, step, delta) for delta in deltas if delta.delta != 0],
        notes=[f"{step.name}: {text}" for text in notes],
    )


def _metric(trial: Trial, step: LoadStep, delta: prom.CounterDelta) -> Row:
    labels = ",".join(f"{k}={v}" for k, v in delta.labels if k != "model_name")
    values = (trial.name, step.name, delta.name, labels, delta.delta, delta.state)
    return dict(zip(METRIC_COLUMNS, values, strict=True))


def _numbers(
    step: LoadStep,
    requests: pd.DataFrame,
    deltas: tuple[prom.CounterDelta, ...],
    *,
    pool_tokens: float,
    dialect: Dialect,
    apart: Tokens,
) -> dict[str, float]:
    def counted(name: str) -> float:
        """A counter that the release has and has not used yet is 0; one that it does not have is no number."""
        return prom.total(deltas, f"sglang:{name}", default=0.0) if name else float("nan")

    prompt = counted(dialect.prompt_total) - apart.prompt
    cached = counted(dialect.cached_total) - apart.cached
    tokens = requests["prompt_tokens"].astype(float)
    predicted = (tokens * requests["predicted_share"].astype(float)).sum() / max(1.0, tokens.sum())
    lru_share = requests["lru_share"].astype(float)
    lru_known = bool(lru_share.notna().all())
    lru_rate = (tokens * lru_share).sum() / max(1.0, tokens.sum()) if lru_known else float("nan")
    hit_rate = cached / prompt if prompt else 0.0
    again = requests.loc[requests["group_order"] > 0, ["cached_share", "predicted_share", "lru_share"]]
    half = LOST_SHARE * again["predicted_share"].astype(float)
    agree = (again["cached_share"] >= half) == (again["lru_share"] >= half)
    return {
        "requests": float(step.requests),
        "succeeded": float(requests["success"].sum()),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "generated_tokens": counted(dialect.generated_total) - apart.generated,
        "evicted_tokens": counted(dialect.evicted_total),
        "retracted_requests": counted(dialect.retracted_total),
        "pool_tokens": pool_tokens,
        "working_set_tokens": float(step.working_set_tokens),
        "hit_rate": hit_rate,
        "predicted_hit_rate": float(predicted),
        "hit_rate_lost": float(predicted) - hit_rate,
        "lru_hit_rate": float(lru_rate),
        "lru_agreement": float(agree.mean()) if len(again) and lru_known else float("nan"),
        "groups": float(requests["group"].nunique()),
        "groups_evicted": float(requests.loc[lost(requests), "group"].nunique()),
    }


def _rates(requests: pd.DataFrame, numbers: dict[str, float]) -> dict[str, float]:
    """Throughput from the first request's arrival to the last one's end; tokens as the server counted them."""
    ends = requests["received_s"].astype(float) + requests["e2e_ms"].astype(float) / 1000
    span = float(ends.max()) if len(requests) else float("nan")
    if not span > 0:
        return {}
    prompt, output = numbers["prompt_tokens"], numbers["generated_tokens"]
    return {
        "output_tokens_per_s": output / span,
        "total_tokens_per_s": (prompt + output) / span,
        "requests_per_s": len(requests) / span,
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


def group_table(requests: pd.DataFrame) -> pd.DataFrame:
    """One row a prefix group that was asked for more than once: how often it was found and lost."""
    keys = ["trial", "variant", "load", "group"]
    if requests.empty:
        return pd.DataFrame(columns=list(GROUP_COLUMNS))
    marked = requests[[*keys, "order"]].assign(lost=lost(requests))
    sizes = marked.groupby(keys, sort=False)["order"].transform("size")
    rows: list[Row] = []
    for (trial, variant, load, group), part in marked[sizes > 1].groupby(keys):
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
    return pd.DataFrame(rows, columns=list(GROUP_COLUMNS))
