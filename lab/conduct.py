"""One experiment from the command line to its report: decide, refuse what can be refused, build what is missing, plan,
execute, analyse."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from lab import commands, places, scratch
from lab.app import explanation, report
from lab.choice import fitting_stack
from lab.errors import LabError
from lab.execute import execute
from lab.experiment import Source, load_experiment
from lab.hardware.detect import detect
from lab.hardware.model import read_hardware
from lab.hardware.model import to_json as to_json_hardware
from lab.images.context import check_lock
from lab.machine import describe, uncommitted
from lab.models import get_model
from lab.plan import Plan, to_json
from lab.planning import make_plan
from lab.possible import possible
from lab.prepare import NoImageError, Prepared, make, resolve, without_containers
from lab.progress import Progress
from lab.resume import check_image, check_resumable, to_resume
from lab.rundir import RUN_DISK_GB, Run, fresh_name, write_json, write_text
from lab.runtime.base import Runtime
from lab.runtime.docker import DockerRuntime, sweep
from lab.runtime.gpulock import gpus_locked, shared_folder
from lab.runtime.ledger import Ledger
from lab.runtime.ports import require_port
from lab.runtime.process import ProcessRuntime
from lab.site import load_site, scaled
from lab.stack import all_stacks, check_driver, check_platform, check_resources, load_stack
from lab.weights import about, hub_cache, locate, require

RUN_README = """\
# Run {name} of experiment {experiment}

