"""`invoke exp.all`: order, what stops it and what does not, and going on with a series. Running one experiment is stood in
for; plans, checks and files are real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import NO_ENGINE, Copy, Done, assert_refused, make_copy, snapshot
from fakerun import EXPERIMENT, make_run

from lab import places
from lab.conduct import Asked, planned, resolved
from lab.errors import LabError
from lab.experiment import load_experiment
from lab.plan import to_json
from lab.runall import run_all, table
from lab.rundir import SCHEMA, Run, list_runs, list_series, seal, series_file, write_json, write_text
from lab.series import Part, Series, find_series, read_series, write_series

NOTHING = Asked(stack="", model="", site="")
NAME = "20260102T030405Z-ab12"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """A copy of the repository as the place of everything, with three experiments: `quick`, `small` and `broken`."""
    copy = make_copy(tmp_path / "copy")
    for path in copy.small.parent.glob("*.py"):
        path.unlink()
    copy.small.write_text(EXPERIMENT)
    quick = EXPERIMENT.replace('name="small"', 'name="quick"').replace("repeats=2", "repeats=1")
    copy.small.with_name("quick.py").write_text(quick)
    broken = EXPERIMENT.replace('name="small"', 'name="broken"').replace("--disable-radix-cache", '--tp", "x')
    copy.small.with_name("broken.py").write_text(broken.replace('variant="cache-on"', 'variant="gone"'))
    for name, folder in (
        ("ROOT", "."),
        ("EXPERIMENTS", "lab/experiments"),
        ("SITES", "lab/sites"),
        ("RUNS", "runs"),
    ):
        monkeypatch.setattr(places, name, (copy.root / folder).resolve())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_HOST", NO_ENGINE)
    return copy


class StandIn:
    """Stands in for `run_experiment`: leaves a run with raw files, verdicts and the table of trials, and notes how it was called.

    `how` says by experiment what happens instead: an error that is raised once the run's folder is there, or an exit code.
    """

    def __init__(self, **how: BaseException | int) -> None:
        self.how = how
        self.calls: list[tuple[str, str]] = []
        self.outcomes = ("held", "held")

    def __call__(
        self,
        name: str,
        asked: Asked,
        /,
        *,
        dry_run: bool,
        explain: bool,
        resume: str | bool | None,
        strict: bool,
        began: Callable[[Run], None],
    ) -> int:
        assert not dry_run
        assert not explain
        self.calls.append((name, str(resume or "")))
        how = self.how.get(name, 0)
        run = Run(places.RUNS / name / str(resume)) if resume else self._measure(name, asked)
        began(run)
        if isinstance(how, BaseException):
            run.sums.unlink(missing_ok=True)
            raise how
        for trial in trials_of(run) if resume else ():
            status = run.trial(trial).status
            if not status.exists() or '"failed"' in status.read_text():
                write_json(status, {"status": "ok"})
        seal(run)
        verdicts = [
            {"claim": claim, "outcome": outcome, "reason": ""}
            for claim, outcome in zip(("hits", "faster"), self.outcomes, strict=True)
        ]
        write_json(run.verdicts, {"verdicts": verdicts})
        states = ["invalid" if how == 2 else "valid", *["valid"] * (len(list(run.trials.iterdir())) - 1)]
        write_text(run.tables / "trials.csv", "\n".join(("validity", *states)) + "\n")
        write_text(run.report, "# report\n")
        return 3 if strict and "refuted" in self.outcomes and not how else how

    def _measure(self, name: str, asked: Asked) -> Run:
        source = load_experiment(name, folder=places.EXPERIMENTS)
        made = make_run(places.ROOT, repeats=asked.repeats or source.experiment.repeats, source=source)
        count = len(list_runs(places.RUNS, experiment=name))
        run = Run(made.path.rename(made.path.with_name(f"2026010{count}T000000Z-000{count}")))
        plan, _ = planned(source, resolved(asked, runtime="", dry_run=False), asked)
        write_text(run.plan, to_json(plan))
        return run


def go(stand_in: StandIn, given: Asked = NOTHING, *, resume: str | bool = False, strict: bool = False) -> int:
    return run_all(given, dry_run=False, resume=resume, strict=strict, run_one=stand_in)


def noted() -> Series:
    (path,) = list_series(places.RUNS)
    return read_series(path)


# ---- a series from start to end


def test_the_cheapest_comes_first_and_what_cannot_run_stops_nothing(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn()
    assert go(stand_in) == 0
    assert stand_in.calls == [("quick", ""), ("small", "")]
    said = capsys.readouterr().out
    assert "2 experiments to run, about " in said
    assert "broken: cannot run here: unknown variant 'gone'" in said
    assert "1 of 2: quick, " in said
    assert "2 of 2: small, " in said
    assert re.search(
        r"^quick +2 held +2 of 2 +0\.0 +runs/quick/20260101T000000Z-0001/report\.md$", said, re.M
    )
    assert re.search(r"^small +2 held +4 of 4 ", said, re.M)
    assert re.search(r"^broken +not run +unknown variant", said, re.M)
    parts = noted().parts
    assert {name: (part.state, part.code) for name, part in parts.items()} == {
        "quick": ("ended", 0),
        "small": ("ended", 0),
    }
    assert noted().asked["model"] == "nano"


def test_more_repeats_change_the_estimate_and_reach_the_experiments(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Asked(stack="", model="", site="", repeats=3)
    assert run_all(given, dry_run=True, resume=False, strict=False) == 0
    said = capsys.readouterr().out
    assert said.count("  6 trials") == 2
    assert not places.RUNS.exists()


def test_an_error_ends_an_experiment_and_not_the_series(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(quick=LabError("the disk is full", why="of things", fix="make room"))
    assert go(stand_in) == 2
    assert stand_in.calls == [("quick", ""), ("small", "")]
    said = capsys.readouterr().out
    assert "error: the disk is full\n  why: of things" in said
    assert re.search(r"^quick +stopped +0\.0 +the disk is full$", said, re.M)
    assert f"invoke exp.all --resume {noted().name}" in said
    assert (noted().parts["quick"].state, noted().parts["quick"].reason) == ("stopped", "the disk is full")


def test_trials_that_cannot_be_used_make_it_2_and_stop_nothing(copy: Copy) -> None:
    stand_in = StandIn(quick=2)
    assert go(stand_in) == 2
    assert [name for name, _ in stand_in.calls] == ["quick", "small"]


@pytest.mark.parametrize(("strict", "bad", "code"), [(False, 0, 0), (True, 0, 3), (True, 2, 2)])
def test_a_refuted_claim_counts_with_strict_only(copy: Copy, strict: bool, bad: int, code: int) -> None:
    stand_in = StandIn(small=bad)
    stand_in.outcomes = ("held", "refuted")
    assert go(stand_in, strict=strict) == code


def test_when_nothing_can_run_that_is_said(copy: Copy) -> None:
    for name in ("quick", "small"):
        copy.small.with_name(f"{name}.py").unlink()
    with pytest.raises(LabError, match="no experiment can run here"):
        go(StandIn())
    assert list_series(places.RUNS) == ()


def test_no_experiment_may_have_the_name_of_the_series(copy: Copy) -> None:
    copy.small.with_name("all.py").write_text(EXPERIMENT.replace('name="small"', 'name="all"'))
    with pytest.raises(LabError, match="an experiment cannot be called 'all'") as caught:
        go(StandIn())
    assert "rename lab/experiments/all.py" in caught.value.fix


# ---- going on with it


def stopped(copy: Copy) -> StandIn:
    """A series that was ended by Ctrl-C in its second experiment."""
    stand_in = StandIn(small=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(stand_in)
    (run,) = list_runs(places.RUNS, experiment="small")
    run.trial(trials_of(run)[-1]).status.unlink()
    return stand_in


def trials_of(run: Run) -> list[str]:
    return sorted(path.name for path in run.trials.iterdir())


def test_ctrl_c_ends_the_series_which_then_goes_on(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    third = EXPERIMENT.replace('name="small"', 'name="third"').replace("repeats=2", "repeats=5")
    copy.small.with_name("third.py").write_text(third)
    assert [name for name, _ in stopped(copy).calls] == ["quick", "small"]
    part = noted().parts["small"]
    assert (part.state, part.run) == ("running", "20260101T000000Z-0001")
    capsys.readouterr()
    again = StandIn()
    assert go(again, resume=True) == 0
    assert again.calls == [("small", "20260101T000000Z-0001"), ("third", "")]
    said = capsys.readouterr().out
    assert "quick: done already, kept" in said
    assert "goes on with run 20260101T000000Z-0001" in said
    assert re.search(r"^quick +2 held +2 of 2 +kept +runs/quick", said, re.M)
    assert len(list_series(places.RUNS)) == 1
    assert [part.state for part in noted().parts.values()] == ["ended"] * 3
    done = StandIn()
    assert go(done, resume=noted().name) == 0
    assert done.calls == []


def test_a_bug_is_shown_and_the_series_goes_on_there(copy: Copy) -> None:
    with pytest.raises(ZeroDivisionError):
        go(StandIn(quick=ZeroDivisionError()))
    again = StandIn()
    assert go(again, resume=True) == 0
    assert again.calls == [("quick", "20260101T000000Z-0001"), ("small", "")]


def test_a_new_series_runs_everything_anew(copy: Copy) -> None:
    stopped(copy)
    again = StandIn()
    assert go(again) == 0
    assert again.calls == [("quick", ""), ("small", "")]
    assert len(list_series(places.RUNS)) == 2


def change_experiment(copy: Copy) -> None:
    path = copy.small.with_name("quick.py")
    path.write_text(path.read_text() + "\n# a new thought\n")


def change_raw_file(_: Copy) -> None:
    (run,) = list_runs(places.RUNS, experiment="quick")
    run.diff.chmod(0o644)
    run.diff.write_text("changed\n")


def remove_run(_: Copy) -> None:
    (run,) = list_runs(places.RUNS, experiment="quick")
    run.path.rename(run.path.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (change_experiment, "lab/experiments/quick.py has changed since"),
        (change_raw_file, "is not what was measured"),
        (remove_run, "run 20260101T000000Z-0001 is gone"),
    ],
)
def test_a_run_that_cannot_be_kept_is_made_anew_and_the_reason_said(
    copy: Copy, capsys: pytest.CaptureFixture[str], change: Callable[[Copy], None], why: str
) -> None:
    stopped(copy)
    change(copy)
    again = StandIn()
    assert go(again, resume=True) == 0
    assert ("quick", "") in again.calls
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "begins anew: " in line]
    assert why in line


def test_a_run_that_was_measured_and_not_reported_is_gone_on_with(copy: Copy) -> None:
    """Killed between the last trial and the report."""
    assert go(StandIn()) == 0
    (run,) = list_runs(places.RUNS, experiment="quick")
    run.verdicts.unlink()
    again = StandIn()
    assert go(again, resume=True) == 0
    assert again.calls == [("quick", run.path.name)]


def test_trials_that_failed_are_repeated_and_those_that_are_invalid_are_kept(copy: Copy) -> None:
    assert go(StandIn(quick=2, small=2)) == 2
    (run,) = list_runs(places.RUNS, experiment="small")
    status = run.trial(trials_of(run)[0]).status
    status.chmod(0o644)
    status.write_text('{"schema": 1, "status": "failed"}')
    seal(run)
    again = StandIn()
    assert go(again, resume=True) == 2, "the kept run still has an invalid trial"
    assert again.calls == [("small", run.path.name)]


def test_a_series_keeps_what_it_was_begun_with(copy: Copy) -> None:
    assert go(StandIn(), Asked(stack="cpu", model="", site="", repeats=2)) == 0
    again = StandIn()
    assert go(again, resume=True) == 0
    assert again.calls == []
    for given, option in (
        (Asked(stack="cpu046", model="", site=""), "stack cpu, not cpu046"),
        (Asked(stack="", model="", site="", repeats=5), "repeats 2, not 5"),
        (Asked(stack="", model="other", site=""), "model nano, not other"),
        (Asked(stack="", model="", site="", runtime="process"), "runtime as the lab chooses, not process"),
    ):
        with pytest.raises(LabError, match=f"was begun with {option}"):
            go(again, given, resume=True)


# ---- the note of a series


def test_a_series_comes_back_as_it_was_written(tmp_path: Path) -> None:
    series = Series(name=NAME, asked={"stack": "cpu", "repeats": None, "gpus": "", "weights": "dummy"})
    series = series.noting(Part(experiment="radix", run=NAME)).noting(Part(experiment="tp"))
    series = series.noting(Part(experiment="radix", run=NAME, state="ended", code=0, seconds=12.5))
    write_series(tmp_path, series)
    assert find_series(tmp_path, None) == series
    assert list(read_series(series_file(tmp_path, NAME)).parts) == ["radix", "tp"]


def test_the_newest_series_is_gone_on_with(tmp_path: Path) -> None:
    for name in ("20260102T030405Z-0000", "20260103T030405Z-0000", "20250103T030405Z-ffff"):
        write_series(tmp_path, Series(name=name, asked={}))
    write_text(tmp_path / "all" / "notes.json", "{")
    assert find_series(tmp_path, None).name == "20260103T030405Z-0000"
    for which in ("20260102T030405Z-0000", "runs/all/20260102T030405Z-0000.json"):
        assert find_series(tmp_path, which).name == "20260102T030405Z-0000"
    with pytest.raises(LabError, match="unknown series 'yesterday'"):
        find_series(tmp_path, "yesterday")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"schema": 1, "asked": {}, "par', "is not readable JSON"),
        (json.dumps({"schema": SCHEMA + 1, "asked": {}, "parts": []}), f"has schema {SCHEMA + 1}"),
        (json.dumps({"schema": 1}), "is not a series of this lab"),
        (json.dumps({"schema": 1, "asked": {"stack": []}, "parts": []}), "is not a series of this lab"),
        (
            json.dumps({"schema": 1, "asked": {}, "parts": [{"state": "ended"}]}),
            "is not a series of this lab",
        ),
    ],
)
def test_a_note_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    write_text(series_file(tmp_path, NAME), text)
    with pytest.raises(LabError, match=problem) as caught:
        find_series(tmp_path, None)
    assert caught.value.why
    assert caught.value.fix


def test_a_note_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "all").write_text("mine\n")
    with pytest.raises(LabError, match="the note of the series cannot be written"):
        write_series(tmp_path, Series(name=NAME, asked={}))


def test_columns_stand_below_each_other() -> None:
    assert table(("a", "bb", "c"), [("long", "x", "end"), ("y", "", "")]) == "a     bb  c\nlong  x   end\ny"


# ---- the command line


def test_a_dry_run_lists_and_starts_nothing(tmp_path: Path) -> None:
    copy = make_copy(tmp_path)
    copy.small.with_name("bad.py").write_text(EXPERIMENT)
    before = snapshot(copy.root)
    done = copy.invoke("exp.all", "--dry-run")
    assert done.code == 0, done.text
    lines = done.out.splitlines()
    assert re.fullmatch(r"\d+ experiments to run, about \d+ minutes in all, cheapest first", lines[0])
    assert re.match(r"  small +4 trials, about \d minutes?$", lines[1]), "nothing is as cheap as that"
    assert any(line.lstrip().startswith("radix ") for line in lines)
    assert "  bad: cannot run here: bad.py says name='small'" in done.out
    assert snapshot(copy.root) == before


REFUSED: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "no series": (("--resume",), "there is no series yet", ("invoke exp.all",)),
    "stack": (("--stack", "gpu"), "unknown stack 'gpu'", ("cpu",)),
    "model": (("--model", "llama"), "unknown model 'llama'", ("nano",)),
    "site": (("--site", "locl"), "unknown site 'locl'", ("did you mean 'local'",)),
    "repeats": (("--repeats", "many"), "--repeats many is not a whole number", ()),
    "repeats 0": (("--repeats", "0"), "no experiment can run here", ("--repeats 0 makes no sense",)),
    "hardware": (("--hardware", "box.json"), "--hardware plans for a machine", ("--dry-run",)),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    copy = make_copy(tmp_path_factory.mktemp("copy"))
    before = snapshot(copy.root)
    found = {name: copy.invoke("exp.all", *words) for name, (words, _, _) in REFUSED.items()}
    assert snapshot(copy.root) == before
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(answers: dict[str, Done], name: str) -> None:
    _, problem, also = REFUSED[name]
    assert_refused(answers[name], problem, *also)


def test_a_file_called_all_is_refused_by_name_and_the_rest_still_works(tmp_path: Path) -> None:
    copy = make_copy(tmp_path)
    copy.small.with_name("all.py").write_text(EXPERIMENT.replace('name="small"', 'name="all"'))
    assert_refused(copy.invoke("exp.all", "--dry-run"), "an experiment cannot be called 'all'")
    listed = copy.invoke("--list")
    assert listed.code == 0, listed.text
    assert listed.out.count("exp.all ") == 1
