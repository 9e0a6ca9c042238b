"""What the command line does with runs that are there: report, list, explain, clean. Each function is one task of
tasks.py, and returns the exit code; `conduct` runs experiments.

0 done; 2 trials failed or invalid; 3 with --strict, when a claim is refuted. A LabError becomes 1 in tasks.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab import places, scratch
from lab.claims import Verdict
from lab.errors import LabError, unknown_name
from lab.experiment import Experiment, experiment_names
from lab.hardware.detect import detect
from lab.hardware.model import read_hardware
from lab.hardware.nvml import busy, read_use
from lab.hardware.topo import show
from lab.plan import read_plan
from lab.rundir import Run, list_runs, read_json, verify
from lab.runtime import docker, engine
from lab.runtime.ledger import Ledger


def report(run: Run, *, strict: bool = False) -> int:
    """Rebuild tables, verdicts and report of a run from its raw files and the index of all runs, and print the verdicts."""
    sealed = run.sums.is_file()
    if sealed:
        verify(run)
    plan = read_plan(run)
    from lab.report.index import write_index
    from lab.report.render import analyse  # pandas and matplotlib, only when they are needed

    try:
        result = analyse(run)
    except OSError as error:
        raise LabError(
            f"the report of run {run.path.name} cannot be written",
            why=f"{error.strerror}: {error.filename}",
            fix="make the run's folder writable, or copy the run into runs/ of a checkout that is",
        ) from error
    print(verdict_lines(result.verdicts))
    for trial, reason in result.unusable:
        print(f"not used: {trial}: {reason}")
    if not sealed:
        print(
            f"the run was cut short before it was sealed; go on with: invoke exp.{plan.experiment} --resume"
        )
    print(f"report: {run.report.relative_to(places.ROOT)}")
    index = write_index(places.RUNS, experiments=experiment_names(places.EXPERIMENTS))
    print(f"index: {index.relative_to(places.ROOT)}")
    if result.unusable or not sealed:
        return 2
    return 3 if strict and any(v.outcome == "refuted" for v in result.verdicts) else 0


def verdict_lines(verdicts: tuple[Verdict, ...]) -> str:
    """One line a verdict, for the terminal."""
    width = max((len(v.claim) for v in verdicts), default=0)
    lines = []
    for v in verdicts:
        number = "" if v.value is None else f"{v.number()}; "
        lines.append(f"{v.claim:<{width}}  {v.outcome:<12}  {number}{v.reason}")
    return "\n".join(lines)


def explanation(experiment: Experiment) -> str:
    """What an experiment asks, does and expects, for reading before it is run."""
    lines = [experiment.question, "", experiment.mechanism, "", "Variants:"]
    lines += [f"  {v.name}: {v.says} {' '.join(v.args)}".rstrip() for v in experiment.variants]
    lines += ["", "Each trial starts a fresh server and runs, each from a flushed cache:"]
    for load in experiment.loads:
        only = f" (only {', '.join(load.variants)})" if load.variants else ""
        lines.append(f"  {load.name}: {load.requests()} requests, {load.dataset}{only}")
    lines += ["", "Claims, judged on the 95 % interval over the repeats:"]
    lines += [f"  {c.name}: {c.says} ({c.measure.label()}: {c.expectation()})" for c in experiment.claims]
    return "\n".join(lines)


def find_run(which: str | None, *, experiment: str | None = None) -> Run:
    """The run named `which` (the last part of its path is enough), or the newest."""
    runs = list_runs(places.RUNS, experiment=experiment)
    if not runs:
        raise LabError("there is no run yet", why="runs/ is empty", fix="make one: invoke exp.radix")
    if which is None:
        return runs[-1]
    wanted = Path(which).name
    for run in runs:
        if run.path.name == wanted:
            return run
    raise unknown_name("run", wanted, [run.path.name for run in runs])


def list_all_runs() -> int:
    """Print every run with its state, oldest first."""
    runs = list_runs(places.RUNS)
    if not runs:
        print("no runs yet; make one: invoke exp.radix")
    for run in runs:
        print(f"{run.path.parent.name}/{run.path.name}  {_state_of(run)}")
    return 0


def clean(*, cache: bool) -> int:
    """End what killed labs left behind; with `cache` also delete built stacks, models and their logs."""
    swept = Ledger(places.state()).sweep(print)
    folders = scratch.sweep()
    print(f"swept: processes of {len(swept)} killed labs, {len(folders)} scratch folders, {_swept_engine()}")
    if cache and places.cache().exists():
        shutil.rmtree(places.cache())
        print("deleted the built stacks and models; the next run builds them again")
    return 0


def topo(file: str, *, as_json: bool) -> int:
    """Print the machine, or the one in a file: links, NUMA nodes, and where servers would be placed."""
    hardware = read_hardware(Path(file)) if file else detect()
    used = {} if file else busy(read_use([gpu.uuid for gpu in hardware.gpus]))
    print(show(hardware, as_json=as_json, busy=used), end="")
    return 0


def _swept_engine() -> str:
    """What was removed at the Docker engine, in words."""
    try:
        removed = docker.sweep(engine.connect(), print)
    except LabError as error:
        return f"nothing at a Docker engine ({error.problem})"
    return f"{len(removed)} things at the Docker engine"


def _state_of(run: Run) -> str:
    try:
        plan = read_plan(run)
        states = []
        for trial in plan.trials:
            status = run.trial(trial.name).status
            states.append(str(read_json(status).get("status")) if status.exists() else "not run")
    except LabError as error:
        return f"unreadable: {error.problem}"
    done = states.count("ok")
    sealed = "" if run.sums.is_file() else ", not sealed"
    return f"{done} of {len(states)} trials ok{sealed}{', reported' if run.report.is_file() else ''}"


def whole_number(flag: str, text: str) -> int | None:
    """The number behind a flag; None where the flag was not given."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise LabError(
            f"{flag} {text} is not a whole number", why="it counts things", fix=f"{flag} 3"
        ) from None
