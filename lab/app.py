"""What the command line does: each function is one task of tasks.py, and returns the exit code.

0 done; 2 trials failed or invalid; 3 with --strict, when a claim is refuted. A LabError becomes 1 in tasks.py."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lab import commands, places, scratch
from lab.claims import Verdict
from lab.errors import LabError, unknown_name
from lab.execute import execute
from lab.experiment import Experiment, Source, load_experiment
from lab.machine import describe, uncommitted
from lab.models import Model, ensure_model, get_model
from lab.plan import Plan, make_plan, read_plan, to_json
from lab.progress import Progress
from lab.rundir import Run, list_runs, read_json, verify, write_json, write_text
from lab.runtime.ledger import Ledger
from lab.runtime.ports import require_port
from lab.site import Site, load_site
from lab.stack import Stack, check_platform, check_resources, load_stack
from lab.stacks.build import ensure, stack_folder

RUN_DISK_GB = 0.5

RUN_README = """\
# Run {name} of experiment {experiment}

Raw, as measured: `plan.json` (everything that was to be done), `commands.sh` (the same without the lab),
`experiment.py` (the experiment's file), `environment.json` and `uncommitted.diff` (machine and code), `trials/`
(one folder a trial: status, logs, the server's arguments and its record of each request; below `loads/` what the
client saw and the metrics before and after). `SHA256SUMS` lists it all: `sha256sum --check --quiet SHA256SUMS`.

Derived, rebuilt by `invoke report --run {name}`: `tables/`, `verdicts.json`, `plots/`, `report.md`.
"""


def run_experiment(
    name: str,
    *,
    repeats: int | None,
    stack: str,
    model: str,
    site: str,
    dry_run: bool,
    explain: bool,
    resume: str | bool | None,
    strict: bool,
) -> int:
    """Plan, execute, analyse and report one experiment."""
    source = load_experiment(name, folder=places.EXPERIMENTS)
    chosen_stack, chosen_model = load_stack(stack, root=places.ROOT), get_model(model)
    check_platform(chosen_stack)
    chosen_site = load_site(site, folder=places.SITES)
    if explain:
        print(explanation(source.experiment))
        return 0
    where = _places(chosen_stack, chosen_model)
    plan = make_plan(
        source,
        stack=chosen_stack,
        model=chosen_model,
        model_sha256=chosen_model.sha256,
        site=chosen_site,
        places=where,
        repeats=repeats,
    )
    if dry_run:
        print(commands.script(plan), end="")
        return 0
    with Progress() as progress:
        # Whatever can be refused is refused before a build of minutes begins.
        _check_machine(chosen_stack)
        if chosen_site.port:
            require_port(chosen_site.port)
        resumed = _resumed(name, resume, source=source, where=where, repeats=repeats) if resume else None
        Ledger(places.state()).sweep(progress.step)
        scratch.sweep()
        stack_dir = ensure(chosen_stack, cache=places.cache(), say=progress.step, live=progress.live)
        ensure_model(
            chosen_model, cache=places.cache(), python=stack_dir / "bin" / "python", say=progress.step
        )
        if resumed is not None:
            run, plan = resumed
        else:
            run = _new_run(plan, source, site=chosen_site, stack_dir=stack_dir)
        progress.step(f"run {run.path.relative_to(places.ROOT)}: {len(plan.trials)} trials")
        outcome = execute(plan, run, ledger=Ledger(places.state()), progress=progress)
    code = report(run, strict=strict)
    if outcome.failed or outcome.not_run:
        print(
            f"{outcome.failed} trials failed, {outcome.not_run} were not run; "
            f"repeat them with: invoke exp.{name} --resume"
        )
        return 2
    return code


def report(run: Run, *, strict: bool = False) -> int:
    """Rebuild tables, verdicts and report of a run from its raw files, and print the verdicts."""
    sealed = run.sums.is_file()
    if sealed:
        verify(run)
    plan = read_plan(run)
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
    for run in list_runs(places.RUNS):
        print(f"{run.path.parent.name}/{run.path.name}  {_state_of(run)}")
    return 0


def clean(*, cache: bool) -> int:
    """End what killed labs left behind; with `cache` also delete built stacks, models and their logs."""
    swept = Ledger(places.state()).sweep(print)
    folders = scratch.sweep()
    print(f"swept: processes of {len(swept)} killed labs, {len(folders)} scratch folders")
    if cache and places.cache().exists():
        shutil.rmtree(places.cache())
        print("deleted the built stacks and models; the next run builds them again")
    return 0


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


def _places(stack: Stack, model: Model) -> dict[str, str]:
    cache = places.cache()
    model_dir = model.path or cache / "models" / f"{model.name}-{model.sha256[:12]}"
    return {
        "STACK": str(stack_folder(stack, cache=cache)),
        "MODEL": str(model_dir),
        "LAB": str(places.PACKAGE),
    }


def _check_machine(stack: Stack) -> None:
    available = psutil.virtual_memory().available / 1e9
    check_resources(stack, memory_available_gb=available)
    try:
        places.RUNS.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=places.RUNS):  # os.access says yes to root on a read-only disk
            pass
    except OSError as error:
        raise _not_writable(error) from error
    free = shutil.disk_usage(places.RUNS).free / 1e9
    if free < RUN_DISK_GB:
        raise LabError(
            f"{free:.1f} GB of disk are free for runs",
            why=f"a run may take {RUN_DISK_GB} GB",
            fix="make room, or delete old runs below runs/",
        )


def _new_run(plan: Plan, source: Source, *, site: Site, stack_dir: Path) -> Run:
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    run = Run(places.RUNS / plan.experiment / name)
    try:
        run.path.mkdir(parents=True)
        write_text(run.plan, to_json(plan))
        write_text(run.commands, commands.script(plan))
        write_text(run.experiment, source.text)
        write_text(run.diff, uncommitted(places.ROOT))
        write_text(run.readme, RUN_README.format(experiment=plan.experiment, name=name))
        environment = {
            "machine": describe(places.ROOT),
            "stack": read_json(stack_dir / "lab-stack.json"),
            "choices": {"runtime": site.runtime, "site": site.name, "reasons": list(site.reasons)},
        }
        write_json(run.environment, environment)
    except OSError as error:
        raise _not_writable(error) from error
    return run


def _not_writable(error: OSError) -> LabError:
    return LabError(
        "the folder for runs cannot be written",
        why=f"{error.strerror}: {error.filename}",
        fix="make runs/ writable, or run the lab from a checkout that is",
    )


def _resumed(
    name: str, which: str | bool, *, source: Source, where: dict[str, str], repeats: int | None
) -> tuple[Run, Plan]:
    """The run to go on with, and its plan; refused when the experiment or the software has changed."""
    run = find_run(which if isinstance(which, str) else None, experiment=name)
    if run.sums.is_file():
        verify(run)
    plan = read_plan(run)
    if plan.experiment_sha256 != source.sha256:
        raise LabError(
            f"run {run.path.name} cannot be resumed: lab/experiments/{name}.py has changed since",
            why="its claims and loads were registered with the old file",
            fix="start a new run, or restore the file from the run's experiment.py",
        )
    if repeats not in (None, plan.repeats):
        raise LabError(
            f"run {run.path.name} was planned with {plan.repeats} repeats, not {repeats}",
            why="a plan is not changed once its run has begun",
            fix="leave --repeats out, or start a new run",
        )
    if plan.places != where:
        raise LabError(
            f"run {run.path.name} cannot be resumed: it used another stack or model",
            why=f"planned {plan.places}, now {where}",
            fix="name the same --stack and --model, or start a new run",
        )
    return run, plan


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
