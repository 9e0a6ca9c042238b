"""May a trial be used: each check with numbers just inside and just outside what it allows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lab.plan import LoadStep
from lab.validity import (
    CLIENT_FLOOR_MS,
    CLIENT_SHARE,
    HIT_RATE_TOLERANCE,
    Check,
    flags,
    load_checks,
    server_arguments,
)

STEP = LoadStep(
    name="load",
    dataset="generated-shared-prefix",
    role="measure",
    argv=(),
    requests=4,
    concurrency=1,
    rate_per_s=None,
    hit_rate=0.6,
    working_set_tokens=1000,
    output_tokens=16,
)


def requests(count: int = 4) -> pd.DataFrame:
    """One group of `count` requests of 100 tokens, 80 of them cached from the second on, one a second."""
    later = np.arange(count) > 0
    cached = np.where(later, 80.0, 0.0)
    return pd.DataFrame(
        {
            "group": 0,
            "group_order": np.arange(count),
            "retractions": 0,
            "service_order": np.nan,
            "prompt_tokens": 100.0,
            "completion_tokens": 16.0,
            "cached_tokens": cached,
            "cached_share": cached / 100,
            "ttft_ms": 52.0,
            "server_ttft_ms": 50.0,
            "received_s": np.arange(count, dtype=float),
            "success": True,
            "error": "",
            "joined": "order",
        }
    )


def load(**changes: float) -> dict[str, float]:
    numbers = {
        "prompt_tokens": 400.0,
        "cached_tokens": 240.0,
        "hit_rate": 0.6,
        "predicted_hit_rate": 0.6,
        "lru_hit_rate": 0.6,
        "pool_tokens": 4096.0,
    }
    return {**numbers, **changes}


def check(
    name: str, rows: pd.DataFrame, *, step: LoadStep = STEP, numbers: dict[str, float] | None = None
) -> Check:
    (found,) = [c for c in load_checks(step, numbers or load(), rows) if c.name == name]
    assert found.detail
    return found


def test_a_good_load_passes_every_check() -> None:
    found = load_checks(STEP, load(), requests())
    assert [c.name for c in found if not c.ok] == []
    assert len({c.name for c in found}) == len(found) >= 6


# ---- every request succeeded, both sides agree


def test_a_failed_request_is_named() -> None:
    rows = requests()
    rows.loc[2, ["success", "error"]] = [False, "TimeoutError: too slow"]
    found = check("every request succeeded", rows)
    assert not found.ok
    assert found.detail == "3 of 4 requests succeeded; first error: TimeoutError: too slow"


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_request_too_few_or_too_many(count: int) -> None:
    assert not check("every request succeeded", requests(count)).ok


def test_a_request_the_server_does_not_know() -> None:
    rows = requests()
    rows.loc[1, "joined"] = "no"
    assert not check("client and server agree on the requests", rows).ok
    assert not check("client and server agree on the requests", requests(0)).ok


def test_a_load_of_which_nothing_is_known_fails_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    rows = requests().assign(joined="no", server_ttft_ms=np.nan, received_s=np.nan)
    found = {c.name: c.ok for c in load_checks(STEP, load(), rows)}
    assert not found["client and server agree on the requests"]
    assert not found["client was not the bottleneck"]
    assert not recwarn.list


def test_an_answer_cut_short() -> None:
    rows = requests()
    rows.loc[2, "completion_tokens"] = 9.0
    found = check("answers have their full length", rows)
    assert not found.ok
    assert found.detail == "1 of 4 answers do not have the 16 tokens asked for, one has 9"
    rows.loc[2, "success"] = False  # then another check speaks of it
    assert check("answers have their full length", rows).ok
    older = replace(STEP, output_tokens=None)
    assert "answers have their full length" not in {c.name for c in load_checks(older, load(), rows)}


# ---- counters, cache state, hit rate


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"prompt_tokens": 404.0}, True),
        ({"prompt_tokens": 405.0}, False),
        ({"prompt_tokens": 395.0}, False),
        ({"cached_tokens": 0.0}, False),
        ({"cached_tokens": float("nan")}, False),
    ],
)
def test_counters_against_requests(changes: dict[str, float], ok: bool) -> None:
    assert check("counters fit the requests", requests(), numbers=load(**changes)).ok is ok


@pytest.mark.parametrize(("cached", "ok"), [(0, True), (3, True), (4, False), (100, False)])
def test_the_cache_was_cold(cached: int, ok: bool) -> None:
    rows = requests()
    rows.loc[0, "cached_share"] = cached / 100
    assert check("cache was cold", rows).ok is ok


INSIDE, OUTSIDE = HIT_RATE_TOLERANCE - 0.001, HIT_RATE_TOLERANCE + 0.001


@pytest.mark.parametrize(
    ("observed", "ok"),
    [(0.6 + INSIDE, True), (0.6 - INSIDE, True), (0.6 + OUTSIDE, False), (0.6 - OUTSIDE, False)],
)
def test_one_at_a_time_the_hit_rate_is_known_both_ways(observed: float, ok: bool) -> None:
    """What an LRU cache of the pool's size would show, not what an unbounded one would."""
    numbers = load(hit_rate=observed, predicted_hit_rate=0.9)
    assert check("hit rate fits the workload", requests(), numbers=numbers).ok is ok


