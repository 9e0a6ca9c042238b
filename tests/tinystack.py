"""A complete small stack for tests: a wheel made here, a lock with its hash, a shim; built in two seconds."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.stack import Stack, load_stack

TOML = """
schema = 1
name = "tiny"
description = "one small package"
sglang = "0"
torch = "9.9+cpu"
python = "3.11"
device = "cpu"
dialect = "0"
[needs]
memory_gb = 0
disk_gb = 0
system = "Linux"
machine = "x86_64"
glibc = "2.17"
driver = ""
[image]
base = "tiny"
digest = ""
python = "3.11.15"
date = "2026-11-20"
packages = []
wheelhouse = []
source = []
torch_cuda = ""
cuda_toolkit = ""
nsys = ""
ncu = ""
build_gb = 0
[env]
LABTINY_SECONDS = "{seconds}"
[server]
args = []
observe = []
[verify]
imports = {imports}
command = []
"""
MODULE = """
import os, time
import tinyshim
time.sleep(float(os.environ["LABTINY_SECONDS"]))
__version__ = "1.0"
def main():
    print("labtiny")
"""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel to make: its requirements as it declares them, its files beside the metadata."""

    name: str = "labtiny"
    version: str = "1.0"
    requires: tuple[str, ...] = ()
    files: Mapping[str, str] | None = None


def make_wheel(package: Package, *, folder: Path) -> str:
    """Write the wheel into `folder` and return its line for a lock."""
    files = dict(package.files if package.files is not None else {f"{package.name}/__init__.py": MODULE})
    info = f"{package.name}-{package.version}.dist-info"
    requires = "".join(f"Requires-Dist: {want}\n" for want in package.requires)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n{requires}"
    )
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{package.name} = {package.name}:main\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files)
    wheel = folder / f"{package.name}-{package.version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{package.name}=={package.version} \\\n    --hash=sha256:{digest}\n"


def make_stack(
    root: Path,
    *packages: Package,
    seconds: float = 0,
    excludes: tuple[str, ...] = (),
    imports: tuple[str, ...] = ("labtiny",),
) -> Stack:
    """A stack of these packages (labtiny if none is given) under `root`, its wheels in `root`/wheels.

    Importing labtiny, which is what verifying the build does, takes `seconds`.
    """
    folder = root / "containers" / "tiny"
    (folder / "shims").mkdir(parents=True, exist_ok=True)
    (folder / "shims" / "tinyshim.py").write_text("WORD = 'shim'\n")
    (folder / "shims" / "tinyshim.pth").write_text("import tinyshim\n")
    lock = "".join(make_wheel(package, folder=root / "wheels") for package in packages or (Package(),))
    (folder / "requirements.txt").write_text(lock)
    (folder / "excludes.txt").write_text("".join(f"{name}\n" for name in excludes))
    (folder / "stack.toml").write_text(TOML.format(seconds=seconds, imports=list(imports)))
    return load_stack("tiny", root=root)
