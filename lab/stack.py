"""Which software serves: a folder under containers/ (stack.toml, requirements.txt, shims) goes in, a frozen
`Stack` comes out, with a hash of everything that determines the environment built from it, and two checks of
the machine: is it of the kind the stack was made for, and has it the room. Nothing is built or run here;
`stacks.build` does that.
"""

from __future__ import annotations

import hashlib
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError, unknown_name

SCHEMA = 1
BUILD_RECIPE = (
    1  # part of the lock hash: raise it when stacks.build makes something different from the same files
)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the machine must have for the stack; memory and disk in GB (10^9 bytes)."""

    memory_gb: float
    disk_gb: float
    system: str
    machine: str
    glibc: str


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack as its folder describes it."""

    name: str
    folder: Path
    description: str
    sglang: str
    torch: str
    python: str
    device: str
    dialect: str
    needs: Needs
    env: tuple[tuple[str, str], ...]
    server_args: tuple[str, ...]
    imports: tuple[str, ...]
    lock_hash: str

    @property
    def lock(self) -> Path:
        """The locked requirements, with hashes."""
        return self.folder / "requirements.txt"

    @property
    def requirements(self) -> Path:
        """What a person writes; the lock is made from it."""
        return self.folder / "requirements.in"

    @property
    def excludes(self) -> Path:
        """Packages deliberately left out although something in the lock declares them."""
        return self.folder / "excludes.txt"

    @property
    def shims(self) -> Path:
        """What is copied into site-packages after the locked packages."""
        return self.folder / "shims"


# table -> key -> type; "" is the top level of stack.toml
_KEYS: Mapping[str, Mapping[str, type]] = {
    "": {
        "schema": int,
        "name": str,
        "description": str,
        "sglang": str,
        "torch": str,
        "python": str,
        "device": str,
        "dialect": str,
        "needs": dict,
        "env": dict,
        "server": dict,
        "verify": dict,
    },
    "needs": {"memory_gb": float, "disk_gb": float, "system": str, "machine": str, "glibc": str},
    "server": {"args": list},
    "verify": {"imports": list},
}
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a table",
    list: "a list of strings",
}


def list_stacks(root: Path) -> tuple[str, ...]:
    """Names of the stacks under `root`/containers, sorted."""
    return tuple(sorted(file.parent.name for file in (root / "containers").glob("*/stack.toml")))


def load_stack(name: str, *, root: Path) -> Stack:
    """The stack `name` of the repository at `root`; `LabError` when it is unknown or badly described."""
    if name not in list_stacks(root):
        raise unknown_name("stack", name, list_stacks(root))
    folder = root / "containers" / name
    file = folder / "stack.toml"
    data = _read_toml(file)
    _check_keys(data, table="", file=file)
    if data["schema"] != SCHEMA:
        raise LabError(
            f"{file} has schema {data['schema']}, this lab reads schema {SCHEMA}",
            fix="use the version of the lab that the stack was written for",
        )
    if data["name"] != name:
        raise LabError(
            f"{file} says name = {data['name']!r}, its folder is {name!r}", fix="give both the same name"
        )
    needs = _table(data, "needs", file=file)
    return Stack(
        name=name,
        folder=folder,
        description=str(data["description"]),
        sglang=str(data["sglang"]),
        torch=str(data["torch"]),
        python=str(data["python"]),
        device=str(data["device"]),
        dialect=str(data["dialect"]),
        needs=Needs(
            memory_gb=_size(needs, "memory_gb", file=file),
            disk_gb=_size(needs, "disk_gb", file=file),
            system=str(needs["system"]),
            machine=str(needs["machine"]),
            glibc=str(needs["glibc"]),
        ),
        env=_env(data["env"], file=file),
        server_args=_strings(_table(data, "server", file=file), "args", file=file),
        imports=_strings(_table(data, "verify", file=file), "imports", file=file),
        lock_hash=_lock_hash(folder, python=str(data["python"])),
    )


def shim_files(folder: Path) -> tuple[Path, ...]:
    """The files under a stack's shims/ that go into its environment, sorted, without Python's caches."""
    found = (folder / "shims").rglob("*")
    return tuple(sorted(file for file in found if file.is_file() and "__pycache__" not in file.parts))


