"""`invoke exp.all`: every experiment that can run here, cheapest first, one after the other. In goes what the command line
asks for; out come runs, a summary and the exit code. What is done is noted in a series, so that it can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

from lab import places
from lab.app import find_run
from lab.conduct import Asked, check_machine, planned, resolved, run_experiment
from lab.cost import estimate_s, minutes
from lab.digest import read_digest
from lab.errors import LabError
from lab.experiment import experiment_names, load_experiment
from lab.plan import Plan, read_plan
from lab.prepare import Prepared
from lab.resume import check_resumable
from lab.rundir import SERIES, Run, fresh_name, index_file, list_runs, read_json, verify
from lab.series import Part, Series, find_series, write_series
from lab.weights import require

DEFAULTS = {"model": "nano", "site": "local"}  # as of the single experiments; all else is empty


class RunOne(Protocol):
    """`conduct.run_experiment`, or what stands in for it."""

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
    ) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Coming:
    """An experiment to run: what it takes, the run to go on with if there is one, and why a run of before is not kept."""

    experiment: str
    plan: Plan
    seconds: float
    resume: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What will be done: experiments to run, cheapest first; those that are done; those that cannot run, with the reason."""

    coming: tuple[Coming, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


def run_all(
    given: Asked, *, dry_run: bool, resume: str | bool | None, strict: bool, run_one: RunOne = run_experiment
) -> int:
    """Run all experiments. `given` has empty strings where the command line says nothing.

    0 done; 2 when trials failed or are invalid, or an error ended an experiment; 3 with `strict` when a claim is refuted.
    """
    names = _names()
    before = find_series(places.RUNS, resume if isinstance(resume, str) else None) if resume else None
    asked = completed(given, before)
    if asked.hardware and not dry_run:
        raise LabError("--hardware plans for a machine, it cannot run there", fix="add --dry-run")
    prepared = resolved(asked, runtime="", dry_run=dry_run)
    if not asked.hardware:
        require(prepared.model, prepared.weights)
    outlook = look_ahead(names, asked, prepared=prepared, before=before, dry_run=dry_run)
    print(announcement(outlook), flush=True)
    if dry_run:
        return 0
    if not outlook.coming and not outlook.kept:
        raise LabError("no experiment can run here", why="the reasons stand above", fix="see invoke doctor")
    if outlook.coming:
        check_machine(prepared)
    series = before or Series(name=fresh_name(), asked=asdict(asked))
    for number, coming in enumerate(outlook.coming, start=1):
        _say_next(number, coming, outlook)
        series = _run(coming, asked, series=series, strict=strict, run_one=run_one)
    return _conclude(series, outlook, strict=strict)


def completed(given: Asked, before: Series | None) -> Asked:
    """What is asked for, with defaults, and for a series that is gone on with as it was begun. `LabError` when both
    say something and not the same."""
    values: dict[str, str | int | None] = {}
    for name in (f.name for f in fields(Asked)):
        now = getattr(given, name)
        default = DEFAULTS.get(name)
        old = before.asked.get(name) if before else None
        if before and now and now != (old or default):
            raise LabError(
                f"series {before.name} was begun with {name} {old or 'as the lab chooses'}, not {now}",
                why="its runs would not be one series",
                fix=f"leave --{name} out, or start a new series",
            )
        values[name] = now or old or default or now
    return replace(given, **values)  # type: ignore[arg-type]  # fields of Asked, read from one


def look_ahead(
    names: tuple[str, ...], asked: Asked, *, prepared: Prepared, before: Series | None, dry_run: bool
) -> Outlook:
    """What is to be done for each of `names`; nothing is started."""
    coming: list[Coming] = []
    kept: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name in names:
        part = before.parts.get(name) if before else None
        try:
            found = _look(name, asked, prepared=prepared, part=part, dry_run=dry_run)
        except LabError as error:
            left_out.append((name, error.brief))
            continue
        if found is None:
            kept.append(name)
        else:
            coming.append(found)
    coming.sort(key=lambda c: (c.seconds, c.experiment))
    return Outlook(coming=tuple(coming), kept=tuple(kept), left_out=tuple(left_out))


def _look(name: str, asked: Asked, *, prepared: Prepared, part: Part | None, dry_run: bool) -> Coming | None:
    """What is to be done for an experiment; None where its run of the series is done."""
    source = load_experiment(name, folder=places.EXPERIMENTS)
    plan, _ = planned(source, prepared, asked)
    fresh = Coming(experiment=name, plan=plan, seconds=estimate_s(plan))
    if part is None or not part.run:
        return fresh
    run = {run.path.name: run for run in list_runs(places.RUNS, experiment=name)}.get(part.run)
    if run is None:
        return replace(fresh, why=f"run {part.run} is gone")
    try:
        if run.sums.is_file():
            verify(run)
        old = read_plan(run)
        if old.runtime != plan.runtime:  # a run keeps its own
            prepared = resolved(asked, runtime=old.runtime, dry_run=dry_run)
            plan, _ = planned(source, prepared, asked)
        check_resumable(run, old, source=source, plan=plan, repeats=asked.repeats)
        ok = {trial.name for trial in old.trials if _is_ok(run, trial.name)}
    except LabError as error:
        return replace(fresh, why=error.problem)
    if len(ok) == len(old.trials) and read_digest(run).state == "reported":
        return None
    return Coming(experiment=name, plan=old, seconds=estimate_s(old, done=ok), resume=part.run)


def _is_ok(run: Run, trial: str) -> bool:
    path = run.trial(trial).status
    return path.exists() and read_json(path).get("status") == "ok"


def _run(coming: Coming, asked: Asked, *, series: Series, strict: bool, run_one: RunOne) -> Series:
    """Run one experiment and note how it went, at every step, so that a crash finds it written."""
    old = series.parts.get(coming.experiment, Part(experiment=coming.experiment))
    spent = old.seconds if coming.resume else 0.0
    part = Part(experiment=coming.experiment, run=coming.resume)
    started = time.monotonic()

    def began(run: Run) -> None:
        nonlocal part
        part = replace(part, run=run.path.name)
        write_series(places.RUNS, series.noting(part))

    def ended(**how: object) -> Series:
        done = replace(part, seconds=round(spent + time.monotonic() - started, 1), **how)  # type: ignore[arg-type]
        noted = series.noting(done)
        write_series(places.RUNS, noted)
        return noted

    write_series(places.RUNS, series.noting(part))
    try:
        code = run_one(
            coming.experiment,
            asked,
            dry_run=False,
            explain=False,
            resume=coming.resume or None,
            strict=strict,
            began=began,
        )
    except LabError as error:
        print(f"error: {error}", flush=True)
        return ended(state="stopped", reason=error.problem)
    except BaseException:  # Ctrl-C, or our bug: the time counts, and the series can be gone on with
        ended(state="running")
        raise
    return ended(state="ended", code=code)


def _names() -> tuple[str, ...]:
    """The experiments; `LabError` where one has the name of the series."""
    names = experiment_names(places.EXPERIMENTS)
    if SERIES in names:
        raise LabError(
            f"an experiment cannot be called {SERIES!r}",
            why=f"invoke exp.{SERIES} runs all of them",
            fix=f"rename lab/experiments/{SERIES}.py, and the name in it",
        )
    return names


def announcement(outlook: Outlook) -> str:
    """What is going to be done, in lines for the terminal."""
    seconds = sum(coming.seconds for coming in outlook.coming)
    width = max((len(coming.experiment) for coming in outlook.coming), default=0)
    head = f"{_count(len(outlook.coming), 'experiment')} to run, {minutes(seconds)} in all, cheapest first"
    lines = [head if outlook.coming else "no experiment to run"]
    for coming in outlook.coming:
        trials = f"{_count(len(coming.plan.trials), 'trial'):>9}, {minutes(coming.seconds)}"
        more = f"; goes on with run {coming.resume}" if coming.resume else ""
        more += f"; begins anew: {coming.why}" if coming.why else ""
        lines.append(f"  {coming.experiment:<{width}}  {trials}{more}")
    lines += [f"  {name}: done already, kept" for name in outlook.kept]
    lines += [f"  {name}: cannot run here: {reason}" for name, reason in outlook.left_out]
    return "\n".join(lines)


def _say_next(number: int, coming: Coming, outlook: Outlook) -> None:
    rest = sum(later.seconds for later in outlook.coming[number - 1 :])
    print(
        f"\n{number} of {len(outlook.coming)}: {coming.experiment}, {minutes(coming.seconds)}; "
        f"{minutes(rest)} to the end",
        flush=True,
    )


def _conclude(series: Series, outlook: Outlook, *, strict: bool) -> int:
    """Print what came of it, and return the exit code."""
    order = (*outlook.kept, *(coming.experiment for coming in outlook.coming))
    rows, codes = [], set()
    for name in order:
        part = series.parts[name]
        row, code = _row(part, kept=name in outlook.kept, strict=strict)
        rows.append(row)
        codes.add(code)
    rows += [(name, "not run", "", "", reason) for name, reason in outlook.left_out]
    print("\n" + table(("experiment", "verdicts", "trials used", "minutes", "report"), rows))
    if 2 in codes:
        print(
            f"what failed or was not run can be repeated: invoke exp.all --resume {series.name}\n"
            "an invalid trial needs a new run: invoke exp.<name>"
        )
    index = index_file(places.RUNS)
    if index.is_file():
        print(f"index: {index.relative_to(places.ROOT)}")
    return 2 if 2 in codes else 3 if 3 in codes else 0


def _row(part: Part, *, kept: bool, strict: bool) -> tuple[tuple[str, ...], int]:
    """A line of the summary, and what the experiment adds to the exit code."""
    took = "kept" if kept else f"{part.seconds / 60:.1f}"
    if part.state != "ended" and not kept:
        return (part.experiment, "stopped", "", took, part.reason), 2
    digest = read_digest(find_run(part.run, experiment=part.experiment))
    report = digest.run.report.relative_to(places.ROOT).as_posix()
    row = (part.experiment, digest.counts(), digest.used_of(), took, report)
    refuted = strict and any(answer.outcome == "refuted" for answer in digest.answers.values())
    bad = digest.used != digest.trials or (part.code == 2 and not kept)
    return row, 2 if bad else 3 if refuted else 0


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned columns, the last one as long as it is."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join(
            (*(text.ljust(width) for text, width in zip(line[:-1], widths, strict=True)), line[-1])
        ).rstrip()
        for line in lines
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
