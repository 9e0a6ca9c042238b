"""The lab's command line. Thin: every task calls one function of lab.app, imported only when it runs."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path

from invoke import Collection, Context, Exit, Task, task

EXPERIMENTS = Path(__file__).resolve().parent / "lab" / "experiments"

RUN_HELP = {
    "repeats": "how often each variant is measured (default: the experiment's own)",
    "stack": "the software that serves, a folder of containers/ (default: what fits the machine)",
    "model": "what is served, a name of invoke models",
    "weights": "the model's files: cache (of Hugging Face), dummy (shapes only), or a folder",
    "site": "where it runs: a name of lab/sites/ or a TOML file",
    "runtime": "process or docker (default: docker where an engine answers)",
    "scale": "full or small: the numbers of loads that have both (default: small on a CPU)",
    "gpus": "indices or UUIDs of the servers' GPUs, such as 0,1 (default: the site's)",
    "hardware": "with --dry-run: plan for the machine in this file (invoke topo --json writes it)",
    "dry-run": "print the commands and start nothing",
    "explain": "say what the experiment asks, does and expects, and start nothing",
    "resume": "go on with the newest run of this experiment, or with the one named",
    "strict": "exit with 3 when a claim is refuted",
}


def checked(function: Callable[[], int]) -> None:
    """Run a function of the app: LabError is shown as it is and exits with 1, other codes are passed on."""
    from lab.errors import LabError

    try:
        code = function()
    except LabError as error:
        raise Exit(f"error: {error}", code=1) from None
    except BrokenPipeError:  # the reader of our output has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Exit(code=1) from None
    except KeyboardInterrupt as error:
        signum = getattr(error, "signum", 2)  # SIGTERM and SIGHUP arrive as a KeyboardInterrupt that says so
        raise Exit(f"stopped by {str(error) or 'Ctrl-C'}; go on with --resume", code=128 + signum) from None
    if code:
        raise Exit(code=code)


def first_line(path: Path) -> str:
    """First line of a file's docstring, without importing it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:  # the other commands must still work
        return f"cannot be read: syntax error in line {error.lineno}"
    return (ast.get_docstring(tree) or "").partition("\n")[0]


ALL_HELP = {name: text for name, text in RUN_HELP.items() if name not in ("gpus", "explain")} | {
    "dry-run": "say what would be run, and about how long it takes; start nothing",
    "resume": "go on with the newest series, or with the one named",
}


@task(name="all", optional=["resume"], auto_shortflags=False, help=ALL_HELP)
def every_experiment(
    _: Context,
    repeats: str = "",
    stack: str = "",
    model: str = "",
    weights: str = "",
    site: str = "",
    runtime: str = "",
    scale: str = "",
    hardware: str = "",
    dry_run: bool = False,
    resume: str = "",
    strict: bool = False,
) -> None:
    """Run all experiments that this machine can run, cheapest first."""

    def body() -> int:
        from lab import app, conduct, runall

        given = conduct.Asked(
            stack=stack,
            model=model,
            weights=weights,
            site=site,
            runtime=runtime,
            scale=scale,
            hardware=hardware,
            repeats=app.whole_number("--repeats", repeats),
        )
        return runall.run_all(given, dry_run=dry_run, resume=resume, strict=strict)

    checked(body)


def experiment_task(name: str, summary: str) -> Task[Callable[..., None]]:
    def run(
        _: Context,
        repeats: str = "",
        stack: str = "",
        model: str = "nano",
        weights: str = "",
        site: str = "local",
        runtime: str = "",
        scale: str = "",
        gpus: str = "",
        hardware: str = "",
        dry_run: bool = False,
        explain: bool = False,
        resume: str = "",
        strict: bool = False,
    ) -> None:
        def body() -> int:
            from lab import app, conduct

            asked = conduct.Asked(
                stack=stack,
                model=model,
                weights=weights,
                site=site,
                runtime=runtime,
                scale=scale,
                gpus=gpus,
                hardware=hardware,
                repeats=app.whole_number("--repeats", repeats),
            )
            return conduct.run_experiment(
                name, asked, dry_run=dry_run, explain=explain, resume=resume, strict=strict
            )

        checked(body)

    run.__name__ = name.replace("-", "_")
    run.__doc__ = summary
    return task(help=RUN_HELP, optional=["resume"], auto_shortflags=False)(run)  # type: ignore[no-any-return]


