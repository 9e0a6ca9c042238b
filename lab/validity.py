"""May a trial be used? Checks of one load against the plan, the server's own account and the prediction.

Each check is a row (name, ok, detail) of tables/checks.csv. One that fails makes the trial invalid, and an
invalid trial never reaches a verdict. Whether a claim holds is not asked here."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lab.plan import LoadStep

HIT_RATE_TOLERANCE = 0.03
COUNTER_TOLERANCE = 0.01
CLIENT_SHARE = (
    0.25  # of the server's own TTFT that client and connection may add before they are the bottleneck
)
CLIENT_FLOOR_MS = 15.0
RATE_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question about a trial, its answer, and the numbers behind it."""

    name: str
    ok: bool
    detail: str


def server_arguments(argv: tuple[str, ...], info: dict[str, object]) -> Check:
    """Compare every `--flag value` of the server's command with what /server_info says is in force."""
    wrong = []
    asked = 0
    for flag, value in flags(argv):
        key = flag.removeprefix("--").replace("-", "_")
        asked += 1
        if key not in info:
            wrong.append(f"{flag} is not reported")
        elif not _same(info[key], value):
            wrong.append(f"{flag} is {info[key]!r}, planned {value!r}")
    return Check(
        name="server arguments",
        ok=not wrong,
        detail="; ".join(wrong) or f"{asked} arguments read back as planned",
    )


def flags(argv: tuple[str, ...]) -> list[tuple[str, str]]:
    """The `--flag value` pairs of a command, the last of each flag; a flag without a value has the value "True"."""
    pairs: dict[str, str] = {}
    for i, word in enumerate(argv):
        if word.startswith("--"):
            value = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else "True"
            pairs[word] = value
    return list(pairs.items())


def _same(found: object, planned: str) -> bool:
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        try:
            return float(planned) == float(found)
        except ValueError:
            return False
    return str(found) == planned


def load_checks(step: LoadStep, load: dict[str, float], requests: pd.DataFrame) -> list[Check]:
    """All checks of one load: `load` is its row of the table `loads`, `requests` its rows of `requests`."""
    checks = [_complete(step, requests), _joined(requests)]
    if len(requests):
        checks += [
            _counters(load, requests),
            _cold(requests),
            _hit_rate(step, load),
            _client(requests),
        ]
        if step.output_tokens is not None:
            checks.append(_full_length(step.output_tokens, requests))
        if step.rate_per_s is not None:
            checks.append(_rate(step, requests))
    return checks


def _complete(step: LoadStep, requests: pd.DataFrame) -> Check:
    good = int(requests["success"].sum()) if len(requests) else 0
    errors = sorted({str(e) for e in requests["error"] if e}) if len(requests) else []
    detail = f"{good} of {step.requests} requests succeeded"
    return Check(
        name="every request succeeded",
        ok=good == step.requests == len(requests),
        detail=detail + (f"; first error: {errors[0][:200]}" if errors else ""),
    )


def _full_length(asked: int, requests: pd.DataFrame) -> Check:
    """SGLang cuts an answer short without an error when prompt and answer do not fit the KV cache."""
    short = requests.loc[requests["success"] & (requests["completion_tokens"] != asked), "completion_tokens"]
    detail = f"all answers have the {asked} tokens that were asked for"
    if len(short):
        detail = f"{len(short)} of {len(requests)} answers do not have the {asked} tokens asked for, one has {short.iloc[0]:.0f}"
    return Check(name="answers have their full length", ok=short.empty, detail=detail)


def _joined(requests: pd.DataFrame) -> Check:
    missing = int((requests["joined"] == "no").sum()) if len(requests) else 0
    how = ", ".join(sorted(set(requests["joined"]))) if len(requests) else "nothing to join"
    return Check(
        name="client and server agree on the requests",
        ok=len(requests) > 0 and missing == 0,
        detail=f"{len(requests) - missing} of {len(requests)} matched by {how}",
    )


