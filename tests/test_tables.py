"""Tables of a whole run: the same from the same files, and what a damaged file does to its trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from fakerun import make_run

from lab.errors import LabError
from lab.judge import judge
from lab.plan import read_plan
from lab.rundir import SCHEMA, Run, TrialFiles, write_json
from lab.tables import TABLES, load_table, tabulate

FIRST = "000-cache-on-r0"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def state(tables: dict[str, pd.DataFrame], trial: str = FIRST) -> pd.Series:
    rows = tables["trials"][tables["trials"]["trial"] == trial]
    assert len(rows) == 1
    return rows.iloc[0]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_good_run(run: Run) -> None:
    tables = tabulate(run)
    assert set(tables) == set(TABLES)
    assert list(tables["trials"]["validity"]) == ["valid"] * 4
    assert list(tables["trials"]["unreadable"]) == [""] * 4
    assert bool(tables["checks"]["ok"].all())
    assert len(tables["requests"]) == 4 * (2 + 3 + 6)
    chat = tables["loads"].query("load == 'chat' and variant == 'cache-on'")
    assert list(chat["hit_rate"]) == pytest.approx([400 / 660] * 2)
    assert list(chat["predicted_hit_rate"]) == pytest.approx([400 / 660] * 2)
    off = tables["loads"].query("variant == 'cache-off'")
    assert off["hit_rate"].eq(0).all()
    assert off["predicted_hit_rate"].eq(0).all()
    verdicts = judge(read_plan(run).claims, tables, capabilities=())
    assert [v.outcome for v in verdicts] == ["held", "held"]


def test_batches_belong_to_the_load_in_whose_time_they_were_printed(run: Run) -> None:
    batches = tabulate(run)["batches"].query("trial == @FIRST")
    assert list(batches["load"]) == ["warmup"] * 2 + ["chat"] * 3 + ["shared"] * 6
    assert list(batches["cached_tokens"])[2:5] == [0, 200, 200]


def test_groups_are_found_again(run: Run) -> None:
    groups = tabulate(run)["groups"].query("trial == @FIRST and load == 'shared'")
    assert list(groups["requests"]) == [3, 3]
    assert list(groups["found_again"]) == [2, 2]
    assert list(groups["evicted"]) == [0, 0]


def test_tables_come_out_the_same_byte_for_byte(run: Run) -> None:
    tabulate(run)
    first = {name: (run.tables / f"{name}.csv").read_bytes() for name in TABLES}
    for name in TABLES:
        (run.tables / f"{name}.csv").unlink()
    tabulate(run)
    assert {name: (run.tables / f"{name}.csv").read_bytes() for name in TABLES} == first
    assert len(load_table(run, "requests")) == 44


# ---- what happens to a trial whose files are not right: it is said, and it feeds no verdict


def cut_bench(files: TrialFiles) -> None:
    path = files.load("shared").bench
    path.write_bytes(path.read_bytes()[:200])


def cut_chat(files: TrialFiles) -> None:
    path = files.load("chat").chat
    path.write_bytes(path.read_bytes()[:-40])


def no_bench(files: TrialFiles) -> None:
    files.load("shared").bench.unlink()


def cut_export(files: TrialFiles) -> None:
    (path,) = files.export.iterdir()
    path.write_bytes(path.read_bytes()[:-100])


def no_export(files: TrialFiles) -> None:
    (path,) = files.export.iterdir()
    path.unlink()


def nan_metrics(files: TrialFiles) -> None:
    path = files.load("chat").after
    path.write_text(path.read_text().replace(" 860.0", " NaN"))
    assert "NaN" in path.read_text()


def cut_metrics(files: TrialFiles) -> None:
    path = files.load("chat").after
    path.write_bytes(path.read_bytes()[:-8])


def no_metrics(files: TrialFiles) -> None:
    files.load("chat").before.unlink()


def restarted(files: TrialFiles) -> None:
    """Counters that fell: another server answered after the load."""
    path = files.load("shared").after
    path.write_text(path.read_text().replace(" 2180.0", " 5.0"))
    assert " 5.0" in path.read_text()


def failed_request(files: TrialFiles) -> None:
    path = files.load("shared").bench
    edit_json(path, errors=["", "", "Boom\nTimeoutError: too slow", "", "", ""])


def other_argument(files: TrialFiles) -> None:
    info = json.loads(files.server_info.read_text())["server_info"]
    write_json(files.server_info, {"server_info": {**info, "random_seed": 2}})


def no_argument(files: TrialFiles) -> None:
    info = json.loads(files.server_info.read_text())["server_info"]
    del info["dtype"]
    write_json(files.server_info, {"server_info": info})


def no_info(files: TrialFiles) -> None:
    files.server_info.unlink()


def crashed(files: TrialFiles) -> None:
    with files.server_log.open("a") as log:
        log.write(
            "[2026-01-02 03:01:30.000] Scheduler hit an exception: Traceback (most recent call last):\n"
        )
        log.write("RuntimeError: out of memory\n\n")


def warm_cache(files: TrialFiles) -> None:
    """The first request of the chat found something: the cache had not been flushed."""
    path = files.load("chat").chat
    path.write_text(path.read_text().replace('"cached_tokens": 0', '"cached_tokens": 200'))


def uncounted(files: TrialFiles) -> None:
    path = files.load("shared").after
    path.write_text(path.read_text().replace(" 2180.0", " 1180.0"))


def no_load_status(files: TrialFiles) -> None:
    files.load("chat").status.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_bench, "shared: every request succeeded: 0 of 6 requests succeeded"),
        (no_bench, "shared: every request succeeded: 0 of 6 requests succeeded"),
        (cut_chat, "chat: every request succeeded: 2 of 3 requests succeeded"),
        (cut_export, "shared: client and server agree on the requests: 5 of 6"),
        (no_export, "chat: client and server agree on the requests: 0 of 3"),
        (nan_metrics, "prompt_tokens_total cannot be subtracted"),
        (cut_metrics, "metrics-after.prom"),
        (no_metrics, "metrics-before.prom"),
        (restarted, "prompt_tokens_total cannot be subtracted"),
        (failed_request, "5 of 6 requests succeeded; first error: TimeoutError: too slow"),
        (other_argument, "server arguments: --random-seed is 2, planned '1'"),
        (no_argument, "server arguments: --dtype is not reported"),
        (no_info, "server_info.json is missing"),
        (crashed, "server did not crash"),
        (warm_cache, "chat: cache was cold"),
        (uncounted, "shared: counters fit the requests: prompt_tokens: counter 320, requests 1320"),
        (no_load_status, "loads/chat/status.json is missing"),
    ],
)
def test_a_damaged_trial_is_invalid_says_why_and_feeds_no_verdict(
    run: Run, damage: Callable[[TrialFiles], None], reason: str
) -> None:
    damage(run.trial(FIRST))
    tables = tabulate(run)
    row = state(tables)
    assert row["validity"] == "invalid"
    assert reason in row["reason"]
    others = tables["trials"][tables["trials"]["trial"] != FIRST]
    assert list(others["validity"]) == ["valid"] * 3
    verdicts = judge(read_plan(run).claims, tables, capabilities=())
    assert [v.n for v in verdicts] == [1, 1]
    assert [v.outcome for v in verdicts] == ["inconclusive"] * 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_bench, "shared: bench.jsonl line 1: the file ends inside this line"),
        (cut_chat, "chat: chat.jsonl line 3: the file ends inside this line"),
        (no_bench, "shared: bench.jsonl is missing"),
        (cut_export, "sglang-request-metrics-20260102_03.log line 11: "),
    ],
)
def test_what_could_not_be_read_is_in_the_table(
    run: Run, damage: Callable[[TrialFiles], None], said: str
) -> None:
    damage(run.trial(FIRST))
    assert said in state(tabulate(run))["unreadable"]


def test_a_server_log_cut_inside_a_line(run: Run) -> None:
    """The trial stays valid, since no number of a verdict comes from the log, but the line is named."""
    path = run.trial(FIRST).server_log
    path.write_bytes(path.read_bytes()[:-60])
    tables = tabulate(run)
    row = state(tables)
    assert row["validity"] == "valid"
    assert "server.log line 12: " in row["unreadable"]
    assert len(tables["batches"].query("trial == @FIRST")) == 10


def test_a_counter_that_is_not_a_number_and_not_used_is_listed(run: Run) -> None:
    path = run.trial(FIRST).load("chat").after
    path.write_text(path.read_text() + "# TYPE sglang:odd_total counter\nsglang:odd_total NaN\n")
    tables = tabulate(run)
    assert state(tables)["validity"] == "valid"
    odd = tables["metrics"].query("name == 'sglang:odd_total' and load == 'chat'")
    assert list(odd["state"]) == ["not_finite"]


def test_failed_running_and_missing_trials(run: Run) -> None:
    edit_json(run.trial(FIRST).status, status="failed", phase="load chat", reason="server: killed by SIGKILL")
    edit_json(run.trial("001-cache-off-r0").status, status="running", phase="start")
    run.trial("002-cache-off-r1").path.rename(run.trials / "elsewhere")
    tables = tabulate(run)
    assert list(tables["trials"]["validity"]) == ["failed", "failed", "not run", "valid"]
    assert state(tables)["reason"] == "load chat: server: killed by SIGKILL"
    assert "the lab was killed" in state(tables, "001-cache-off-r0")["reason"]
    assert set(tables["requests"]["trial"]) == {"003-cache-on-r1"}


def test_a_run_without_any_usable_trial_still_has_tables(run: Run) -> None:
    for trial in read_plan(run).trials:
        edit_json(run.trial(trial.name).status, status="failed", phase="start", reason="server: exit code 1")
    tables = tabulate(run)
    verdicts = judge(read_plan(run).claims, tables, capabilities=())
    assert [v.outcome for v in verdicts] == ["untested", "untested"]
    assert tables["requests"].empty


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f'{{"schema": {SCHEMA + 1}}}', f"has schema {SCHEMA + 1}"),
        ('{"schema": 1, "sta', "not readable JSON"),
    ],
)
def test_a_status_from_a_newer_lab_or_cut_stops_with_its_name(run: Run, text: str, problem: str) -> None:
    run.trial(FIRST).status.write_text(text)
    with pytest.raises(LabError, match=problem) as caught:
        tabulate(run)
    assert f"trials/{FIRST}/status.json" in caught.value.problem


def test_a_run_without_a_plan(run: Run) -> None:
    run.plan.unlink()
    with pytest.raises(LabError, match=r"has no plan\.json"):
        tabulate(run)