@task(auto_shortflags=False)
def doctor(_: Context) -> None:
    """Show what this machine can do, what is missing, and what to type for it."""

    def body() -> int:
        from lab.doctor.show import show

        return show()

    checked(body)


@task(auto_shortflags=False, help={"run": "a run's name (default: the newest)"})
def report(_: Context, run: str = "") -> None:
    """Rebuild tables, verdicts and report of a run from its raw files."""

    def body() -> int:
        from lab import app

        return app.report(app.find_run(run or None))

    checked(body)


@task(auto_shortflags=False)
def runs(_: Context) -> None:
    """List all runs and their state."""

    def body() -> int:
        from lab import app

        return app.list_all_runs()

    checked(body)


@task(auto_shortflags=False)
def models(_: Context) -> None:
    """List the models that can be served, and where their weights are."""

    def body() -> int:
        from lab import catalogue

        return catalogue.show()

    checked(body)


@task(auto_shortflags=False, help={"cache": "also delete the built stacks and models"})
def clean(_: Context, cache: bool = False) -> None:
    """End whatever a killed lab left running."""

    def body() -> int:
        from lab import app

        return app.clean(cache=cache)

    checked(body)


@task(
    auto_shortflags=False,
    help={"json": "as JSON, for --hardware", "hardware": "the machine in this file instead of this one"},
)
def topo(_: Context, json: bool = False, hardware: str = "") -> None:
    """Show GPUs, links and NUMA nodes, and where servers would be placed."""

    def body() -> int:
        from lab import app

        return app.topo(hardware, as_json=json)

    checked(body)


STACK_HELP = "a folder of containers/ (default: what fits the machine)"


@task(
    name="build",
    auto_shortflags=False,
    help={
        "stack": STACK_HELP,
        "base": "another base image, such as one that the engine has",
        "bare": "without CUDA toolkit and profilers",
        "index-url": "a mirror for Python packages",
    },
)
def image_build(_: Context, stack: str = "", base: str = "", bare: bool = False, index_url: str = "") -> None:
    """Build the image of a stack."""

    def body() -> int:
        from lab import imaging

        return imaging.build(stack, base=base, bare=bare, index_url=index_url)

    checked(body)


@task(name="list", auto_shortflags=False)
def image_list(_: Context) -> None:
    """List the lab's images and the versions measured in them."""

    def body() -> int:
        from lab import imaging

        return imaging.images()

    checked(body)


@task(name="check", auto_shortflags=False, help={"stack": "also measure inside this stack's image"})
def image_check(_: Context, stack: str = "") -> None:
    """Lint the Dockerfile, and measure again inside an image."""

    def body() -> int:
        from lab import imaging

        return imaging.check(stack)

    checked(body)


@task(
    name="lock",
    auto_shortflags=False,
    help={"stack": "a folder of containers/ (default: cpu)", "date": "take files published before it"},
)
def image_lock(_: Context, stack: str = "", date: str = "") -> None:
    """Make the lock of a stack anew."""

    def body() -> int:
        from lab import imaging

        return imaging.lock(stack, newest=date)

    checked(body)


@task(name="context", auto_shortflags=False, help={"stack": STACK_HELP, "out": "the folder to make"})
def image_context(_: Context, stack: str = "", out: str = "") -> None:
    """Leave the build context of a stack in a folder."""

    def body() -> int:
        from lab import imaging

        return imaging.context(stack, out=out)

    checked(body)


def build_namespace() -> Collection:
    exp = Collection("exp")
    names = {p.stem.replace("_", "-"): p for p in sorted(EXPERIMENTS.glob("*.py")) if p.stem != "__init__"}
    for word in sys.argv[1:]:
        asked = word.removeprefix("exp.")
        if word.startswith("exp.") and asked not in (*names, "all"):
            from lab.errors import unknown_name

            raise Exit(f"error: {unknown_name('experiment', asked, (*names, 'all'))}", code=1)
    exp.add_task(every_experiment)
    for name, path in names.items():
        if name != "all":  # exp.all refuses such a file
            exp.add_task(experiment_task(name, first_line(path)), name=name)
    image = Collection("image", image_build, image_list, image_check, image_lock, image_context)
    return Collection(exp, image, doctor, topo, models, report, runs, clean)


namespace = build_namespace()
