"""Is a built stack what its lock says? `record` writes what was built into the folder; `check` compares the
folder with that record on every use (names and sizes of all files, a fifth of a second); `verify` looks
deeper (requirements, forbidden packages, real imports, versions), which takes about ten seconds. What does
not fit is a `LabError` with the folder to delete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

from lab.errors import LabError
from lab.stack import Stack, shim_files
from lab.stacks.lock import normal_name, read_lock, read_names, stated

SCHEMA = 1
MANIFEST = "lab-stack.json"
INVENTORY = "lab-files.txt"
FORBIDDEN = re.compile(
    r"^(nvidia|cuda|cupy|pycuda)"
)  # no CUDA package may be in a stack whose device is the CPU

PROBE = """
import importlib, json, sys
found = {name: str(getattr(importlib.import_module(name), "__version__", "")) for name in sys.argv[1:]}
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was built, written last, so that a folder with a manifest is a finished one."""

    schema: int
    stack: str
    lock_hash: str
    built_utc: str
    python: str
    versions: Mapping[str, str]
    imported: Mapping[str, str]
    missing_on_purpose: tuple[str, ...]
    shims: Mapping[str, str]
    size_bytes: int
    seconds: Mapping[str, float]


def python_of(folder: Path) -> Path:
    """The Python of a built stack."""
    return folder / "bin" / "python"


def site_packages(stack: Stack, folder: Path) -> Path:
    """Where a built stack has its packages."""
    return folder / "lib" / f"python{stack.python}" / "site-packages"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a built stack; `LabError` when it is absent, cut short or from another version of the
    lab.
    """
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise _damaged(folder, [f"its {MANIFEST} has schema {data['schema']}, this lab reads {SCHEMA}"])
        return Manifest(**{**data, "missing_on_purpose": tuple(data["missing_on_purpose"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, [f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"]) from None


def record(stack: Stack, folder: Path, *, manifest: Manifest) -> None:
    """Write the list of files and, last, the manifest."""
    lines = [f"{size} {path}\n" for path, size in sorted(_files(site_packages(stack, folder)))]
    (folder / INVENTORY).write_text("".join(lines), encoding="utf-8")
    (folder / MANIFEST).write_text(
        json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def check(stack: Stack, folder: Path) -> Manifest:
    """The manifest of `folder`, after a look at everything that is cheap to look at; `LabError` names what
    differs.
    """
    manifest = read_manifest(folder)
    if manifest.lock_hash != stack.lock_hash:
        raise _damaged(
            folder, [f"it was built from lock {manifest.lock_hash[:12]}, not {stack.lock_hash[:12]}"]
        )
    if not python_of(folder).exists():
        raise _damaged(folder, [f"the Python it was built with is gone ({manifest.python})"])
    site = site_packages(stack, folder)
    problems = [*_changed_files(folder, site), *_changed_shims(stack, site)]
    if problems:
        raise _damaged(folder, problems)
    return manifest


def verify(
    stack: Stack, folder: Path, *, env: Mapping[str, str]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Look inside: versions as locked, requirements met, nothing of CUDA, and the modules of stack.toml
    import.

    `env` is the environment for the importing process; the stack's own is added. Returns the versions that
    the imported modules state, and the requirements that are missing on purpose (excludes.txt). Raises
    `LabError`.
    """
    installed = {normal_name(d.name): d for d in distributions(path=[str(site_packages(stack, folder))])}
    versions = {name: package.version for name, package in installed.items()}
    locked = {pin.name: pin.version for pin in read_lock(stack.lock)}
    problems = [
        f"{name}: locked {locked.get(name, 'not at all')}, installed {versions.get(name, 'not at all')}"
        for name in sorted(locked | versions)
        if versions.get(name) != locked.get(name)
    ]
    if stack.device == "cpu":
        problems += [f"{name} is a CUDA package" for name in sorted(installed) if FORBIDDEN.match(name)]
    unmet = list(_unmet(installed, python=stack.python))
    allowed = {normal_name(name) for name in read_names(stack.excludes)}
    problems += [f"{owner} requires {want}" for owner, want in unmet if normal_name(want.name) not in allowed]
    if problems:
        raise _damaged(folder, problems)
    imported = _import_all(stack, folder, env=env)
    problems = [
        f"{name} says it is {imported[name]}, stack.toml says {version}"
        for name, version in stated(stack).items()
        if imported.get(name, version) != version
    ]
    if problems:
        raise _damaged(folder, problems)
    return imported, tuple(sorted({normal_name(want.name) for _, want in unmet}))


def installed_versions(stack: Stack, folder: Path) -> dict[str, str]:
    """Every installed package with its version, by normal name."""
    return {normal_name(d.name): d.version for d in distributions(path=[str(site_packages(stack, folder))])}


def shim_hashes(stack: Stack, where: Path) -> dict[str, str]:
    """sha256 of each of the stack's shim files as it lies under `where`; '' for one that is not there."""
    names = [file.relative_to(stack.shims).as_posix() for file in shim_files(stack.folder)]
    return {name: _sha256(where / name) for name in names}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _files(site: Path) -> Iterator[tuple[str, int]]:
    """Path and size in bytes of every file under `site`, without Python's caches, which come and go."""
    stack = [str(site)]
    start = len(stack[0]) + 1
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "__pycache__":
                        stack.append(entry.path)
                else:
                    yield entry.path[start:], entry.stat(follow_symlinks=False).st_size


def _changed_files(folder: Path, site: Path) -> Iterator[str]:
    """Differences between the recorded list of files and what is there, by top-level package."""
    try:
        text = (folder / INVENTORY).read_text(encoding="utf-8")
        wanted = {path: int(size) for size, path in (line.split(" ", 1) for line in text.splitlines())}
        found = dict(_files(site))
    except (OSError, ValueError) as error:
        yield f"its files cannot be listed ({type(error).__name__}: {error})"
        return
    if found == wanted:
        return
    lost = wanted.keys() - found.keys()
    changed = [path for path, size in wanted.items() if found.get(path, size) != size]
    tops = {path.split("/")[0] for path in wanted}
    new = {path.split("/")[0] for path in found.keys() - wanted.keys()} - tops
    yield from _by_package("missing", sorted(lost))
    yield from _by_package("of another size", sorted(changed))
    yield from _by_package("not from this build", sorted(new))


def _by_package(what: str, paths: list[str]) -> Iterator[str]:
    tops: dict[str, list[str]] = {}
    for path in paths:
        tops.setdefault(path.split("/")[0], []).append(path)
    for top, inside in tops.items():
        first = "" if inside[0] == top else f" (first: {inside[0]})"
        yield f"{top}: {len(inside)} file{'s' if len(inside) > 1 else ''} {what}{first}"


def _changed_shims(stack: Stack, site: Path) -> Iterator[str]:
    there = shim_hashes(stack, site)
    for name, wanted in shim_hashes(stack, stack.shims).items():
        if there[name] != wanted:
            yield f"shim {name} is {'changed' if there[name] else 'missing'}"


def _unmet(installed: Mapping[str, Distribution], *, python: str) -> Iterator[tuple[str, Requirement]]:
    """Every requirement that an installed package declares for this machine and that is not met."""
    environment = {key: str(value) for key, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for name, package in sorted(installed.items()):
        for text in package.requires or ():
            want = Requirement(text)
            if want.marker is not None and not want.marker.evaluate(environment):
                continue
            found = installed.get(normal_name(want.name))
            if found is None or not want.specifier.contains(found.version, prereleases=True):
                yield name, want


def _import_all(stack: Stack, folder: Path, *, env: Mapping[str, str]) -> Mapping[str, str]:
    argv = (str(python_of(folder)), "-I", "-c", PROBE, *stack.imports)
    result = subprocess.run(  # noqa: S603 - our own argv
        argv,
        env={**env, **dict(stack.env)},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    try:
        found = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = None
    if result.returncode or not isinstance(found, dict):
        last = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()][-6:]
        raise _damaged(folder, [f"importing {', '.join(stack.imports)} failed:", *last])
    return {str(name): str(version) for name, version in found.items()}


def _damaged(folder: Path, problems: list[str]) -> LabError:
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    return LabError(
        f"the built stack in {folder} is not as it was built",
        why="\n       ".join(shown),
        fix=f"delete the folder and run the same command again, which builds it anew: rm -r {folder}",
    )