def check_platform(
    stack: Stack, *, system: str | None = None, machine: str | None = None, glibc: str | None = None
) -> None:
    """`LabError` unless a machine of this kind can run the stack; what is not given is asked of this machine.

    `glibc` is the C library's version, or "" where there is another C library (musl).
    """
    system = platform.system() if system is None else system
    machine = platform.machine() if machine is None else machine
    needs = stack.needs
    fix = (
        f"run the lab on {needs.system} {needs.machine} with glibc {needs.glibc} or newer, "
        "for example Debian 12 or Ubuntu 22.04"
    )
    if system != needs.system:
        raise LabError(
            f"stack {stack.name!r} does not run on {system}", why=f"it needs {needs.system}", fix=fix
        )
    if machine != needs.machine:
        raise LabError(
            f"stack {stack.name!r} does not run on a {machine} processor",
            why=f"its packages are built for {needs.machine}",
            fix=fix,
        )
    if glibc is None:
        library, version = platform.libc_ver()
        glibc = version if library == "glibc" else ""
    if not glibc or _version(glibc) < _version(needs.glibc):
        raise LabError(
            f"stack {stack.name!r} needs glibc {needs.glibc} or newer, "
            f"this system has {glibc or 'another C library'}",
            why=f"SGLang {stack.sglang} is published for glibc {needs.glibc}",
            fix=fix,
        )


def check_resources(
    stack: Stack, *, disk_free_gb: float | None = None, memory_available_gb: float | None = None
) -> None:
    """`LabError` when disk or memory (GB, 10^9 bytes) is known to be less than the stack needs; None is not
    checked.
    """
    needs = stack.needs
    if disk_free_gb is not None and disk_free_gb < needs.disk_gb:
        raise LabError(
            f"not enough disk for stack {stack.name!r}: "
            f"{disk_free_gb:.1f} GB free, {needs.disk_gb:.1f} GB needed",
            fix="free some space, or set XDG_CACHE_HOME to a folder on a larger disk",
        )
    if memory_available_gb is not None and memory_available_gb < needs.memory_gb:
        raise LabError(
            f"not enough memory for stack {stack.name!r}: "
            f"{memory_available_gb:.1f} GB available, {needs.memory_gb:.1f} GB needed",
            fix="stop other programs, or use a machine with more memory",
        )


def _read_toml(file: Path) -> dict[str, object]:
    try:
        return dict(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{file} is not valid TOML", why=str(error), fix="correct the file") from None
    except OSError as error:
        raise LabError(f"cannot read {file}", why=str(error), fix="make the file readable") from None


def _check_keys(data: Mapping[str, object], *, table: str, file: Path) -> None:
    """Every key of the table there, none besides, each of its type."""
    expected = _KEYS[table]
    where = f"[{table}] of {file}" if table else str(file)
    valid = f"the keys are: {', '.join(expected)}"
    for key in data:
        if key not in expected:
            raise LabError(f"unknown key {key!r} in {where}", why=valid, fix="correct or remove the key")
    for key, kind in expected.items():
        if key not in data:
            raise LabError(f"key {key!r} is missing in {where}", why=valid, fix="add the key")
        if not _is_a(data[key], kind):
            raise LabError(
                f"{key} in {where} must be {_TYPE_NAMES[kind]}, it is {data[key]!r}",
                why=valid,
                fix="correct the value",
            )


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):  # which Python counts as a number
        return False
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind)


def _table(data: Mapping[str, object], table: str, *, file: Path) -> Mapping[str, object]:
    found = data[table]
    if not isinstance(found, dict):
        raise TypeError(f"[{table}] must have been checked before")
    _check_keys(found, table=table, file=file)
    return found


def _size(table: Mapping[str, object], key: str, *, file: Path) -> float:
    value = float(str(table[key]))
    if not 0 <= value < 1e6:
        raise LabError(
            f"{key} in {file} must be between 0 and a million GB, it is {value}", fix="correct the value"
        )
    return value


def _strings(table: Mapping[str, object], key: str, *, file: Path) -> tuple[str, ...]:
    values = table[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LabError(
            f"{key} in {file} must be a list of strings, it is {values!r}", fix="put each value in quotes"
        )
    return tuple(values)


def _env(table: object, *, file: Path) -> tuple[tuple[str, str], ...]:
    pairs = list(table.items()) if isinstance(table, dict) else []
    for key, value in pairs:
        if not isinstance(value, str):
            raise LabError(
                f"{key} in [env] of {file} must be a string, it is {value!r}", fix="put the value in quotes"
            )
    return tuple(sorted(pairs))


def _lock_hash(folder: Path, *, python: str) -> str:
    """sha256 over what determines the environment: the lock, the shims, the Python, how stacks.build builds.

    The server's arguments and environment are not in it: they change what is started, not what is installed.
    """
    digest = hashlib.sha256(f"recipe {BUILD_RECIPE}, python {python}\n".encode())
    for file in (folder / "requirements.txt", *shim_files(folder)):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise LabError(f"cannot read {file}", why=str(error), fix="restore the stack's folder") from None
        if file.name == "requirements.txt":  # its comments change nothing
            content = b"".join(
                line for line in content.splitlines(True) if not line.lstrip().startswith(b"#")
            )
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
