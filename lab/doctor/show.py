"""The table of `invoke doctor`: every row that makes sense on this machine, and whether experiments can run. In go the machine,
read under a root that may be any folder; out come text and an exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lab import places
from lab.choice import fitting_stack
from lab.doctor import engine as engine_rows
from lab.doctor import gpus as gpu_rows
from lab.doctor import limits, machine
from lab.doctor.finding import Finding, finding
from lab.errors import LabError
from lab.hardware.detect import detect
from lab.hardware.model import Hardware
from lab.hardware.nvml import read_use
from lab.images.build import image_tag
from lab.models import CATALOGUE
from lab.runtime.engine import Engine, connect
from lab.site import load_site
from lab.stack import Stack, all_stacks

ROOT = Path("/")


def show(root: Path = ROOT) -> int:
    """Print the table; 1 when something stops experiments from running here."""
    found = findings(root)
    console = Console()
    table = Table("check", "state", "why it matters", "what to type", title="What this machine can do")
    for f in found:
        colour = "green" if f.good else ("red" if f.blocks else "yellow")
        cells = map(escape, (f.check, f.state, f.matters, f.fix))
        check, state, matters, fix = cells
        table.add_row(check, f"[{colour}]{state}[/]", matters, fix)
    console.print(table)
    blocked = [f.check for f in found if f.blocks and not f.good]
    console.print(
        f"Cannot run experiments: {', '.join(blocked)}." if blocked else "Ready: invoke exp.radix",
        markup=False,
    )
    return 1 if blocked else 0


def findings(root: Path = ROOT) -> list[Finding]:
    """Every check, in order; `root` holds the /proc, /sys, /dev and /etc to look at."""
    stacks = list(all_stacks(places.ROOT))
    hardware = detect(root)
    name, reason = fitting_stack(hardware, stacks=stacks)
    fit = next(stack for stack in stacks if stack.name == name)
    site = load_site("local", folder=places.SITES)
    access = limits.model_access(tuple(CATALOGUE.values()), stacks=stacks, env=os.environ, home=Path.home())
    engine, answer = _engine()
    return [
        *machine.rows(stacks),
        access,
        *limits.port(site.port, site=site.name),
        *limits.cpuset(hardware),
        answer,
        *(_images(engine, hardware, stacks=stacks, fit=fit, root=root) if engine else ()),
        *gpu_rows.present(hardware, root=root),
        finding("stack that fits", good=True, state=name, matters=reason),
        *(_gpus(hardware, engine, stacks=stacks, root=root) if hardware.gpus else ()),
    ]


def _engine() -> tuple[Engine | None, Finding]:
    """The Docker engine, which decides the runtime, where one answers."""
    try:
        engine = connect()
    except LabError as error:
        row = Finding(
            check="Docker engine",
            good=True,
            state=f"none: {error.problem}",
            matters="experiments run as plain processes then; containers pin CPUs and GPUs, and are the default",
            fix=error.fix,
        )
        return None, row
    state = f"{engine.version}{', knows CDI' if engine.has_cdi else ''}"
    matters = "experiments run in containers; --runtime process does without"
    return engine, finding("Docker engine", good=True, state=state, matters=matters)


def _images(
    engine: Engine, hardware: Hardware, *, stacks: Sequence[Stack], fit: Stack, root: Path
) -> list[Finding]:
    built = engine.image(image_tag(fit)) is not None
    return [
        *engine_rows.images(engine, stacks, hardware=hardware),
        *engine_rows.room(engine.info, fit, built=built, root=root),
    ]


def _gpus(
    hardware: Hardware, engine: Engine | None, *, stacks: Sequence[Stack], root: Path
) -> Iterator[Finding]:
    """Rows that only a machine with GPUs has."""
    yield from gpu_rows.driver(hardware, stacks=stacks)
    if engine is not None:
        yield engine_rows.toolkit(engine.info, hardware, root=root)
        yield engine_rows.reload_loss(engine.info, root=root)
    yield from gpu_rows.in_use(hardware, read_use([gpu.uuid for gpu in hardware.gpus]))
    yield from gpu_rows.settings(hardware, slowed=gpu_rows.reasons_now(hardware.gpus))
    yield limits.counters(root=root, in_containers=engine is not None)
    yield from limits.perf_events(root=root)
    yield limits.dcgm(root=root)
    yield from limits.memlock(root=root)
