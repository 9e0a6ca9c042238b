"""Going on with a run: finding it, and refusing where today's experiment, software or options are not what its plan says."""

from __future__ import annotations

from lab.app import find_run
from lab.errors import LabError
from lab.experiment import Source
from lab.plan import Plan, read_plan
from lab.prepare import Prepared
from lab.rundir import Run, verify


def to_resume(name: str, which: str | bool) -> tuple[Run, Plan]:
    """The run to go on with, and its plan."""
    run = find_run(which if isinstance(which, str) else None, experiment=name)
    if run.sums.is_file():
        verify(run)
    return run, read_plan(run)


def check_resumable(run: Run, old: Plan, *, source: Source, plan: Plan, repeats: int | None) -> None:
    """`LabError` when the experiment or the software is not what the run's plan says; `plan` is today's."""
    if old.experiment_sha256 != source.sha256:
        raise LabError(
            f"run {run.path.name} cannot be resumed: lab/experiments/{old.experiment}.py has changed since",
            why="its claims and loads were registered with the old file",
            fix="start a new run, or restore the file from the run's experiment.py",
        )
    if repeats not in (None, old.repeats):
        raise LabError(
            f"run {run.path.name} was planned with {old.repeats} repeats, not {repeats}",
            why="a plan is not changed once its run has begun",
            fix="leave --repeats out, or start a new run",
        )
    differ = [
        f"{name} {getattr(old, name)}, now {getattr(plan, name)}"
        for name in ("runtime", "stack", "stack_lock", "places", "model", "model_sha256", "scale")
        if getattr(old, name) != getattr(plan, name)
    ]
    if differ:
        raise LabError(
            f"run {run.path.name} cannot be resumed: it used another runtime, stack, model or scale",
            why=f"planned {'; '.join(differ)}",
            fix="name the same --runtime, --stack, --model, --weights and --scale, or start a new run",
        )


def check_image(old: Plan, prepared: Prepared) -> None:
    """`LabError` when the image is another one than the run began with."""
    before = old.containers.image if old.containers else ""
    now = prepared.containers.image if prepared.containers else ""
    if before != now:
        raise LabError(
            "the run cannot be resumed: its image is not the stack's image any more",
            why=f"it began with {before}, now there is {now}",
            fix="start a new run",
        )