@pytest.mark.parametrize("step", [replace(STEP, concurrency=4), replace(STEP, rate_per_s=0.9)])
def test_with_more_in_flight_the_prediction_is_an_upper_bound(step: LoadStep) -> None:
    name = "hit rate fits the workload"
    assert check(name, requests(), step=step, numbers=load(hit_rate=0.1)).ok
    assert not check(name, requests(), step=step, numbers=load(hit_rate=0.6 + OUTSIDE)).ok


def test_a_hit_rate_that_is_not_a_number_is_no_pass() -> None:
    assert not check("hit rate fits the workload", requests(), numbers=load(hit_rate=float("nan"))).ok


# ---- the client


@pytest.mark.parametrize(("server_ms", "allowed"), [(10.0, CLIENT_FLOOR_MS), (1000.0, 1000.0 * CLIENT_SHARE)])
def test_the_client_may_add_a_share_or_a_floor(server_ms: float, allowed: float) -> None:
    name = "client was not the bottleneck"
    slow = requests().assign(server_ttft_ms=server_ms)
    assert check(name, slow.assign(ttft_ms=server_ms + allowed - 0.1)).ok
    assert not check(name, slow.assign(ttft_ms=server_ms + allowed + 0.1)).ok


def test_one_slow_request_is_not_a_slow_client() -> None:
    rows = requests()
    rows.loc[0, "ttft_ms"] = 9999.0
    assert check("client was not the bottleneck", rows).ok


@pytest.mark.parametrize(("ttft_ms", "allowed"), [(20.0, CLIENT_FLOOR_MS), (400.0, 400.0 * CLIENT_SHARE)])
def test_without_a_time_to_first_token_the_whole_request_tells(ttft_ms: float, allowed: float) -> None:
    """What the client adds to the whole, against the time to first token that it saw."""
    name = "client was not the bottleneck"
    rows = requests().assign(server_ttft_ms=np.nan, ttft_ms=ttft_ms, server_e2e_ms=500.0)
    found = check(name, rows.assign(e2e_ms=500.0 + allowed - 0.1))
    assert found.ok
    assert "this server has no time to first token of a request" in found.detail
    assert not check(name, rows.assign(e2e_ms=500.0 + allowed + 0.1)).ok
    assert not check(name, rows.assign(e2e_ms=500.0, server_e2e_ms=np.nan)).ok


@pytest.mark.parametrize(("asked", "ok"), [(1.0, True), (1.2, True), (2.0, False)])
def test_an_open_loop_must_arrive_at_its_rate(asked: float, ok: bool) -> None:
    """400 requests, one a second by the server's clock; allowed is 0.1 plus three times 1/sqrt(399)."""
    rows = requests(400)
    step = replace(STEP, requests=400, rate_per_s=asked)
    assert check("client kept its rate", rows, step=step).ok is ok
    assert not [c for c in load_checks(STEP, load(), rows) if c.name == "client kept its rate"]


# ---- the server's own arguments

INFO: dict[str, object] = {
    "port": 30001,
    "mem_fraction_static": 0.5,
    "disable_radix_cache": True,
    "dtype": "float32",
}


def test_flags_of_a_command() -> None:
    argv = ("python", "-m", "x", "--port", "1", "--on", "--dtype", "float32", "--last")
    assert flags(argv) == [("--port", "1"), ("--on", "True"), ("--dtype", "float32"), ("--last", "True")]


@pytest.mark.parametrize(
    "argv",
    [
        ("--port", "30001"),
        ("--mem-fraction-static", "0.50"),
        ("--disable-radix-cache",),
        ("--dtype", "float32", "--disable-radix-cache", "--port", "30001"),
    ],
)
def test_arguments_in_force(argv: tuple[str, ...]) -> None:
    assert server_arguments(argv, INFO).ok


@pytest.mark.parametrize(
    ("argv", "detail"),
    [
        (("--port", "30002"), "--port is 30001, planned '30002'"),
        (("--dtype", "bfloat16"), "--dtype is 'float32', planned 'bfloat16'"),
        (("--enable-mixed-chunk",), "--enable-mixed-chunk is not reported"),
        (("--disable-radix-cache", "--port", "x"), "--port is 30001, planned 'x'"),
    ],
)
def test_arguments_that_are_not_in_force(argv: tuple[str, ...], detail: str) -> None:
    found = server_arguments(argv, INFO)
    assert not found.ok
    assert found.detail == detail


def test_a_flag_that_came_out_false() -> None:
    assert not server_arguments(("--disable-radix-cache",), {"disable_radix_cache": False}).ok
