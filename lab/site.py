"""Where an experiment runs: runtime, scheduler, what the machine can do, which CPUs, which deadlines.

A site is read from a TOML file (lab/sites/NAME.toml or a path) and completed by what is detected on the
machine; every choice carries its reason into environment.json. No fallback is silent."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

from lab.claims import Capability
from lab.errors import LabError, unknown_name

RUNTIMES = ("process",)
SCHEDULERS = ("here",)
CAPABILITIES: tuple[str, ...] = get_args(Capability)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place to run. CPU tuples are empty where nothing is pinned; deadlines are in seconds.

    `port` 0 means a free one, chosen when a trial starts. `reasons` says why each detected value was taken.
    """

    name: str
    runtime: str = "process"
    scheduler: str = "here"
    capabilities: tuple[str, ...] = ()
    server_cpus: tuple[int, ...] = ()
    client_cpus: tuple[int, ...] = ()
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
    if not path.is_file():
        raise unknown_name("site", name, site_names(folder))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path.name} is not valid TOML", why=str(error), fix="correct the file") from error
    site = _from_table(table, where=path.name)
    return detect(site, cpus=usable_cpus())


def usable_cpus() -> tuple[int, ...]:
    """The CPUs this process may use; all of them where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def detect(site: Site, *, cpus: tuple[int, ...]) -> Site:
    """Complete `site` with what `cpus`, the CPUs this process may use, allow.

    The client gets a CPU of its own from four CPUs on. Below that pinning would starve the server, which
    runs three busy processes, so nothing is pinned and the report says so.
    """
    asked = set(site.server_cpus) | set(site.client_cpus)
    if not asked <= set(cpus):
        raise LabError(
            f"site {site.name!r} asks for CPUs {sorted(asked - set(cpus))}",
            why=f"this process may use only {list(cpus)}",
            fix="correct server_cpus and client_cpus in the site's file",
        )
    if asked:
        return replace(site, reasons=(*site.reasons, "CPUs as the site's file says"))
    if len(cpus) < 4:
        why = f"nothing pinned: {len(cpus)} CPUs are too few to give the client one of its own"
        return replace(site, reasons=(*site.reasons, why))
    return replace(
        site,
        server_cpus=cpus[:-1],
        client_cpus=cpus[-1:],
        reasons=(*site.reasons, f"client on CPU {cpus[-1]}, server on the other {len(cpus) - 1}"),
    )


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
        ("runtime", site.runtime, RUNTIMES),
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
        "port": "a port number, 0 for a free one",
        "ready_s": "seconds",
        "load_s": "seconds",
        "stop_s": "seconds",
    }.get(key, "a name")
    good: bool
    if key in ("server_cpus", "client_cpus"):
        good = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    elif key == "capabilities":
        good = isinstance(value, list) and all(isinstance(v, str) for v in value)
    elif key == "port":
        good = type(value) is int and 0 <= value <= 65535
    elif wants == "seconds":
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 86_400
    else:
        good = isinstance(value, str) and bool(value)
    if not good:
        raise LabError(f"{where}: {key} = {value!r}", why=f"it must be {wants}", fix="correct the file")
    return tuple(value) if isinstance(value, list) else value
