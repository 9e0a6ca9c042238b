"""The locked requirements of a stack: reads requirements.txt into pins, says whether it still fits what a
person wrote in requirements.in and excludes.txt, and makes it anew with uv. Only `write_lock` asks the
network.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import uv

from lab import places
from lab.errors import LabError
from lab.stack import Stack, load_stack

LOCK_COMMAND = "python -m lab.stacks.lock"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One locked package: its normal name, its version, and its lines in the lock, hashes included."""

    name: str
    version: str
    text: str


def normal_name(name: str) -> str:
    """A package's name in the one spelling that makes names comparable (the packaging guide's rule)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(file: Path) -> tuple[Pin, ...]:
    """The pins of a requirements.txt, in its order; `LabError` when a line is not a hashed pin."""
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise LabError(f"cannot read {file}", why=str(error), fix="restore the stack's folder") from None
    entries = re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n?", "", content)).splitlines()
    return tuple(_pin(entry, file=file) for entry in entries if entry.strip())


def _pin(entry: str, *, file: Path) -> Pin:
    words = entry.split()
    name, separator, version = words[0].partition("==")
    hashes = [word for word in words[1:] if word.startswith("--hash=sha256:")]
    if not separator or not hashes or len(hashes) != len(words) - 1:
        raise LabError(
            f"{file} has a line that is not NAME==VERSION with sha256 hashes: {entry[:80]!r}",
            fix=f"make the lock again: {LOCK_COMMAND} STACK DATE",
        )
    return Pin(name=normal_name(name), version=version, text=" \\\n    ".join(words) + "\n")


def read_names(file: Path) -> tuple[str, ...]:
    """The entries of requirements.in or excludes.txt without comments: `name` or `name==version`, in their
    order.
    """
    if not file.exists():
        return ()
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)


def inputs_hash(stack: Stack) -> str:
    """sha256 of what the lock is made from, comments left out."""
    lines = [*read_names(stack.requirements), "excluded:", *read_names(stack.excludes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def drift(stack: Stack) -> tuple[str, ...]:
    """Why the lock does not fit stack.toml, requirements.in and excludes.txt any more; empty when it does."""
    pins = {pin.name: pin.version for pin in read_lock(stack.lock)}
    reasons = []
    if f"inputs sha256:{inputs_hash(stack)}" not in stack.lock.read_text(encoding="utf-8"):
        reasons.append("requirements.in or excludes.txt changed after the lock was made")
    wanted = [_bare(entry).split("==") for entry in read_names(stack.requirements) if "==" in entry]
    wanted += [[name, version] for name, version in stated(stack).items() if name in pins]
    for name, version in wanted:
        if pins.get(normal_name(name)) != version:
            reasons.append(
                f"{name}=={version} is asked for, the lock has {pins.get(normal_name(name), 'none')}"
            )
    reasons += [
        f"{name} is excluded, and locked" for name in read_names(stack.excludes) if normal_name(name) in pins
    ]
    return tuple(reasons)


def _bare(entry: str) -> str:
    """An entry of requirements.in without its extras: `sglang[srt]==1` is locked as `sglang==1`."""
    return re.sub(r"\[.*?\]", "", entry)


def stated(stack: Stack) -> dict[str, str]:
    """The versions that stack.toml states."""
    return {"sglang": stack.sglang, "torch": stack.torch}


def write_lock(stack: Stack, *, newest: date, say: Callable[[str], None]) -> Path:
    """Make the stack's requirements.txt anew from files published before `newest`, and return its path.

    uv asks what it is set up with (UV_FIND_LINKS and UV_INDEX_*, and pip's PIP_FIND_LINKS); when that has no
    such torch, it asks PyTorch's own CPU index, whose address uv knows.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "requirements.txt")
        argv = _compile_argv(stack, newest=newest, out=out)
        result = _uv(argv, stack=stack)
        if result.returncode and stack.device == "cpu" and "torch" in result.stderr:
            say(f"the set-up index has no torch=={stack.torch}; asking PyTorch's own CPU index")
            result = _uv((*argv, "--torch-backend", "cpu"), stack=stack)
        if result.returncode:
            raise LabError(
                f"cannot lock stack {stack.name!r}",
                why=result.stderr.strip(),
                fix=f"correct {stack.requirements}, or check the network, and try again: {LOCK_COMMAND} {stack.name} {newest}",
            )
        stack.lock.write_text(
            _header(stack, newest=newest) + out.read_text(encoding="utf-8"), encoding="utf-8"
        )
    say(f"locked {len(read_lock(stack.lock))} packages in {stack.lock}")
    return stack.lock


def _compile_argv(stack: Stack, *, newest: date, out: Path) -> tuple[str, ...]:
    needs = stack.needs
    source = (word for name in stack.image.source for word in ("--no-binary", name))
    excludes = ("--excludes", stack.excludes.name) if stack.excludes.exists() else ()
    return (
        *(uv.find_uv_bin(), "pip", "compile", stack.requirements.name, *excludes, "--output-file", str(out)),
        *("--generate-hashes", "--only-binary", ":all:", *source, "--no-emit-index-url", "--no-header"),
        *("--python-version", stack.python, "--exclude-newer", newest.isoformat(), "--quiet"),
        *("--python-platform", f"{needs.machine}-manylinux_{needs.glibc.replace('.', '_')}"),
    )


def _uv(argv: tuple[str, ...], *, stack: Stack) -> subprocess.CompletedProcess[str]:
    """Run uv in the stack's folder. Wheels that only this machine's pip sees count where stack.toml allows them: elsewhere
    they would lock a `torch+cpu` for a GPU.
    """
    env = dict(os.environ)
    if stack.image.wheelhouse and "PIP_FIND_LINKS" in env:
        env.setdefault("UV_FIND_LINKS", env["PIP_FIND_LINKS"])
    return subprocess.run(  # noqa: S603 - our own argv
        argv, cwd=stack.folder, env=env, capture_output=True, text=True, check=False
    )


def _header(stack: Stack, *, newest: date) -> str:
    return (
        f"# Every package of stack {stack.name!r}, with the hashes of its files. "
        f"Made by `{LOCK_COMMAND} {stack.name} {newest}`, not by hand.\n"
        f"# Python {stack.python}, {stack.needs.machine}, glibc {stack.needs.glibc}; "
        f"files published before {newest.isoformat()}.\n"
        f"# Made from requirements.in and excludes.txt, inputs sha256:{inputs_hash(stack)}\n"
    )


def main(argv: list[str]) -> int:
    """`python -m lab.stacks.lock STACK DATE`: lock the stack from files published before the date."""
    try:
        name, newest = argv
        write_lock(load_stack(name, root=places.ROOT), newest=date.fromisoformat(newest), say=print)
    except ValueError:
        print(f"usage: {LOCK_COMMAND} STACK YYYY-MM-DD", file=sys.stderr)
        return 1
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
