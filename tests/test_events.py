"""The reader of the probe's events: cut files, clocks that go back, two ranks, newer schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.probe.labprobe.schema import EVENTS, SCHEMA
from lab.read.events import ProbeFile, frame, read_events, read_file, totals

SECOND = 1_000_000_000
UNIX = 1_790_000_000 * SECOND


def header(**changes: object) -> dict[str, object]:
    row = {"e": "header", "t_ns": 5 * SECOND, "unix_ns": UNIX, "schema": SCHEMA, "pid": 7, "sglang": "0.5.21"}
    return {**row, "level": "cache", **changes}


def event(kind: str, at_s: float, **values: object) -> dict[str, object]:
    assert set(values) <= set(EVENTS[kind][1])
    return {"e": kind, "t_ns": int(at_s * SECOND), **dict.fromkeys(EVENTS[kind][1]), **values}


def write(path: Path, *rows: dict[str, object], cut: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    return path


def read(path: Path) -> ProbeFile:
    found = read_file(path)
    assert isinstance(found, ProbeFile), found
    return found


def test_no_folder_and_no_files_are_no_error(tmp_path: Path) -> None:
    assert read_events(tmp_path / "nowhere") == ((), ())
    assert read_events(tmp_path) == ((), ())


def test_two_ranks(tmp_path: Path) -> None:
    """Each with its own monotonic clock; one frame in order of ranks."""
    write(tmp_path / "events-tp1-9.jsonl", header(pid=9, t_ns=SECOND), event("flush", 2, done=True))
    write(
        tmp_path / "events-tp0-8.jsonl",
        header(pid=8),
        event("flush", 7, done=False),
        event("flush", 8, done=True),
    )
    files, empty = read_events(tmp_path)
    assert ([file.rank for file in files], empty) == (["tp0", "tp1"], ())
    table = frame(files, "flush")
    assert list(table.columns) == ["rank", "pid", "unix_s", "t_ns", "done"]
    assert table["rank"].tolist() == ["tp0", "tp0", "tp1"]
    assert table["pid"].tolist() == [8, 8, 9]
    assert (table["unix_s"] - UNIX / SECOND).tolist() == [2, 3, 1]


def test_a_frame_without_rows_has_its_columns(tmp_path: Path) -> None:
    write(tmp_path / "events-tp0-8.jsonl", header())
    assert list(frame(read_events(tmp_path)[0], "batch").columns[4:]) == list(EVENTS["batch"][1])


def test_a_kind_that_does_not_exist() -> None:
    with pytest.raises(LabError, match="unknown kind of event 'batches'") as caught:
        frame((), "batches")
    assert "did you mean 'batch'" in caught.value.fix


@pytest.mark.parametrize(
    "cut", ['{"e":"flush","t_ns":99', '{"e":"fl', "{", '{"e":"flush","t_ns":6,"done":tr\x00']
)
def test_a_last_line_cut_off(tmp_path: Path, cut: str) -> None:
    file = read(write(tmp_path / "events-tp0-8.jsonl", header(), event("flush", 6, done=True), cut=cut))
    assert len(file.events["flush"]) == 1
    assert [problem.line for problem in file.problems] == [3]
    assert not file.complete


@pytest.mark.parametrize("text", ["", '{"e":"header","t_ns":5', "not JSON\n", '{"e":"flush","t_ns":1}\n'])
def test_a_file_cut_in_its_first_line_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "events-tp0-8.jsonl").write_text(text)
    files, empty = read_events(tmp_path)
    assert files == ()
    assert len(empty) == 1
    assert empty[0].startswith("events-tp0-8.jsonl: ")


def test_lines_that_are_no_events_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    wrong = [{"e": "surprise", "t_ns": 6 * SECOND}, {"e": "flush", "t_ns": "late"}, {"t_ns": 7}]
    path = write(tmp_path / "events-tp0-8.jsonl", header(), *wrong, event("flush", 8, done=True))
    file = read(path)
    assert [problem.line for problem in file.problems] == [2, 3, 4]
    assert "surprise" in file.problems[0].reason
    assert len(file.events["flush"]) == 1


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "events-tp0-8.jsonl", header(schema=SCHEMA + 1))
    with pytest.raises(LabError, match=f"event schema {SCHEMA + 1}, this lab knows up to {SCHEMA}"):
        read_events(tmp_path)


@pytest.mark.parametrize("change", [{"schema": None}, {"schema": "1"}, {"t_ns": None}])
def test_a_header_of_something_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path / "events-tp0-8.jsonl", header(**change))
    with pytest.raises(LabError, match="no schema number or no clock"):
        read_events(tmp_path)


def test_events_out_of_order_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [event("flush", at, done=True) for at in (6, 9, 8, 8.5, 7)]
    file = read(write(tmp_path / "events-tp0-8.jsonl", header(), *rows))
    assert [row["t_ns"] for row in file.events["flush"]] == [row["t_ns"] for row in rows]
    assert file.backwards == 2


def test_the_writers_own_lines_may_stand_before_earlier_events(tmp_path: Path) -> None:
    rows = [event("flush", 6), event("memory", 9), event("counters", 9), event("flush", 8)]
    assert read(write(tmp_path / "events-tp0-8.jsonl", header(), *rows)).backwards == 0


def test_a_unix_clock_that_is_set_back(tmp_path: Path) -> None:
    """By ten seconds between the first and the second counters; events after that have the new time."""
    counters = [
        event("counters", at, unix_ns=UNIX + int((at - 5 + by) * SECOND)) for at, by in ((6, 0), (7, -10))
    ]
    path = write(
        tmp_path / "events-tp0-8.jsonl",
        header(),
        *counters,
        *(event("flush", at, done=True) for at in (6.5, 8)),
    )
    file = read(path)
    assert file.clock_step_ms == pytest.approx(-10_000)
    assert (frame((file,), "flush")["unix_s"] - UNIX / SECOND).tolist() == [1.5, -7]


def test_a_unix_clock_that_is_not_set(tmp_path: Path) -> None:
    wobble = event("counters", 6, unix_ns=UNIX + SECOND + 3_000_000)
    assert read(write(tmp_path / "events-tp0-8.jsonl", header(), wobble)).clock_step_ms == 0


def test_what_the_process_said_of_itself(tmp_path: Path) -> None:
    rows = (
        event("hook", 5, target="Scheduler.gone", status="missing", detail="no such function"),
        event("counters", 6, dropped=1, errors=0, end=False),
        event("counters", 7, dropped=3, errors=2, end=True),
    )
    file = read(write(tmp_path / "events-tp0-8.jsonl", header(), *rows))
    assert (file.dropped, file.errors, file.complete) == (3, 2, True)
    assert file.not_hooked == ("Scheduler.gone: missing, no such function",)


def rows_of_a_load() -> list[dict[str, object]]:
    return [
        event("batch", 6, mode="prefill", new_tokens=90, cached_tokens=10),
        event("batch", 7, mode="decode", new_tokens=4, cached_tokens=0),
        event("retraction", 7, requests=1, prompt_tokens=50, output_tokens=3),
        event("evict", 8, tokens=25),
        event("batch", 8, mode="mixed", new_tokens=50, cached_tokens=None),
        event("finished", 9, prompt_tokens=100, output_tokens=5, cached_tokens=10),
        event("aborted", 9, where="running", prompt_tokens=50, output_tokens=2, cached_tokens=1),
        event("aborted", 9, where="waiting", prompt_tokens=7, output_tokens=0, cached_tokens=0),
    ]


def test_totals(tmp_path: Path) -> None:
    file = read(write(tmp_path / "events-tp0-8.jsonl", header(), *rows_of_a_load()))
    found = totals(file)
    assert (found.computed_tokens, found.found_tokens, found.decoded_tokens, found.evicted_tokens) == (
        140,
        10,
        4,
        25,
    )
    assert (found.retracted_requests, found.retracted_prompt_tokens, found.retracted_output_tokens) == (
        1,
        50,
        3,
    )
    assert (found.requests, found.prompt_tokens, found.output_tokens, found.cached_tokens) == (2, 150, 7, 11)


def test_totals_of_a_window(tmp_path: Path) -> None:
    file = read(write(tmp_path / "events-tp0-8.jsonl", header(), *rows_of_a_load()))
    start = UNIX / SECOND
    found = totals(file, window=(start + 1.5, start + 3.5))
    assert (found.computed_tokens, found.decoded_tokens, found.evicted_tokens, found.requests) == (
        50,
        4,
        25,
        0,
    )


def test_a_level_that_does_not_say_gives_none_not_zero(tmp_path: Path) -> None:
    found = totals(read(write(tmp_path / "events-tp0-8.jsonl", header(level="batches"), *rows_of_a_load())))
    assert found.computed_tokens == 140
    assert (found.requests, found.prompt_tokens, found.output_tokens, found.cached_tokens) == (None,) * 4