def _counters(load: dict[str, float], requests: pd.DataFrame) -> Check:
    """The Prometheus counters' differences against the sums over the requests' own records."""
    wrong = []
    for column in ("prompt_tokens", "cached_tokens"):
        counted, summed = load[column], float(requests[column].sum())
        if not abs(counted - summed) <= COUNTER_TOLERANCE * max(1.0, summed):
            wrong.append(f"{column}: counter {counted:.0f}, requests {summed:.0f}")
    return Check(
        name="counters fit the requests",
        ok=not wrong,
        detail="; ".join(wrong)
        or f"{load['prompt_tokens']:.0f} prompt and {load['cached_tokens']:.0f} cached tokens both ways",
    )


def _cold(requests: pd.DataFrame) -> Check:
    """The plan starts every load from a flushed cache: a group's first request must find next to nothing. One that was
    retracted finds its own prompt when it comes back, and is left out."""
    first = requests[(requests["group_order"] == 0) & ~(requests["retractions"] > 0)]
    worst = float(first["cached_share"].max()) if len(first) else 0.0
    return Check(
        name="cache was cold",
        ok=worst <= HIT_RATE_TOLERANCE,
        detail=f"first requests of {len(first)} groups had at most {worst:.1%} of their prompt cached",
    )


def _hit_rate(step: LoadStep, load: dict[str, float]) -> Check:
    """Observed against predicted. One request at a time, the order of cache accesses is known: the prediction is
    what an LRU cache of the pool's size must show, if the server evicts so. With more in flight, a request cannot find
    what another one is just computing, and what an unbounded cache would show is only an upper bound."""
    known = step.one_by_one and step.eviction == "lru"
    observed, predicted = load["hit_rate"], load["lru_hit_rate" if known else "predicted_hit_rate"]
    ok = observed <= predicted + HIT_RATE_TOLERANCE
    if known:
        ok = ok and observed >= predicted - HIT_RATE_TOLERANCE
    word = "" if known else "at most "
    return Check(
        name="hit rate fits the workload",
        ok=bool(ok),
        detail=f"observed {observed:.3f}, predicted {word}{predicted:.3f} (planned lengths: {step.hit_rate:.3f})",
    )


def _client(requests: pd.DataFrame) -> Check:
    """What the client measured beyond the server's own time to first token is the client's and the wire's."""
    name = "client was not the bottleneck"
    known = requests.loc[requests["server_ttft_ms"].notna(), ["ttft_ms", "server_ttft_ms"]]
    if known.empty:
        return _client_over_all(name, requests)
    extra = (known["ttft_ms"] - known["server_ttft_ms"]).median()
    allowed = max(CLIENT_FLOOR_MS, CLIENT_SHARE * float(known["server_ttft_ms"].median()))
    return Check(
        name=name,
        ok=bool(extra <= allowed),
        detail=f"client adds a median of {extra:.1f} ms to the server's time to first token, allowed {allowed:.1f} ms",
    )


def _client_over_all(name: str, requests: pd.DataFrame) -> Check:
    """The same where the server has no time to first token of a request: what the client measured beyond the server's
    own time for the whole request, against the time to first token that the client saw."""
    if "server_e2e_ms" not in requests or requests["server_e2e_ms"].isna().all():
        return Check(name=name, ok=False, detail="the server's own time of a request is not known")
    extra = (requests["e2e_ms"] - requests["server_e2e_ms"]).median()
    allowed = max(CLIENT_FLOOR_MS, CLIENT_SHARE * float(requests["ttft_ms"].median()))
    return Check(
        name=name,
        ok=bool(extra <= allowed),
        detail=f"client adds a median of {extra:.1f} ms to the server's time for the whole request, allowed {allowed:.1f} ms "
        "(this server has no time to first token of a request)",
    )


def _rate(step: LoadStep, requests: pd.DataFrame) -> Check:
    """Open loop: requests must have arrived, by the server's clock, at the rate that was asked for.

    A Poisson process of n arrivals has a spread of 1/sqrt(n) around its rate; three times that is allowed.
    """
    span = float(requests["received_s"].max() - requests["received_s"].min())
    arrived = (len(requests) - 1) / span if span > 0 else float("inf")
    asked = step.rate_per_s or 0.0
    allowed = RATE_TOLERANCE + 3 / max(1.0, (len(requests) - 1) ** 0.5)
    return Check(
        name="client kept its rate",
        ok=arrived >= asked * (1 - allowed),
        detail=f"asked for {asked:g} requests/s, {arrived:.2f} arrived by the server's clock",
    )
