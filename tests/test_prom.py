"""The reader of SGLang's metrics page: real pages, counter differences, and pages that are cut or garbled."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import LabError
from lab.read import prom

LOGS = Path(__file__).parent / "data" / "logs"
CACHED = "sglang:cached_tokens_total"
REALTIME = "sglang:realtime_tokens_total"

PAGE = """\
# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="nano",tp_rank="0"} 914.0
sglang:prompt_tokens_total{model_name="nano",tp_rank="1"} 86.0
# HELP sglang:token_usage The token usage.
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="a \\"b\\", {c}"} 0.55
# TYPE sglang:fwd_occupancy gauge
sglang:fwd_occupancy NaN
# TYPE sglang:queue_time_seconds histogram
sglang:queue_time_seconds_bucket{le="0.1",model_name="nano"} 3.0
sglang:queue_time_seconds_bucket{le="1.0",model_name="nano"} 4.0
sglang:queue_time_seconds_bucket{le="+Inf",model_name="nano"} 5.0
sglang:queue_time_seconds_count{model_name="nano"} 5.0
sglang:queue_time_seconds_sum{model_name="nano"} 7.5
"""


def counters(**values: float) -> prom.Snapshot:
    lines = [
        f"# TYPE sglang:{name}_total counter\nsglang:{name}_total {value}\n" for name, value in values.items()
    ]
    return prom.parse("".join(["# TYPE always gauge\nalways 1.0\n", *lines]))


def test_known_page() -> None:
    page = prom.parse(PAGE)
    assert page.counters == {
        ("sglang:prompt_tokens_total", (("model_name", "nano"), ("tp_rank", "0"))): 914.0,
        ("sglang:prompt_tokens_total", (("model_name", "nano"), ("tp_rank", "1"))): 86.0,
    }
    assert page.gauges["sglang:token_usage", (("model_name", 'a "b", {c}'),)] == 0.55
    assert page.histograms == {
        ("sglang:queue_time_seconds", (("model_name", "nano"),)): prom.Histogram(
            7.5, 5.0, ((0.1, 3.0), (1.0, 4.0), (math.inf, 5.0))
        )
    }


def test_nan_and_infinity_are_kept_and_listed() -> None:
    page = prom.parse(PAGE.replace("0.55", "+Inf").replace(" 7.5", " NaN"))
    assert math.isnan(prom.value(page, "sglang:fwd_occupancy"))
    assert prom.value(page, "sglang:token_usage") == math.inf
    assert {name for name, _ in page.not_finite} == {
        "sglang:fwd_occupancy",
        "sglang:token_usage",
        "sglang:queue_time_seconds",
    }


def test_real_pages() -> None:
    before = prom.read(LOGS / "0.5.21-retraction-before.prom")
    after = prom.read(LOGS / "0.5.21-retraction-after.prom")
    deltas = prom.difference(before, after)
    # Absent before: SGLang creates the counter with the first hit.
    assert all(name != CACHED for name, _ in before.counters)
    assert prom.total(deltas, CACHED) == 336
    assert prom.total(deltas, "sglang:prompt_tokens_total") == 914 - 18 == 14 * 64
    # 14 answers: two of 8 tokens and twelve of 120.
    assert prom.total(deltas, "sglang:generation_tokens_total") == 2 * 8 + 12 * 120
    assert prom.total(deltas, REALTIME, where={"mode": "prefill_compute"}) == 694 - 18
    assert prom.total(deltas, "sglang:evicted_tokens_total") == 1058
    ttft = [h for (name, _), h in after.histograms.items() if name == "sglang:time_to_first_token_seconds"]
    assert sum(histogram.observations for histogram in ttft) == 15
    assert all(histogram.buckets[-1] == (math.inf, histogram.observations) for histogram in ttft)


def test_ranks_count_retractions_each() -> None:
    after = prom.read(LOGS / "0.5.21-two-ranks-after.prom")
    deltas = prom.difference(prom.read(LOGS / "0.5.21-two-ranks-before.prom"), after)
    counter = "sglang:num_retracted_requests_total"
    assert prom.total(deltas, counter) == 12
    assert prom.total(deltas, counter, where={"tp_rank": "1"}) == 6


def test_summed_by_name() -> None:
    before, after = prom.parse(PAGE), prom.parse(PAGE.replace("914.0", "1000.0").replace("86.0", "100.0"))
    one, two = prom.difference(before, after)
    assert (one.delta, two.delta, one.state) == (86.0, 14.0, "ok")
    (summed,) = prom.difference(before, after, by_name=True)
    assert (summed.name, summed.labels) == ("sglang:prompt_tokens_total", ())
    assert (summed.before, summed.after, summed.delta, summed.state) == (1000.0, 1100.0, 100.0, "ok")


@pytest.mark.parametrize("by_name", [False, True])
def test_a_counter_that_fell_is_a_reset_and_never_a_number(by_name: bool) -> None:
    (delta,) = prom.difference(counters(hits=5), counters(hits=3), by_name=by_name)
    assert (delta.before, delta.after, delta.delta, delta.state) == (5.0, 3.0, None, "reset")
    with pytest.raises(LabError, match=r"5.0 before, 3.0 after") as caught:
        prom.total([delta], "sglang:hits_total")
    assert "restarted" in caught.value.why


def test_a_counter_that_is_gone_is_a_reset() -> None:
    (delta,) = prom.difference(counters(hits=5), counters())
    assert (delta.after, delta.delta, delta.state) == (None, None, "reset")


def test_one_reset_label_set_makes_the_sum_reset() -> None:
    after = prom.parse(PAGE.replace("914.0", "2000.0").replace("86.0", "1.0"))
    (summed,) = prom.difference(prom.parse(PAGE), after, by_name=True)
    assert (summed.delta, summed.state) == (None, "reset")


@pytest.mark.parametrize(("before", "after"), [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_counter_that_is_not_finite_is_no_number(before: float, after: float) -> None:
    (delta,) = prom.difference(counters(hits=before), counters(hits=after))
    assert (delta.delta, delta.state) == (None, "not_finite")
    with pytest.raises(LabError, match="cannot be subtracted") as caught:
        prom.total([delta], "sglang:hits_total")
    assert caught.value.why == "it is not finite"


def test_absent_is_zero_only_when_asked_for() -> None:
    deltas = prom.difference(counters(hits=1), counters(hits=3))
    assert prom.total(deltas, "sglang:evicted_tokens_total", default=0) == 0
    with pytest.raises(LabError, match="unknown counter 'sglang:hit_total'") as caught:
        prom.total(deltas, "sglang:hit_total")
    assert "did you mean 'sglang:hits_total'" in caught.value.fix
    with pytest.raises(LabError, match="unknown metric"):
        prom.value(counters(hits=1), "sglang:misses_total")
    assert prom.value(counters(hits=1), "sglang:misses_total", default=0.0) == 0.0


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("914.0", "9x14", "line 3: not a line of Prometheus text"),
        ("914.0\n", "914.0", "line 3: not a line of Prometheus text"),
        ("914.0", "", "line 3: not a line of Prometheus text"),
        ('nano",tp_rank="0"} 914.0', "na", "line 3: not a line of Prometheus text"),
        ("914.0", "914.0 1700000000", "line 3: not a line of Prometheus text"),
        ("sglang:token_usage{", "sglang:token usage{", "line 7: sglang:token usage is of type 'unknown'"),
        ("# TYPE sglang:token_usage gauge", "# TYPE sglang:token_usage", "line 6: not a line"),
        ("# TYPE sglang:token_usage gauge\n", "", "line 6: sglang:token_usage is of type 'unknown'"),
        ('le="+Inf"', 'le="9.0"', "the histogram sglang:queue_time_seconds is not complete"),
        ('le="0.1",', "", "has a bucket without a number in its 'le'"),
        ('tp_rank="1"', 'tp_rank="0"', "sglang:prompt_tokens_total stands twice with the same labels"),
        ("# HELP sglang:prompt_tokens_total", "<html>", "line 1: not a line of Prometheus text"),
    ],
)
def test_a_garbled_page_is_refused_with_its_line(old: str, new: str, problem: str) -> None:
    assert old in PAGE
    with pytest.raises(LabError) as caught:
        prom.parse(PAGE.replace(old, new, 1), source="metrics-after.prom")
    assert caught.value.problem.startswith("metrics-after.prom")
    assert problem in caught.value.problem


def test_a_page_cut_inside_a_line_is_refused_and_a_cut_histogram_too() -> None:
    for end in range(1, len(PAGE)):
        page = PAGE[:end]
        if not page.endswith("\n"):
            with pytest.raises(LabError, match=f"line {page.count(chr(10)) + 1}: the page ends inside"):
                prom.parse(page)
        elif "_bucket" in page:
            with pytest.raises(LabError, match="not complete"):
                prom.parse(page)


@given(st.sampled_from(PAGE), st.data())
def test_any_garbling_is_read_or_refused(character: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(PAGE) - 1))
    replacement = data.draw(st.one_of(st.just(character), st.characters()))
    # Any other exception than LabError fails the test.
    with contextlib.suppress(LabError):
        prom.parse(PAGE[:position] + replacement + PAGE[position + 1 :])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.prom"
    with pytest.raises(LabError, match="cannot read"):
        prom.read(path)
    path.write_bytes(b"")
    with pytest.raises(LabError, match="is empty"):
        prom.read(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(LabError, match="is not UTF-8 text"):
        prom.read(path)