Raw, as measured: `plan.json` (everything that was to be done), `commands.sh` (the same without the lab),
`experiment.py` (the experiment's file), `environment.json` and `uncommitted.diff` (machine and code), `trials/`
(one folder a trial: status, logs, the server's arguments and its record of each request; below `events/` what the
probe saw inside it, below `loads/` what the client saw and the metrics before and after). `SHA256SUMS` lists it all:
`sha256sum --check --quiet SHA256SUMS`.

Derived, rebuilt by `invoke report --run {name}`: `tables/`, `verdicts.json`, `plots/`, `report.md`.
"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says about a run; empty strings and None where it says nothing."""

    stack: str
    model: str
    site: str
    weights: str = ""
    runtime: str = ""
    scale: str = ""
    gpus: str = ""
    hardware: str = ""
    repeats: int | None = None


def run_experiment(
    name: str,
    asked: Asked,
    *,
    dry_run: bool,
    explain: bool,
    resume: str | bool | None,
    strict: bool,
    began: Callable[[Run], None] = lambda run: None,  # noqa: ARG005
) -> int:
    """Plan, execute, analyse and report one experiment. `began` is told the run once its folder is there."""
    source = load_experiment(name, folder=places.EXPERIMENTS)
    if asked.hardware and not dry_run:
        raise LabError(
            "--hardware plans for a machine, it cannot run there",
            why="the file describes a machine, this may be another one",
            fix="add --dry-run",
        )
    if explain:
        print(explanation(source.experiment))
        return 0
    old = to_resume(name, resume) if resume else None
    prepared = resolved(asked, runtime=old[1].runtime if old else "", dry_run=dry_run)
    plan, fits = planned(source, prepared, asked)  # made before anything is built, for what it refuses
    prepared = replace(prepared, site=replace(prepared.site, reasons=(*prepared.site.reasons, *fits)))
    if not asked.hardware:
        require(prepared.model, prepared.weights)
    if dry_run:
        for reason in prepared.site.reasons:
            print(f"# {reason}", file=sys.stderr)
        print(commands.script(plan), end="")
        return 0
    with Progress() as progress:
        # Whatever can be refused is refused before a build of minutes begins.
        check_machine(prepared)
        if old:
            check_resumable(*old, source=source, plan=plan, repeats=asked.repeats)
        _sweep(prepared, progress=progress)
        for reason in prepared.site.reasons:
            progress.step(reason)
        try:
            prepared, software = make(prepared, progress=progress)
        except NoImageError as error:
            if prepared.insisted or old:
                raise
            prepared = without_containers(prepared, error=error)
            progress.step(prepared.site.reasons[0])
            check_machine(prepared)
            prepared, software = make(prepared, progress=progress)
        if old:
            run, plan = old
            check_image(plan, prepared)
        else:
            plan, _ = planned(source, prepared, asked)
            run = _new_run(plan, source, prepared=prepared, software=software)
        began(run)
        progress.step(f"run {run.path.relative_to(places.ROOT)}: {len(plan.trials)} trials")
        gpus = sorted({gpu for trial in plan.trials for gpu in trial.server.gpus})
        with gpus_locked(gpus, run_id=run.path.name, folder=shared_folder()):
            runtime = _runtime(prepared, plan, run=run, progress=progress)
            outcome = execute(plan, run, runtime=runtime, progress=progress)
    code = report(run, strict=strict)
    if outcome.failed or outcome.not_run:
        print(
            f"{outcome.failed} trials failed, {outcome.not_run} were not run; "
            f"repeat them with: invoke exp.{name} --resume"
        )
        return 2
    return code


def resolved(asked: Asked, *, runtime: str, dry_run: bool) -> Prepared:
    """What the command line asks for; a run that is resumed keeps its `runtime`."""
    model = get_model(asked.model)
    site = scaled(load_site(asked.site, folder=places.SITES), asked.scale)
    hardware = read_hardware(Path(asked.hardware)) if asked.hardware else detect()
    every = all_stacks(places.ROOT)
    name, reason = (asked.stack, "") if asked.stack else fitting_stack(hardware, stacks=every)
    stack = load_stack(name, root=places.ROOT)
    check_driver(stack, driver=hardware.driver.version if hardware.driver else "", stacks=every)
    if reason:
        site = replace(site, reasons=(f"stack {name}: {reason}", *site.reasons))
    weights = locate(model, asked=asked.weights, cache=places.cache(), hub=hub_cache(os.environ))
    chosen = asked.runtime or runtime
    return resolve(
        stack, model, weights=weights, site=site, hardware=hardware, runtime=chosen, dry_run=dry_run
    )


def planned(source: Source, prepared: Prepared, asked: Asked) -> tuple[Plan, tuple[str, ...]]:
    """The plan of an experiment with what was decided, and in words where the model's files are and how it fits;
    `LabError` for what this machine or release cannot do."""
    named = [word for word in asked.gpus.split(",") if word.strip()]
    if asked.gpus and not named:
        raise LabError(f"--gpus {asked.gpus} names no GPU", why="it is a list", fix="--gpus 0,1")
    found = possible(
        source.experiment,
        model=prepared.model,
        stack=prepared.stack,
        site=prepared.site,
        hardware=prepared.hardware,
        asked=named,
        busy=prepared.busy,
    )
    plan = make_plan(
        source,
        stack=prepared.stack,
        model=prepared.model,
        model_sha256=prepared.weights.sha256,
        weights=prepared.weights.kind,
        site=prepared.site,
        places=prepared.places,
        containers=prepared.containers,
        seats=found.seats,
        left_out=found.left_out,
        repeats=asked.repeats,
    )
    elsewhere = "weights not looked for, the machine is another one"
    where = elsewhere if asked.hardware else prepared.weights.reason
    return plan, (f"model {prepared.model.name}: {where}", *found.fits)


def _runtime(prepared: Prepared, plan: Plan, *, run: Run, progress: Progress) -> Runtime:
    if plan.containers is None or prepared.engine is None:
        return ProcessRuntime(ledger=Ledger(places.state()), run_id=run.path.name)
    return DockerRuntime(
        engine=prepared.engine, setup=plan.containers, run_id=run.path.name, say=progress.step
    )


def _sweep(prepared: Prepared, *, progress: Progress) -> None:
    """End what dead labs left, before anything of this run is there."""
    Ledger(places.state()).sweep(progress.step)
    scratch.sweep()
    if prepared.engine is not None:
        swept = sweep(prepared.engine, progress.step)
        if swept:
            progress.step(f"removed {len(swept)} things that a killed lab had left at the Docker engine")


def check_machine(prepared: Prepared) -> None:
    """`LabError` unless platform, lock, memory, disk and port will do, and runs can be written."""
    if prepared.containers is None:
        check_platform(prepared.stack)
    check_lock(prepared.stack)
    Ledger(places.state()).check_writable()
    available = psutil.virtual_memory().available / 1e9
    check_resources(prepared.stack, memory_available_gb=available)
    if prepared.site.port:
        require_port(prepared.site.port)
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


def _new_run(plan: Plan, source: Source, *, prepared: Prepared, software: dict[str, object]) -> Run:
    site = prepared.site
    name = fresh_name()
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
            **software,
            "model": about(prepared.model, prepared.weights),
            "choices": {"runtime": site.runtime, "site": site.name, "reasons": list(site.reasons)},
        }
        write_json(run.environment, environment)
        write_text(run.hardware, to_json_hardware(prepared.hardware))
    except OSError as error:
        raise _not_writable(error) from error
    return run


def _not_writable(error: OSError) -> LabError:
    return LabError(
        "the folder for runs cannot be written",
        why=f"{error.strerror}: {error.filename}",
        fix="make runs/ writable, or run the lab from a checkout that is",
    )
