"""Tables and numbers of what the probe wrote, from event files made by hand whose answers are known; and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from eventfiles import UNIX, batch, event, header, write

from lab.forwards import (
    NUMBERS,
    batch_numbers,
    forward_table,
    number_columns,
    order_numbers,
    request_table,
    retraction_numbers,
    tree_numbers,
)
from lab.gpurows import UNTESTED
from lab.loads import LOAD_COLUMNS
from lab.metrics import METRICS
from lab.plan import from_json
from lab.probed import FITS, IN_USE, absent_columns, read_probe
from lab.read.events import ProbeFile, read_file
from lab.rundir import TrialFiles

WINDOWS = {"load": (UNIX + 1.0, UNIX + 2.0), "other": (UNIX + 2.0, math.inf)}


def file_of(tmp_path: Path, *rows: dict[str, object], **head: object) -> ProbeFile:
    found = read_file(write(tmp_path / "events", header(**head), *rows))
    assert isinstance(found, ProbeFile), found
    return found


def passes(tmp_path: Path, *rows: dict[str, object]) -> pd.DataFrame:
    return forward_table(file_of(tmp_path, *rows), WINDOWS)


def numbers(table: pd.DataFrame, *, policy: str = "fcfs") -> dict[str, float]:
    return batch_numbers(table, asked_policy=policy, pool_tokens=100.0)


def test_a_pass_belongs_to_the_load_in_whose_time_it_was_launched(tmp_path: Path) -> None:
    table = passes(
        tmp_path,
        batch(0.5, "prefill", 1),
        batch(1.2, "prefill", 1),
        batch(1.3, "decode", 1),
        batch(2.5, "decode", 1),
    )
    assert table["load"].tolist() == ["load", "load", "other"], "that of the server's warm-up is of none"


def test_gaps_are_where_the_scheduler_had_work(tmp_path: Path) -> None:
    table = passes(
        tmp_path,
        batch(1.000, "prefill", 1),
        batch(1.015, "decode", 1),
        batch(1.500, "decode", 1, idle_turns=3),
        batch(2.100, "decode", 1),
    )
    gaps = table["gap_ms"].tolist()
    assert gaps[1] == pytest.approx(5.0)
    assert [math.isnan(gap) for gap in gaps] == [True, False, True, True], (
        "first, after idling, another load's"
    )
    found = numbers(table[table["load"] == "load"])
    assert found["gap_share"] == pytest.approx(5 / 35)
    assert found["form_share"] == pytest.approx(1.5 / 35)


def test_late_is_a_result_that_was_processed_after_the_next_launch(tmp_path: Path) -> None:
    overlapped = {"done_at_ns": 1_020_000_000}
    table = passes(
        tmp_path,
        batch(1.000, "prefill", 1, **overlapped),
        batch(1.015, "decode", 1),
        batch(1.03, "decode", 1),
    )
    late = table["late"].tolist()
    assert late[:2] == [1.0, 0.0]
    assert math.isnan(late[2]), "there is no next pass that it could be late for"


def test_batches_change_while_requests_run(tmp_path: Path) -> None:
    found = numbers(
        passes(
            tmp_path,
            batch(1.00, "prefill", 2, waiting=3),
            batch(1.02, "decode", 2),
            batch(1.04, "prefill", 1, running=2),
            batch(1.06, "decode", 3),
            batch(1.08, "decode", 1),
            batch(1.50, "prefill", 1, idle_turns=9),
        )
    )
    assert (found["prefill_passes"], found["decode_passes"]) == (3, 3)
    assert found["joined_passes"] == 1, "only the second prefill had others running"
    assert found["left_passes"] == 1
    assert found["alternations"] == 1, "the third prefill came after a pause"
    assert (found["running_max"], found["running_mean"], found["waiting_max"]) == (3, 2, 3)
    assert (found["kv_used_max"], found["kv_used_share_max"], found["slots_used_max"]) == (30, 0.3, 3)


def test_the_longest_queue_of_the_policy_and_the_shortest_of_another(tmp_path: Path) -> None:
    found = numbers(
        passes(
            tmp_path,
            batch(1.0, "prefill", 1, waiting=200, policy="fcfs"),
            batch(1.1, "prefill", 1, waiting=128, policy="fcfs"),
            batch(1.2, "prefill", 1, waiting=127, policy="lpm"),
            batch(1.3, "decode", 1, waiting=500, policy="lpm"),
        ),
        policy="lpm",
    )
    assert found["asked_waiting_max"] == 128, (
        "the queue with the request that was taken from it; decodes order nothing"
    )
    assert found["fallback_waiting_min"] == 129


def test_a_load_without_passes_has_no_numbers(tmp_path: Path) -> None:
    found = numbers(passes(tmp_path))
    assert found["prefill_passes"] == 0
    assert math.isnan(found["running_max"])
    assert math.isnan(found["gap_share"])


def test_waiting_ends_at_the_launch_of_the_first_pass(tmp_path: Path) -> None:
    file = file_of(
        tmp_path,
        event("queued", 1.0, rid="a", again=False, waiting=0),
        batch(1.010, "prefill", 1, forward=5),
        event("scheduled", 1.024, rid="a", forward=5),
        event("retracted", 1.1, rid="a", prompt_tokens=3, output_tokens=1),
        batch(1.200, "prefill", 1, forward=9),
        event("scheduled", 1.214, rid="a", forward=9),
    )
    (row,) = request_table(file).to_dict("records")
    assert row["wait_ms"] == pytest.approx(10.0)
    assert row["scheduled_s"] == pytest.approx(UNIX + 1.010)
    assert row["probe_retractions"] == 1
    assert request_table(replace(file, level="batches")).empty


def test_retractions_of_the_window(tmp_path: Path) -> None:
    rows = [event("retraction", at, requests=2, freed_tokens=40) for at in (0.9, 1.5, 2.5)]
    assert retraction_numbers(file_of(tmp_path, *rows), WINDOWS["load"]) == {
        "retraction_passes": 1,
        "freed_tokens": 40,
    }


def test_the_tree_grows_by_what_is_new(tmp_path: Path) -> None:
    insert = {"why": "finish", "node": 1, "key_tokens": 60}
    finished = {"rid": "a", "forward": 1, "prompt_tokens": 50, "output_tokens": 10, "cached_tokens": 0}
    file = file_of(
        tmp_path,
        event("insert", 1.1, new_tokens=60, kv_evictable=0, kv_protected=60, **insert),
        event("finished", 1.1, **finished),
        event("insert", 1.2, new_tokens=20, kv_evictable=70, kv_protected=10, **insert),
        event("finished", 1.2, **finished),
        event("evict_node", 1.30, node=1, tokens=10, age_ns=900_000_000, age_of="path"),
        event("evict_node", 1.31, node=2, tokens=10, age_ns=500_000_000, age_of="path"),
        event("evict_node", 1.32, node=3, tokens=10, age_ns=800_000_000, age_of="path"),
        event("evict", 1.33, wanted_tokens=30, tokens=30),
        event("evict_node", 1.40, node=4, tokens=10, age_ns=999_000_000, age_of="path"),
        event("evict", 1.41, wanted_tokens=10, tokens=10),
    )
    found = tree_numbers(file, WINDOWS["load"])
    assert (found["stored_tokens"], found["held_tokens"]) == (80, 120)
    assert found["saved_share"] == pytest.approx(1 / 3)
    assert (found["tree_tokens_max"], found["tree_tokens_end"], found["nodes_evicted"]) == (80, 80, 4)
    assert found["evicted_old_first"] == 0.5, (
        "the third was older than the second; the fourth is of another pass"
    )
    assert tree_numbers(replace(file, level="requests"), WINDOWS["load"]) == {}
    assert math.isnan(tree_numbers(file, WINDOWS["other"])["saved_share"]), "no tree, nothing saved"


def test_the_order_of_service(tmp_path: Path) -> None:
    requests = pd.DataFrame(
        {"service_order": [0.0, 2.0, 1.0, 3.0], "received_s": [0.0, 0.1, 0.2, 0.3], "group": [0, 1, 0, 1]}
    )
    assert order_numbers(requests) == {"order_kept": pytest.approx(2 / 3), "group_switches": 1}
    assert order_numbers(requests.assign(service_order=float("nan"))) == {}


def test_every_number_has_a_column_and_a_meaning() -> None:
    assert set(number_columns()) <= set(LOAD_COLUMNS)
    assert set(number_columns()) <= set(METRICS)


# ------------------------------------------------------------ what may not be made into numbers

GOOD = (
    header(),
    batch(1.1, "prefill", 1),
    event("counters", 3, written=2, dropped=0, errors=0, unix_ns=None),
)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((), "the probe was not loaded"),
        (
            (header(), event("hook", 0.1, target="a.B.c", status="missing", detail="no such class")),
            "hooks not in use: a.B.c",
        ),
        ((*GOOD, event("counters", 4, written=2, dropped=5, errors=0)), "5 events were lost"),
        ((*GOOD, event("counters", 4, written=2, dropped=0, errors=2)), "2 hook bodies raised"),
        ((*GOOD, batch(0.7, "decode", 1)), "the clock went backwards"),
        ((header(), {"e": "batch"}, batch(1.1, "prefill", 1)), "lines cannot be read"),
        ((header(schema=99),), "event schema 99"),
    ],
)
def test_events_that_are_not_whole_give_no_numbers_and_say_why(
    tmp_path: Path, rows: tuple[dict[str, object], ...], reason: str
) -> None:
    if rows:
        write(tmp_path / "events", *rows)
    probed = read_probe(TrialFiles(tmp_path), WINDOWS, level="batches")
    assert probed.file is None
    assert reason in probed.reason
    check = probed.in_use()
    assert check.ok
    assert check.detail.startswith(UNTESTED), "not a reason to throw away what clients measured"
    assert probed.forwards().empty
    found = {"pool_tokens": 1.0, "evicted_tokens": math.nan}
    probed.complete(found, load="load", passes=probed.forwards(), asked_policy="fcfs")
    assert set(found) == {"pool_tokens", "evicted_tokens"}
    assert probed.fits("load", {}).detail.startswith(UNTESTED)


def test_a_last_line_that_a_kill_cut_is_no_loss(tmp_path: Path) -> None:
    write(tmp_path / "events", *GOOD, cut='{"e":"bat')
    probed = read_probe(TrialFiles(tmp_path), WINDOWS, level="batches")
    assert probed.file is not None
    assert "line 4" in probed.notes[0]


def test_events_and_counters_must_agree_on_every_rank(tmp_path: Path) -> None:
    rows = (header(), event("evict", 1.5, wanted_tokens=8, tokens=8))
    write(tmp_path / "events", *rows)
    write(tmp_path / "events", header(), event("evict", 1.5, wanted_tokens=8, tokens=7), rank="pp0-tp1")
    probed = read_probe(TrialFiles(tmp_path), WINDOWS, level="cache")
    counted = {"evicted_tokens": 8.0, "retracted_requests": 0.0, "prompt_tokens": 0.0}
    check = probed.fits("load", counted)
    assert (check.name, check.ok) == (FITS, False)
    assert check.detail == "evicted_tokens, rank pp0-tp1: events 7, counter 8"
    assert not probed.fits("load", {**counted, "evicted_tokens": 9.0}).ok
    assert probed.fits("load", {"evicted_tokens": math.nan}).ok, "a release without such a counter"
    assert "2 ranks" in probed.in_use().detail


def test_the_probe_counts_evictions_where_the_release_does_not(tmp_path: Path) -> None:
    write(tmp_path / "events", header(), event("evict", 1.5, wanted_tokens=8, tokens=8))
    probed = read_probe(TrialFiles(tmp_path), WINDOWS, level="cache")
    for counted, expected in ((math.nan, 8.0), (9.0, 9.0)):
        found = {"pool_tokens": 100.0, "evicted_tokens": counted}
        probed.complete(found, load="load", passes=probed.forwards(), asked_policy="fcfs")
        assert found["evicted_tokens"] == expected
        assert found["prefill_passes"] == 0


def test_a_claim_is_told_why_its_column_is_not_there(tmp_path: Path) -> None:
    golden = (Path(__file__).parent / "golden" / "plan-radix.json").read_text()
    plan = replace(from_json(golden, where="plan.json"), probe="requests")
    fine = pd.DataFrame({"name": [IN_USE], "detail": ["level requests, no event lost"]})
    absent = absent_columns(plan, fine)
    assert set(absent) == set(NUMBERS["cache"])
    assert "'requests'" in absent["saved_share"]
    lost = fine.assign(detail=f"{UNTESTED}5 events were lost")
    assert absent_columns(plan, lost)["running_max"] == "5 events were lost"
