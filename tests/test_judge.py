"""Claims against tables: each of the four verdicts, and everything that must not become a verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from lab.claims import Claim, Measure, Op, Verdict
from lab.judge import judge, samples

TTFT = Measure(table="requests", load="chat", column="ttft_ms", rows="later")
FASTER = Claim(name="faster", says="", measure=TTFT, variant="on", against="off", op="<", threshold=0.7)
HIT = Claim(
    name="hit",
    says="",
    measure=Measure(table="loads", load="chat", column="hit_rate"),
    variant="on",
    op=">",
    threshold=0.6,
)


def tables(
    on: tuple[float, ...] = (10, 11, 10.5), off: tuple[float, ...] = (40, 41, 42), *, hit: float = 0.66
) -> dict[str, pd.DataFrame]:
    """Trials of two variants; each has a first request of 100 ms and two later ones around the given number."""
    trials, requests, loads = [], [], []
    for variant, values in (("on", on), ("off", off)):
        for repeat, value in enumerate(values):
            key = {"trial": f"{variant}-r{repeat}", "variant": variant, "repeat": repeat}
            trials.append({**key, "validity": "valid"})
            for order, ttft in enumerate((100.0, value - 1, value + 1)):
                requests.append({**key, "load": "chat", "group_order": order, "ttft_ms": ttft})
            loads.append({**key, "load": "chat", "hit_rate": hit if variant == "on" else 0.0})
    return {"trials": pd.DataFrame(trials), "requests": pd.DataFrame(requests), "loads": pd.DataFrame(loads)}


def one(claim: Claim, found: dict[str, pd.DataFrame], *, capabilities: tuple[str, ...] = ()) -> Verdict:
    (verdict,) = judge((claim,), found, capabilities=capabilities)
    assert verdict.claim == claim.name
    assert verdict.reason
    return verdict


def invalidate(found: dict[str, pd.DataFrame], *trials: str) -> dict[str, pd.DataFrame]:
    found["trials"].loc[found["trials"]["trial"].isin(trials), "validity"] = "invalid"
    return found


def test_held_with_number_unit_interval_and_n() -> None:
    verdict = one(FASTER, tables())
    assert verdict.outcome == "held"
    assert verdict.unit == "ratio"
    assert verdict.n == 3
    assert verdict.value == pytest.approx((10 / 40 * 11 / 41 * 10.5 / 42) ** (1 / 3))
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.low < verdict.value < verdict.high < 0.7
    assert verdict.samples == pytest.approx((10 / 40, 11 / 41, 10.5 / 42))


def test_refuted() -> None:
    verdict = one(FASTER, tables(on=(39, 41, 40)))
    assert verdict.outcome == "refuted"
    assert verdict.low is not None
    assert verdict.low > 0.7


def test_inconclusive_where_the_interval_holds_both() -> None:
    verdict = one(FASTER, tables(on=(10, 40, 20)))
    assert verdict.outcome == "inconclusive"
    assert "more --repeats" in verdict.reason
    assert verdict.value is not None


def test_untested_where_a_capability_is_missing() -> None:
    claim = replace(FASTER, needs=("gpu", "nsys"))
    verdict = one(claim, tables(), capabilities=("gpu",))
    assert (verdict.outcome, verdict.value, verdict.n) == ("untested", None, 0)
    assert "nsys" in verdict.reason
    assert "gpu" not in verdict.reason
    assert one(claim, tables(), capabilities=("gpu", "nsys")).outcome == "held"


def test_one_repeat_is_inconclusive_however_clear_the_number() -> None:
    verdict = one(FASTER, tables(on=(1,), off=(1000,)))
    assert verdict.outcome == "inconclusive"
    assert verdict.value == pytest.approx(0.001)
    assert (verdict.low, verdict.high) == (None, None)


@pytest.mark.parametrize(
    ("op", "expected"), [("<", "refuted"), ("<=", "held"), (">", "refuted"), (">=", "held")]
)
def test_the_threshold_itself(op: Op, expected: str) -> None:
    """An interval without width that lies on the threshold."""
    claim = replace(HIT, op=op, threshold=0.66)
    assert one(claim, tables()).outcome == expected


def test_an_invalid_trial_never_feeds_a_verdict() -> None:
    """The wild repeat would make it refuted or inconclusive; invalid, it takes its whole pair with it."""
    wild = tables(on=(10, 11, 1e9))
    assert one(FASTER, wild).outcome == "inconclusive"
    verdict = one(FASTER, invalidate(wild, "on-r2"))
    assert (verdict.outcome, verdict.n) == ("held", 2)
    assert verdict.samples == pytest.approx((10 / 40, 11 / 41))


@pytest.mark.parametrize("state", ["invalid", "failed", "not run"])
def test_only_valid_trials_count(state: str) -> None:
    found = tables()
    found["trials"]["validity"] = state
    assert one(FASTER, found).outcome == "untested"
    assert samples(TTFT, "on", found) == {}


def test_pairs_need_both_sides() -> None:
    """r0 lacks its control, r1 its subject: only r2 is left, which is one repeat."""
    verdict = one(FASTER, invalidate(tables(), "off-r0", "on-r1"))
    assert (verdict.outcome, verdict.n) == ("inconclusive", 1)
    assert one(FASTER, invalidate(tables(), "off-r0", "on-r1", "on-r2")).outcome == "untested"


def test_a_missing_column_is_untested_and_named() -> None:
    found = tables()
    found["requests"] = found["requests"].drop(columns="ttft_ms")
    verdict = one(FASTER, found)
    assert verdict.outcome == "untested"
    assert "ttft_ms" in verdict.reason


def test_a_column_without_numbers_is_untested() -> None:
    found = tables()
    found["requests"]["ttft_ms"] = math.nan
    assert one(FASTER, found).outcome == "untested"


def test_a_load_that_never_ran_is_untested_and_no_zero() -> None:
    measure = replace(TTFT, load="absent", reduce="sum")
    assert one(replace(FASTER, measure=measure), tables()).outcome == "untested"
    assert one(replace(FASTER, measure=measure, against=None), tables()).outcome == "untested"


def test_a_ratio_with_a_zero_is_untested() -> None:
    found = tables(hit=0.5)  # the control's hit rate is 0
    claim = replace(HIT, against="off")
    verdict = one(claim, found)
    assert verdict.outcome == "untested"
    assert "0" in verdict.reason
    assert one(HIT, found).outcome == "refuted"


def test_rows_first_later_and_all() -> None:
    found = tables(on=(10, 20))
    assert samples(replace(TTFT, rows="first"), "on", found) == {0: 100, 1: 100}
    assert samples(TTFT, "on", found) == {0: 10, 1: 20}
    assert samples(replace(TTFT, rows="all", reduce="max"), "on", found) == {0: 100, 1: 100}
    assert samples(replace(TTFT, reduce="sum"), "on", found) == {0: 20, 1: 40}
    assert samples(replace(TTFT, reduce="min"), "on", found) == {0: 9, 1: 19}


def test_a_measure_of_a_zero_is_a_number_and_no_gap() -> None:
    claim = replace(HIT, variant="off", op="<=", threshold=0.0)
    verdict = one(claim, tables())
    assert (verdict.outcome, verdict.value, verdict.low, verdict.high) == ("held", 0, 0, 0)


def test_verdicts_come_in_the_order_of_the_claims() -> None:
    found = judge((HIT, FASTER, replace(HIT, name="again")), tables(), capabilities=())
    assert [v.claim for v in found] == ["hit", "faster", "again"]


def test_what_is_known_to_be_absent_is_untested_with_its_reason() -> None:
    found = tables()
    found["loads"]["hit_rate"] = float("nan")
    (verdict,) = judge((HIT,), found, capabilities=(), absent={"hit_rate": "it is not counted", "other": "x"})
    assert (verdict.outcome, verdict.reason) == ("untested", "no hit_rate: it is not counted")
    found["trials"] = found["trials"][found["trials"]["variant"] != "off"]
    (verdict,) = judge((FASTER,), found, capabilities=(), absent={"off": "it was left out"})
    assert (verdict.outcome, verdict.reason) == ("untested", "no off: it was left out")
    (verdict,) = judge((HIT,), tables(), capabilities=(), absent={"hit_rate": "it is not counted"})
    assert verdict.outcome == "held", "a number that is there is judged, whatever is said of others"


# ------------------------------------------------------------ forward passes, two loads, differences


def with_passes(found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every trial of `found` with a prefill pass of 50 ms and decode passes of 2, 4 and 4 ms, `long` takes double."""
    rows = []
    for trial in found["trials"].to_dict("records"):
        key = {name: trial[name] for name in ("trial", "variant", "repeat")}
        for load, factor in (("chat", 1), ("long", 2)):
            for mode, run_ms in (("prefill", 50.0), ("decode", 2.0), ("decode", 4.0), ("decode", 4.0)):
                rows.append(
                    {**key, "load": load, "mode": mode, "run_ms": factor * run_ms + 0.01 * trial["repeat"]}
                )
    return {**found, "forwards": pd.DataFrame(rows)}


