"""The JSONL reader: good rows stay, every other line is named with its number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from lab.read import jsonl

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=6)
FIXTURE_IS_REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


def test_rows_in_order(path: Path) -> None:
    path.write_text('{"ttft": 0.5, "ok": true}\r\n{"ttft": null}\n')
    assert jsonl.read(path) == ([{"ttft": 0.5, "ok": True}, {"ttft": None}], [])


def test_bare_infinity_and_nan_as_bench_serving_writes_them(path: Path) -> None:
    path.write_text('{"request_rate": Infinity, "low": -Infinity, "mean": NaN}\n')
    ((row,), problems) = jsonl.read(path)
    assert (row["request_rate"], row["low"], problems) == (math.inf, -math.inf, [])
    assert isinstance(row["mean"], float)
    assert math.isnan(row["mean"])


def test_a_cut_last_line_costs_only_itself(path: Path) -> None:
    path.write_text('{"a": 1}\n{"a": 2, "b": [1, 2')
    rows, (problem,) = jsonl.read(path)
    assert rows == [{"a": 1}]
    assert (problem.line, problem.text) == (2, '{"a": 2, "b": [1, 2')
    assert problem.reason.startswith("the file ends inside this line: not JSON at character")


def test_a_last_line_without_its_end_is_whole_when_its_object_is(path: Path) -> None:
    path.write_text('{"a": 1}\n{"a": 2}')
    assert jsonl.read(path) == ([{"a": 1}, {"a": 2}], [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1x}', "not JSON at character 8: Expecting ',' delimiter"),
        (b'{"a": 1}{"a": 2}', "not JSON at character 9: Extra data"),
        (b'{"a": "\xff"}', "byte 8 of the line is not UTF-8"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"3", "a JSON int, not an object"),
        (b"null", "a JSON NoneType, not an object"),
        (b"", "the line is empty"),
        (b"  ", "the line is empty"),
        (b"\x00\x00\x00", "not JSON at character 1"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
        (b"[" * 200_000, "JSON that cannot be read"),
    ],
)
def test_a_broken_middle_line_is_named_and_the_rest_is_kept(path: Path, line: bytes, reason: str) -> None:
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows, (problem,) = jsonl.read(path)
    assert rows == [{"a": 1}, {"a": 3}]
    assert problem.line == 2
    assert reason in problem.reason
    assert len(problem.text) <= jsonl.SHOWN_CHARACTERS


def test_an_empty_file_is_a_problem(path: Path) -> None:
    path.write_bytes(b"")
    assert jsonl.read(path) == ([], [jsonl.Problem(0, "", "the file is empty")])


def test_a_file_that_cannot_be_opened_is_the_users_to_fix(path: Path) -> None:
    with pytest.raises(LabError, match="cannot read") as caught:
        jsonl.read(path)
    assert caught.value.why == "No such file or directory"
    with pytest.raises(LabError, match="cannot read"):
        jsonl.read(path.parent)


@FIXTURE_IS_REUSED
@given(rows=ROWS)
def test_what_json_writes_comes_back(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert jsonl.read(path) == (rows, [])


@FIXTURE_IS_REUSED
@given(rows=ROWS, data=st.data())
def test_a_file_cut_at_any_byte_gives_a_prefix_of_its_rows(
    path: Path, rows: list[dict[str, object]], data: st.DataObject
) -> None:
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="surrogatepass")
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    kept, problems = jsonl.read(path)
    assert kept == rows[: len(kept)]
    assert len(problems) <= 1


@FIXTURE_IS_REUSED
@given(content=st.binary(max_size=200))
def test_any_bytes_are_rows_or_problems_line_by_line(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    rows, problems = jsonl.read(path)
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    assert len(rows) + len(problems) == max(lines, 1)
