"""`invoke doctor`: what this machine can do, what is missing, and what to type for it. Changes nothing."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from lab import places
from lab.choice import fitting_stack
from lab.errors import LabError
from lab.hardware.detect import detect
from lab.images.build import image_tag
from lab.models import find_damage, get_model
from lab.runtime.engine import connect
from lab.site import load_site, usable_cpus
from lab.stack import Stack, check_platform, list_stacks, load_stack
from lab.stacks.build import stack_folder


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: what was checked, its state, why it matters, what to type. `blocks` stops every experiment."""

    check: str
    good: bool
    state: str
    matters: str
    fix: str = ""
    blocks: bool = False


def show() -> int:
    """Print the table; 1 when something stops experiments from running here."""
    found = findings()
    console = Console()
    table = Table("check", "state", "why it matters", "what to type", title="What this machine can do")
    for f in found:
        colour = "green" if f.good else ("red" if f.blocks else "yellow")
        table.add_row(f.check, f"[{colour}]{f.state}[/]", f.matters, f.fix)
    console.print(table)
    blocked = [f.check for f in found if f.blocks and not f.good]
    console.print(
        f"Cannot run experiments: {', '.join(blocked)}." if blocked else "Ready: invoke exp.radix",
        markup=False,
    )
    return 1 if blocked else 0


def findings() -> list[Finding]:
    """Every check, in order."""
    rows = [_python(), *_cpus()]
    for name in list_stacks(places.ROOT):
        stack = load_stack(name, root=places.ROOT)
        if stack.device != "cpu":  # served from its image; see the rows of the engine
            continue
        rows += [_platform(stack), _memory(stack), _disk(stack), _built(stack)]
    return [*rows, _model(), _runs(), *_engine(), *_gpu()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        check="Python of the lab",
        good=sys.version_info >= (3, 11),
        state=version,
        matters="the lab needs 3.11 or newer; each stack brings its own",
        blocks=True,
    )


def _cpus() -> list[Finding]:
    cpus = len(usable_cpus())
    site = load_site("local", folder=places.SITES)
    load = os.getloadavg()[0]
    return [
        Finding(
            check="CPUs",
            good=cpus >= 2,
            state=str(cpus),
            matters="; ".join(site.reasons) or "server and client share them",
            fix="" if cpus >= 2 else "use a machine with two CPUs or more",
        ),
        Finding(
            check="other load",
            good=load < 0.5 * cpus,
            state=f"load average {load:.1f}",
            matters="whatever else runs makes the numbers unsteady",
            fix="" if load < 0.5 * cpus else "wait until the machine is quiet",
        ),
    ]


def _platform(stack: Stack) -> Finding:
    try:
        check_platform(stack)
    except LabError as error:
        return Finding(
            check=f"platform for stack {stack.name}",
            good=False,
            state=error.problem,
            matters=error.why,
            fix=error.fix,
            blocks=True,
        )
    needs = stack.needs
    return Finding(
        check=f"platform for stack {stack.name}",
        good=True,
        state=f"{needs.system} {needs.machine}",
        matters=f"SGLang's wheel needs glibc {needs.glibc} or newer",
        blocks=True,
    )


def _memory(stack: Stack) -> Finding:
    free = psutil.virtual_memory().available / 1e9
    good = free >= stack.needs.memory_gb
    return Finding(
        check=f"memory for stack {stack.name}",
        good=good,
        state=f"{free:.1f} GB available",
        matters=f"a server and its client need {stack.needs.memory_gb:g} GB",
        fix="" if good else "end other programs",
        blocks=True,
    )


def _disk(stack: Stack) -> Finding:
    free = shutil.disk_usage(_existing(places.cache())).free / 1e9
    built = stack_folder(stack, cache=places.cache()).exists()
    good = built or free >= stack.needs.disk_gb
    return Finding(
        check=f"disk for stack {stack.name}",
        good=good,
        state=f"{free:.1f} GB free",
        matters=f"building it needs {stack.needs.disk_gb:g} GB",
        fix="" if good else "make room, or set XDG_CACHE_HOME to a larger disk",
        blocks=True,
    )


def _built(stack: Stack) -> Finding:
    built = stack_folder(stack, cache=places.cache()).exists()
    return Finding(
        check=f"stack {stack.name}",
        good=built,
        state="built" if built else "not built yet",
        matters=stack.description,
        fix="" if built else "invoke exp.radix builds it first, about two minutes",
    )


def _model() -> Finding:
    model = get_model("nano")
    folder = places.cache() / "models" / f"{model.name}-{model.sha256[:12]}"
    if not folder.exists():
        return Finding(
            check="model nano",
            good=False,
            state="not made yet",
            matters=model.description,
            fix="invoke exp.radix makes it first, in seconds",
        )
    damage = find_damage(model, folder=folder)
    return Finding(
        check="model nano",
        good=not damage,
        state=damage or "made, checksums right",
        matters=model.description,
        fix=f"rm -r {folder}" if damage else "",
        blocks=True,
    )


def _runs() -> Finding:
    folder = _existing(places.RUNS)
    good = os.access(folder, os.W_OK)
    return Finding(
        check="folder for runs",
        good=good,
        state="writable" if good else "not writable",
        matters="raw measurements and reports go to runs/",
        fix="" if good else "make runs/ writable, or use a checkout of your own",
        blocks=True,
    )


def _engine() -> list[Finding]:
    """The Docker engine, which decides the runtime, and the images of the stacks in it."""
    try:
        engine = connect()
    except LabError as error:
        return [
            Finding(
                check="Docker engine",
                good=True,
                state=f"none: {error.problem}",
                matters="experiments run as plain processes then; containers pin CPUs and GPUs, and are the default",
                fix=error.fix,
            )
        ]
    rows = [
        Finding(
            check="Docker engine",
            good=True,
            state=f"{engine.version}{', knows CDI' if engine.has_cdi else ''}",
            matters="experiments run in containers; --runtime process does without",
        )
    ]
    for name in list_stacks(places.ROOT):
        tag = image_tag(load_stack(name, root=places.ROOT))
        image = engine.image(tag)
        rows.append(
            Finding(
                check=f"image of stack {name}",
                good=image is not None,
                state="not built yet" if image is None else f"{image.size_bytes / 1e9:.1f} GB",
                matters=f"containers of stack {name} start from {tag}",
                fix="" if image is not None else f"invoke image.build --stack {name}",
            )
        )
    return rows


def _gpu() -> list[Finding]:
    hardware = detect()
    version = hardware.driver.version if hardware.driver else ""
    every = [load_stack(name, root=places.ROOT) for name in list_stacks(places.ROOT)]
    name, reason = fitting_stack(hardware, stacks=every)
    words = f"{len(hardware.gpus)}, driver {version}" if version else "none"
    return [
        Finding(
            check="NVIDIA GPUs",
            good=True,
            state=words,
            matters="claims that need one come out untested"
            if not hardware.gpus
            else "invoke topo shows them",
        ),
        Finding(check="stack that fits", good=True, state=name, matters=reason),
    ]


def _existing(path: Path) -> Path:
    """The nearest folder on the way to `path` that exists."""
    while not path.exists():
        path = path.parent
    return path
