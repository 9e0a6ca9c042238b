"""What an image really contains: measured with the image's own Python, compared with what stack.toml states.

    python smoke.py STACK.JSON [MEASURED.JSON]

STACK.JSON (made by lab/images/context.py) holds the stated versions, the locked packages and what must start. Prints what was
measured, writes it to MEASURED.JSON if that is given, and ends with 1 when anything differs. Needs no GPU. Uses nothing but
the standard library and, as pip itself does, `packaging`.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

VERSIONS = ("python", "sglang", "torch", "torch_cuda", "cuda_toolkit", "nsys", "ncu")
PARSE = """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
parser.parse_args()
"""


def main(argv: list[str]) -> int:
    """Measure, compare, write; the exit code."""
    stated = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    os.environ.update(stated["env"])
    installed = {normal_name(d.name): d for d in distributions()}
    measured = measure(installed)
    problems = [
        f"{name}: stack.toml states {stated[name] or 'none'}, the image has {measured[name] or 'none'}"
        for name in VERSIONS
        if not fits(measured[name], stated[name])
    ]
    problems += packages_that_differ(installed, stated["packages"])
    problems += unmet_requirements(installed, set(stated["excludes"]))
    problems += what_does_not_start(stated["imports"], stated["command"])
    problems += unknown_arguments(stated["server_args"])
    print(json.dumps(measured, indent=1, sort_keys=True))
    if problems:
        print("\n".join(f"SMOKE: {problem}" for problem in problems))
        return 1
    if len(argv) > 1:
        record = {"schema": 1, "stack": stated["stack"], "lock": stated["lock"], **measured}
        Path(argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("SMOKE: ok")
    return 0


def measure(installed: Mapping[str, Distribution]) -> dict[str, str]:
    """The versions that the image itself gives; "" for what it does not have."""

    def version(name: str) -> str:
        return installed[name].version if name in installed else ""

    return {
        "python": platform.python_version(),
        "sglang": version("sglang"),
        "torch": version("torch"),
        "torch_cuda": cuda_of_torch() if "torch" in installed else "",
        "cuda_toolkit": asked(("nvcc", "--version"), r"release (\d+\.\d+)"),
        "nsys": asked(("nsys", "--version"), r"version (\d+\.\d+\.\d+)"),
        "ncu": asked(("ncu", "--version"), r"Version (\d+\.\d+\.\d+)"),
    }


def cuda_of_torch() -> str:
    """The CUDA release that torch was built with, as torch says."""
    return importlib.import_module("torch").version.cuda or ""


def asked(argv: tuple[str, ...], pattern: str) -> str:
    """What the program says its version is; "" when there is no such program."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    try:
        result = subprocess.run(  # noqa: S603 - nvcc, nsys, ncu
            argv, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    found = re.search(pattern, result.stdout)
    return found.group(1) if found else f"unreadable: {(result.stdout + result.stderr)[:80]!r}"


def fits(measured: str, stated: str) -> bool:
    """Whether the version is the stated one, or one of its patch releases ("3.11" allows 3.11.2)."""
    return measured == stated or (bool(stated) and measured.startswith(f"{stated}."))


def packages_that_differ(installed: Mapping[str, Distribution], locked: Mapping[str, str]) -> list[str]:
    """Packages that are not there as locked, or are there though not locked."""
    found = {name: package.version for name, package in installed.items()}
    return [
        f"{name}: locked {locked.get(name, 'not at all')}, installed {found.get(name, 'not at all')}"
        for name in sorted(locked.keys() | found.keys())
        if locked.get(name) != found.get(name)
    ]


def unmet_requirements(installed: Mapping[str, Distribution], excludes: Collection[str]) -> list[str]:
    """What an installed package declares for this machine and does not find, as `pip check` tells."""
    if "packaging" not in installed:
        return ["packaging is not installed, so nothing can tell whether requirements are met"]
    Requirement = importlib.import_module("packaging.requirements").Requirement  # noqa: N806 - a class
    problems = []
    for name, package in sorted(installed.items()):
        for text in package.requires or ():
            want = Requirement(text)
            if normal_name(want.name) in excludes or (
                want.marker and not want.marker.evaluate({"extra": ""})
            ):
                continue
            found = installed.get(normal_name(want.name))
            if found is None or not want.specifier.contains(found.version, prereleases=True):
                problems.append(f"{name} requires {want}, installed: {found.version if found else 'none'}")
    return problems


def what_does_not_start(imports: Sequence[str], command: Sequence[str]) -> list[str]:
    """Modules that do not import, and the command (its first word a module) when it fails."""
    problems = []
    for name in imports:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it is, it stands in the build's log
            problems.append(f"import {name}: {type(error).__name__}: {error}")
    if command:
        result = subprocess.run(  # noqa: S603 - from stack.toml
            (sys.executable, "-m", *command), capture_output=True, text=True, check=False
        )
        if result.returncode:
            last = (result.stderr or result.stdout).strip().splitlines()[-3:]
            problems.append(
                f"python -m {' '.join(command)} ended with {result.returncode}: {' | '.join(last)}"
            )
    return problems


def unknown_arguments(args: Sequence[str]) -> list[str]:
    """What the release's own parser says against the arguments that every server of the stack gets."""
    if not args:
        return []
    result = subprocess.run(  # noqa: S603 - from stack.toml
        (sys.executable, "-c", PARSE, "--model-path", "model", *args),
        capture_output=True,
        text=True,
        check=False,
    )
    last = (result.stderr or result.stdout).strip().splitlines()[-1:]
    return [f"sglang does not take these arguments: {' '.join(args)}: {last}"] if result.returncode else []


def normal_name(name: str) -> str:
    """A package's name in the one spelling that makes names comparable."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
