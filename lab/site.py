"""Where an experiment runs: runtime, scheduler, what the machine can do, which CPUs, which deadlines.

A site is read from a TOML file (lab/sites/NAME.toml or a path) and completed by what is detected on the
machine; every choice carries its reason into environment.json. No fallback is silent."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from lab.claims import Capability
from lab.errors import LabError, unknown_name

RUNTIMES = ("process", "docker")
SCHEDULERS = ("here",)
CAPABILITIES: tuple[str, ...] = get_args(Capability)
Scale = Literal["full", "small"]
SCALES: tuple[str, ...] = get_args(Scale)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place to run. CPU tuples are empty where nothing is pinned; deadlines are in seconds.

    `runtime` is empty where the machine decides (`lab.prepare`). `gpus` are indices or UUIDs, in the order of
    ranks; `server_mems` and `client_mems` NUMA nodes. `shm_gb` and `memory_gb` (the server's limit, None for
    none) are for containers. `scale` is which numbers loads take that have small ones too, empty where the stack
    decides. `port` 0 means a free one, chosen when a trial starts. `reasons` says why each detected value was taken.
    """

    name: str
    runtime: str = ""
    scheduler: str = "here"
    capabilities: tuple[Capability, ...] = ()
    server_cpus: tuple[int, ...] = ()
    client_cpus: tuple[int, ...] = ()
    server_mems: tuple[int, ...] = ()
    client_mems: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    scale: Scale | Literal[""] = ""
    shm_gb: float = 4.0
    memory_gb: float | None = None
    port: int = 0
    ready_s: float = 300.0
    load_s: float = 900.0
    stop_s: float = 20.0
    reasons: tuple[str, ...] = ()


def site_names(folder: Path) -> tuple[str, ...]:
    """Names of the sites that come with the lab."""
    return tuple(sorted(p.stem for p in folder.glob("*.toml")))


def load_site(name: str, *, folder: Path) -> Site:
    """The site called `name`, or the one in the TOML file of that path; CPUs are detected where not given."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if name.endswith(".toml") and not path.is_file():
        raise LabError(f"there is no site file {name}", why="no such file", fix="name one that is there")
    if not path.is_file():
        raise unknown_name("site", name, site_names(folder))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path.name} is not valid TOML", why=str(error), fix="correct the file") from error
    site = _from_table(table, where=path.name)
    return detect(site, cpus=usable_cpus())


def scaled(site: Site, scale: str) -> Site:
    """The site with the scale that a person asked for, if any; `LabError` for one that does not exist."""
    if scale and scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    return replace(site, scale=scale) if scale else site  # type: ignore[arg-type]  # one of SCALES


def usable_cpus() -> tuple[int, ...]:
    """The CPUs this process may use; all of them where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def detect(site: Site, *, cpus: tuple[int, ...]) -> Site:
    """Check the CPUs that `site` names against `cpus`, those this process may use. Where it names none, the
    machine's layout decides (`lab.seats`)."""
    asked = set(site.server_cpus) | set(site.client_cpus)
    if not asked <= set(cpus):
        raise LabError(
            f"site {site.name!r} asks for CPUs {sorted(asked - set(cpus))}",
            why=f"this process may use only {list(cpus)}",
            fix="correct server_cpus and client_cpus in the site's file",
        )
    shared = set(site.server_cpus) & set(site.client_cpus)
    if shared:
        raise LabError(
            f"site {site.name!r} gives CPUs {sorted(shared)} to both server and client",
            why="a client that takes the server's CPU measures itself",
            fix="correct server_cpus and client_cpus in the site's file",
        )
    return replace(site, reasons=(*site.reasons, "CPUs as the site's file says")) if asked else site


def _from_table(table: dict[str, object], *, where: str) -> Site:
    known = {f.name for f in fields(Site)} - {"reasons"}
    for key in table:
        if key not in known:
            raise unknown_name(f"key in {where}:", key, known)
    if "name" not in table:
        raise LabError(f"{where} has no key 'name'", why="runs are labelled with it", fix='add name = "..."')
    values: dict[str, object] = {}
    for key, value in table.items():
        values[key] = _value(key, value, where=where)
    site = Site(**values)  # type: ignore[arg-type]  # every key and type was checked just above
    for kind, name, names in (
        *((("runtime", site.runtime, RUNTIMES),) if site.runtime else ()),
        *((("scale", site.scale, SCALES),) if site.scale else ()),
        ("scheduler", site.scheduler, SCHEDULERS),
        *(("capability", name, CAPABILITIES) for name in site.capabilities),
    ):
        if name not in names:
            raise unknown_name(kind, name, names)
    return site


def _value(key: str, value: object, *, where: str) -> object:
    """`value` as the type that Site wants for `key`, or a LabError."""
    wants = {
        "capabilities": "a list of names",
        "server_cpus": "a list of CPU numbers",
        "client_cpus": "a list of CPU numbers",
        "server_mems": "a list of NUMA nodes",
        "client_mems": "a list of NUMA nodes",
        "gpus": "a list of GPU indices or UUIDs",
        "shm_gb": "a size in GB",
        "memory_gb": "a size in GB",
        "port": "a port number, 0 for a free one",
        "ready_s": "seconds",
        "load_s": "seconds",
        "stop_s": "seconds",
    }.get(key, "a name")
    good: bool
    if key == "gpus":
        good = isinstance(value, list) and all(type(v) in (int, str) for v in value)
        value = [str(v) for v in value] if isinstance(value, list) and good else value
    elif key in ("server_cpus", "client_cpus", "server_mems", "client_mems"):
        good = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    elif key == "capabilities":
        good = isinstance(value, list) and all(isinstance(v, str) for v in value)
    elif key == "port":
        good = type(value) is int and 0 <= value <= 65535
    elif wants in ("seconds", "a size in GB"):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 86_400
    else:
        good = isinstance(value, str) and bool(value)
    if not good:
        raise LabError(f"{where}: {key} = {value!r}", why=f"it must be {wants}", fix="correct the file")
    return tuple(value) if isinstance(value, list) else value
