"""The run directory: written whole or not at all, sealed, and never believed when it was changed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.rundir import SCHEMA, Run, list_runs, raw_files, read_json, seal, verify, write_json, write_text

NAME = "20260102T030405Z-ab12"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A sealed run with two raw files and derived ones beside them."""
    run = Run(tmp_path / "runs" / "radix" / NAME)
    write_text(run.plan, "{}\n")
    write_text(run.trial("000-a-r0").server_log, "started\n")
    seal(run)
    for path in (run.report, run.tables / "trials.csv", run.plots / "ttft.png", run.verdicts):
        write_text(path, "derived\n")
    return run


def test_a_sealed_run_verifies_with_and_without_its_derived_part(run: Run) -> None:
    verify(run)
    run.report.unlink()
    verify(run)


def test_the_sums_are_those_of_sha256sum(run: Run) -> None:
    subprocess.run(("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"), cwd=run.path, check=True)
    assert [f.as_posix() for f in raw_files(run)] == ["plan.json", "trials/000-a-r0/server.log"]


def test_sealing_takes_write_permission_from_raw_files_only(run: Run) -> None:
    assert run.plan.stat().st_mode & 0o222 == 0
    assert run.trial("000-a-r0").server_log.stat().st_mode & 0o222 == 0
    assert run.report.stat().st_mode & 0o200


def changed(run: Run) -> None:
    path = run.trial("000-a-r0").server_log
    path.chmod(0o644)
    path.write_text("startet\n")


def removed(run: Run) -> None:
    run.trial("000-a-r0").server_log.unlink()


def added(run: Run) -> None:
    (run.trials / "000-a-r0" / "extra.log").write_text("")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (changed, "trials/000-a-r0/server.log was changed"),
        (removed, "trials/000-a-r0/server.log is missing"),
        (added, "trials/000-a-r0/extra.log was added"),
    ],
)
def test_a_raw_file_that_is_not_what_was_measured(run: Run, damage: Callable[[Run], None], why: str) -> None:
    damage(run)
    with pytest.raises(LabError, match="not what was measured") as caught:
        verify(run)
    assert caught.value.why == why
    assert caught.value.fix


def test_much_damage_is_counted_and_not_listed_in_full(run: Run) -> None:
    for i in range(8):
        (run.trials / f"{i}.log").write_text("")
    with pytest.raises(LabError) as caught:
        verify(run)
    assert caught.value.why.endswith("and 3 more")


def test_sums_that_are_garbage_or_cut(run: Run) -> None:
    whole = run.sums.read_bytes()
    for garbage in (b"\xff\xfe\x00", b"", whole[:-5], whole[:70]):
        run.sums.write_bytes(garbage)
        with pytest.raises(LabError, match="not what was measured"):
            verify(run)


def test_a_run_that_was_never_sealed(run: Run) -> None:
    run.sums.unlink()
    with pytest.raises(LabError, match="has no SHA256SUMS") as caught:
        verify(run)
    assert "--resume" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f'{{"schema": {SCHEMA + 1}}}', f"has schema {SCHEMA + 1}, this lab knows up to {SCHEMA}"),
        ('{"schema": 1, "status": "o', "is not readable JSON"),
        ("", "is not readable JSON"),
        ("\xff\xfe", "is not readable JSON"),
        ("[1]", "has no schema number"),
        ('{"status": "ok"}', "has no schema number"),
        ('{"schema": "1"}', "has no schema number"),
    ],
)
def test_a_status_that_cannot_be_used(run: Run, text: str, problem: str) -> None:
    path = run.trial("000-a-r0").status
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LabError) as caught:
        read_json(path)
    assert caught.value.problem == f"radix/{NAME}/trials/000-a-r0/status.json {problem}".removeprefix(
        "radix/"
    )
    assert caught.value.why
    assert caught.value.fix


def test_a_json_file_that_is_missing(run: Run) -> None:
    with pytest.raises(LabError, match=r"trials/000-a-r0/status\.json is missing"):
        read_json(run.trial("000-a-r0").status)


def test_json_comes_back_with_its_schema(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": ["ü"]})
    assert read_json(tmp_path / "x.json") == {"schema": SCHEMA, "b": 1, "a": ["ü"]}
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["schema", "b", "a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A lone surrogate cannot be encoded, so the write breaks half-way."""
    path = tmp_path / "status.json"
    write_text(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new " * 100_000 + "\ud800")
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["status.json"]  # noqa: PTH208  hidden files too


def test_runs_are_listed_oldest_first_and_strangers_left_out(tmp_path: Path) -> None:
    names = ["20260102T030405Z-ab12", "20250102T030405Z-ffff", "20260102T030405Z-0000"]
    for name in (*names, "notes", "20260102T030405Z", ".hidden"):
        (tmp_path / "radix" / name).mkdir(parents=True)
    (tmp_path / "other" / "20240101T000000Z-0001").mkdir(parents=True)
    assert [r.path.name for r in list_runs(tmp_path, experiment="radix")] == sorted(names)
    assert [r.path.name for r in list_runs(tmp_path)] == ["20240101T000000Z-0001", *sorted(names)]
    assert list_runs(tmp_path / "nowhere") == ()
