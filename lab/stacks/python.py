"""Finds a Python of the version that a stack needs: the lab's own when it fits, else one on the machine, else
uv gets one. A candidate counts only if it starts, is of that version, and has the parts of the standard
library that the stack's packages import. What was tried, and why it was passed over, comes back with the
result.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import uv

from lab.errors import LabError

# Compiled parts of the standard library that a home-built Python may lack.
NEEDED = ("bz2", "ctypes", "lzma", "sqlite3", "ssl", "venv", "zlib")
PROBE = """
import json, sys
lacks = []
for name in sys.argv[1:]:
    try:
        __import__(name)
    except ImportError:
        lacks.append(name)
print(json.dumps([list(sys.version_info[:3]), lacks]))
"""


@dataclass(frozen=True, kw_only=True)
class Python:
    """A usable Python: its path, its full version, and a line for each candidate that was looked at."""

    path: Path
    version: str
    tried: tuple[str, ...]


def find_python(version: str, *, env: Mapping[str, str]) -> Python:
    """A Python of `version` ("3.11"); `LabError` when the machine has none and uv cannot get one."""
    tried: list[str] = []
    for path in _candidates(version, env=env):
        found, verdict = probe(path, version=version, env=env)
        tried.append(f"{path}: {verdict}")
        if found is not None:
            return Python(path=path, version=found, tried=tuple(tried))
    raise LabError(
        f"no Python {version} was found on this machine, and uv could not get one",
        why="; ".join(tried),
        fix=f"install Python {version} (a package of the system, pyenv or `uv python install {version}`) "
        f"so that `python{version}` is on PATH, and run the same command again",
    )


def probe(path: Path, *, version: str, env: Mapping[str, str]) -> tuple[str | None, str]:
    """The full version of the Python at `path` if it can serve as `version`, and a word on what was found."""
    argv = (str(path), "-I", "-c", PROBE, *NEEDED)
    try:
        result = subprocess.run(  # noqa: S603 - our own argv
            argv, env=dict(env), capture_output=True, text=True, check=True, timeout=60
        )
        numbers, lacks = json.loads(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return None, f"does not run ({type(error).__name__})"
    full = ".".join(str(number) for number in numbers)
    if not full.startswith(f"{version}."):
        return None, f"is Python {full}"
    if lacks:
        return None, f"lacks {', '.join(lacks)}"
    return full, f"Python {full}"


def _candidates(version: str, *, env: Mapping[str, str]) -> Iterator[Path]:
    """Where to look, nearest first; asking uv to download one is the last resort."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        yield Path(sys.executable)
    on_path = shutil.which(f"python{version}", path=env.get("PATH"))
    if on_path:
        yield Path(on_path)
    root = Path(env.get("PYENV_ROOT", Path(env.get("HOME", "/")) / ".pyenv"))
    of_pyenv = (root / "versions").glob(f"{version}.*/bin/python")
    yield from sorted(of_pyenv, key=lambda path: _numbers(path.parent.parent.name), reverse=True)
    for action in (("find", version), ("install", version), ("find", "--managed-python", version)):
        result = subprocess.run(  # noqa: S603 - our own argv
            (uv.find_uv_bin(), "python", *action), env=dict(env), capture_output=True, text=True, check=False
        )
        if result.returncode == 0 and action[0] == "find":
            yield Path(result.stdout.strip())
        elif result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1].strip()
            yield Path(f"uv python {' '.join(action)}") / reason.replace(os.sep, " ")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