@pytest.mark.parametrize(
    ("rows", "reduce", "expected"),
    [
        ("all", "max", 50.0),
        ("prefill", "median", 50.0),
        ("decode", "median", 4.0),
        ("decode", "count", 3),
        ("decode", "distinct", 2),
        ("decode", "p95", 4.0),
        ("all", "p99", 4 + 0.97 * 46),
    ],
)
def test_a_measure_of_passes(rows: str, reduce: str, expected: float) -> None:
    measure = Measure(table="forwards", load="chat", column="run_ms", rows=rows, reduce=reduce)  # type: ignore[arg-type]
    found = samples(measure, "on", with_passes(tables()))
    assert found[0] == pytest.approx(expected)
    assert measure.label()


def test_a_ratio_of_two_loads_of_one_variant() -> None:
    decode = Measure(table="forwards", load="long", column="run_ms", rows="decode")
    claim = Claim(
        name="longer",
        says="",
        measure=decode,
        base=replace(decode, load="chat"),
        variant="on",
        op=">",
        threshold=1.3,
    )
    verdict = one(claim, with_passes(tables()))
    assert verdict.outcome == "held"
    assert verdict.unit == "ratio"
    assert verdict.value == pytest.approx(2.0, rel=0.01)
    assert verdict.levels == pytest.approx((8.0, 4.0), rel=0.01)
    assert claim.expectation() == (
        "on: median run_ms, decode passes of long / on: median run_ms, decode passes of chat > 1.3"
    )
    missing = one(replace(claim, base=replace(decode, load="chat", column="nothing")), with_passes(tables()))
    assert missing.outcome == "untested"
    assert "nothing" in missing.reason


def test_a_difference_where_a_side_can_be_0() -> None:
    hits = Measure(table="loads", load="chat", column="hit_rate")
    claim = Claim(
        name="more",
        says="",
        measure=hits,
        variant="on",
        against="off",
        op=">",
        threshold=0.5,
        by="difference",
    )
    found = tables()
    assert one(replace(claim, by="ratio"), found).outcome == "untested", "there is no ratio to 0"
    verdict = one(claim, found)
    assert verdict.outcome == "held"
    assert verdict.value == pytest.approx(0.66)
    assert verdict.unit == ""
    assert claim.expectation() == "on - off > 0.5"


def test_large_numbers_are_written_out() -> None:
    verdict = Verdict(
        claim="c", outcome="held", reason="r", unit="ratio", n=3, value=1670.4, low=0.00123456, high=1989.9,
        levels=(1630.0, 0.977), level_unit="",
    )  # fmt: skip
    assert verdict.number() == "1,670 ratio [0.00123, 1,990] (1,630 against 0.977), n = 3"
