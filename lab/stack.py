"""Which software serves: a folder under containers/ (stack.toml, requirements.txt, shims) goes in, a frozen
`Stack` comes out, with a hash of everything that determines the environment built from it, and two checks of
the machine: is it of the kind the stack was made for, and has it the room. Nothing is built or run here;
`stacks.build` does that.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from lab.errors import LabError, unknown_name
from lab.stackfile import StackFile

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
    driver: str = ""  # the oldest NVIDIA driver that will do; "" where none is needed


@dataclass(frozen=True, kw_only=True)
class Image:
    """How the stack's image is made, and the versions that the finished image must have ("" for none)."""

    base: str = ""
    digest: str = ""  # "sha256:..." of the base image; "" where it is not pinned
    python: str = ""  # the release that uv gets where the base has no finished one
    date: str = "1980-01-01"  # the day that everything the build writes is dated with
    packages: tuple[str, ...] = ()  # NAME=VERSION of the base's distribution
    wheelhouse: tuple[str, ...] = ()  # packages fetched by the pip of this machine, not inside the build
    source: tuple[str, ...] = ()  # packages published as source only, built in the image
    torch_cuda: str = ""
    cuda_toolkit: str = ""
    nsys: str = ""
    ncu: str = ""
    build_gb: float = 0.0  # disk that a build needs, in GB (10^9 bytes)

    @property
    def pinned_base(self) -> str:
        """The base image with its digest."""
        return f"{self.base}@{self.digest}" if self.digest else self.base


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
    observe_args: tuple[str, ...] = ()  # what makes this release tell what it does
    command: tuple[str, ...] = ()  # a module with arguments that must run where there is no GPU
    image: Image = Image()

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


def list_stacks(root: Path) -> tuple[str, ...]:
    """Names of the stacks under `root`/containers, sorted."""
    return tuple(sorted(file.parent.name for file in (root / "containers").glob("*/stack.toml")))


def load_stack(name: str, *, root: Path) -> Stack:
    """The stack `name` of the repository at `root`; `LabError` when it is unknown or badly described."""
    if name not in list_stacks(root):
        raise unknown_name("stack", name, list_stacks(root))
    folder = root / "containers" / name
    file = StackFile(folder / "stack.toml")
    if file.text("", "name") != name:
        raise LabError(
            f"{file.file} says name = {file.text('', 'name')!r}, its folder is {name!r}",
            fix="give both the same name",
        )
    return Stack(
        name=name,
        folder=folder,
        description=file.text("", "description"),
        sglang=file.text("", "sglang"),
        torch=file.text("", "torch"),
        python=file.text("", "python"),
        device=file.text("", "device"),
        dialect=file.text("", "dialect"),
        needs=_needs(file),
        image=_image(file),
        env=file.pairs("env"),
        server_args=file.strings("server", "args"),
        observe_args=file.strings("server", "observe"),
        imports=file.strings("verify", "imports"),
        command=file.strings("verify", "command"),
        lock_hash=_lock_hash(folder, python=file.text("", "python")),
    )


def _needs(file: StackFile) -> Needs:
    return Needs(
        memory_gb=file.size_gb("needs", "memory_gb"),
        disk_gb=file.size_gb("needs", "disk_gb"),
        system=file.text("needs", "system"),
        machine=file.text("needs", "machine"),
        glibc=file.text("needs", "glibc"),
        driver=file.text("needs", "driver"),
    )


def _image(file: StackFile) -> Image:
    day = file.text("image", "date")
    try:
        date.fromisoformat(day)
    except ValueError:
        raise LabError(
            f"date in [image] of {file.file} must be a day like 2026-11-20, it is {day!r}",
            fix="correct the value",
        ) from None
    return Image(
        base=file.text("image", "base"),
        digest=file.text("image", "digest"),
        python=file.text("image", "python"),
        date=day,
        packages=file.strings("image", "packages"),
        wheelhouse=file.strings("image", "wheelhouse"),
        source=file.strings("image", "source"),
        torch_cuda=file.text("image", "torch_cuda"),
        cuda_toolkit=file.text("image", "cuda_toolkit"),
        nsys=file.text("image", "nsys"),
        ncu=file.text("image", "ncu"),
        build_gb=file.size_gb("image", "build_gb"),
    )


def all_stacks(root: Path) -> tuple[Stack, ...]:
    """Every stack under `root`/containers, in the order of their names."""
    return tuple(load_stack(name, root=root) for name in list_stacks(root))


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


def driver_runs(stack: Stack, *, driver: str) -> bool:
    """Whether the NVIDIA driver ("555.42.06", "" for none) is new enough for the stack."""
    wanted = stack.needs.driver
    return not wanted or bool(driver and _version(driver) >= _version(wanted))


def check_driver(stack: Stack, *, driver: str, stacks: Iterable[Stack]) -> None:
    """`LabError` when the NVIDIA driver ("555.42.06", "" for none) is older than `stack` needs; it names which of
    `stacks` would do.
    """
    wanted = stack.needs.driver
    if driver_runs(stack, driver=driver):
        return
    fit = [s for s in stacks if driver_runs(s, driver=driver)]
    on_gpu = [s.name for s in fit if s.needs.driver]
    would_do = " or ".join(on_gpu or [s.name for s in fit if s.name != stack.name]) or "none of the lab's"
    raise LabError(
        f"the NVIDIA driver {driver} is too old for stack {stack.name!r}, which needs {wanted} or newer"
        if driver
        else f"stack {stack.name!r} needs an NVIDIA driver, {wanted} or newer; this machine has none",
        why=f"SGLang {stack.sglang} there runs on torch {stack.torch}, built with CUDA {stack.image.torch_cuda}",
        fix=f"--stack {would_do} fits this machine; or update the driver",
    )


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
