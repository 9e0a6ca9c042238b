"""Rows on the machine itself and on what the lab has built on it: Python, CPUs, memory, disk, stacks, the model, the folder for
runs. In go nothing but the machine; out come rows."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from lab import places
from lab.doctor.finding import Finding
from lab.errors import LabError
from lab.modelfiles import find_damage
from lab.models import get_model
from lab.rundir import RUN_DISK_GB
from lab.site import load_site, usable_cpus
from lab.stack import Stack, check_platform
from lab.stacks.build import stack_folder


def rows(stacks: Sequence[Stack]) -> list[Finding]:
    """Every check of this page, in order."""
    found = [_python(), *_cpus()]
    for stack in stacks:
        if stack.device != "cpu":  # served from its image; see the rows of the engine
            continue
        found += [_platform(stack), _memory(stack), _disk(stack), _built(stack)]
    return [*found, _model(), _runs(), _room_for_runs()]


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
        fix=""
        if built
        else f"invoke exp.radix --stack {stack.name} --runtime process builds it first, about two minutes",
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


def _room_for_runs() -> Finding:
    free = shutil.disk_usage(_existing(places.RUNS)).free / 1e9
    good = free >= RUN_DISK_GB
    return Finding(
        check="disk for runs",
        good=good,
        state=f"{free:.1f} GB free",
        matters=f"a run may take {RUN_DISK_GB:g} GB, and is refused when there is less",
        fix="" if good else "delete old runs from runs/, or make room",
        blocks=True,
    )


def _existing(path: Path) -> Path:
    """The nearest folder on the way to `path` that exists."""
    while not path.exists():
        path = path.parent
    return path
