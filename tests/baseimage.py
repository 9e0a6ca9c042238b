"""A base image for tests where no registry can be reached: the machine's own Debian packages, as a Docker image.

`python tests/baseimage.py [TAG]` (or `make`) reads which installed packages a small Debian with Python consists of,
streams their files as one tar archive into `docker import`, and leaves the image TAG in the running engine. Nothing is
downloaded and nothing is written to disk; the machine must be a Debian or Ubuntu. The machine's certificates and
package sources come along, so that pip, uv and apt work inside as they do outside; its users and secrets do not.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

TAG = "sglang-lab-base:local"
SEEDS = ("apt", "ca-certificates", "openssl", "python3", "python3.11")
LEFT_OUT = re.compile(r"^/usr/share/(man|doc|locale|info|lintian)/")
# What the packages' installation scripts make, so that no package lists it.
GENERATED = (
    "/etc/ssl/certs",
    "/etc/ca-certificates.conf",
    "/usr/local/share/ca-certificates",
    "/etc/apt",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/var/lib/dpkg/alternatives",
)
FOLDERS = (
    "dev",
    "etc",
    "home",
    "proc",
    "root",
    "run",
    "sys",
    "var/cache/apt/archives/partial",
    "var/lib/apt/lists/partial",
    "var/log",
)
DPKG = Path("/var/lib/dpkg")


def make(tag: str = TAG) -> None:
    """Make the image `tag` (about ten seconds, 120 MB)."""
    packages = closure(seeds())
    paths = listed(packages)
    with subprocess.Popen(
        ("docker", "import", "--change", 'CMD ["/bin/bash"]', "-", tag), stdin=subprocess.PIPE
    ) as docker:
        assert docker.stdin is not None
        with tarfile.open(fileobj=docker.stdin, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            _fill(archive, packages=packages, paths=paths)
    if docker.returncode:
        raise SystemExit(f"docker import ended with {docker.returncode}")


def seeds() -> tuple[str, ...]:
    """What every Debian has, and what the lab wants."""
    shown = "${Package} ${Essential} ${Priority}\n"
    lines = _lines("dpkg-query", "--show", "--showformat", shown)
    always = (
        line.split()[0] for line in lines if line.split()[1:] and {"yes", "required"} & set(line.split()[1:])
    )
    return (*always, *SEEDS)


def closure(names: Iterable[str]) -> tuple[str, ...]:
    """The packages `names` and all that they depend on, as far as installed here."""
    without = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    argv = ("apt-cache", "depends", "--recurse", "--installed", *(f"--no-{kind}" for kind in without), *names)
    found = {line.partition(":")[0] for line in _lines(*argv) if line[:1].isalnum()}
    shown = "${Package} ${db:Status-Status}\n"
    installed = {
        line.split()[0]
        for line in _lines("dpkg-query", "--show", "--showformat", shown)
        if line.endswith(" installed")
    }
    return tuple(sorted(found & installed))  # apt names alternatives that are not there, too


def files_of(packages: Iterable[str]) -> Iterator[str]:
    """Paths of the packages' files and folders, and of the bytecode that Python's packages were given."""
    for path in _lines("dpkg", "--listfiles", *packages):
        if path.startswith("/") and path != "/." and not LEFT_OUT.match(path):
            yield path
            if path.endswith(".py"):
                cached = Path(path).parent / "__pycache__" / f"{Path(path).stem}.cpython-311.pyc"
                if cached.exists():
                    yield str(cached.parent)
                    yield str(cached)


def listed(packages: Iterable[str]) -> tuple[str, ...]:
    """Everything of the packages and what their installation made, every folder before what is in it."""
    generated = (str(file) for top in GENERATED for file in (Path(top), *sorted(Path(top).rglob("*"))))
    paths = {_merged(path) for path in (*files_of(packages), *generated)}
    links = (str(link) for link in Path("/usr/bin").iterdir() if _is_alternative(link))
    paths |= {link for link in links if str(Path(link).resolve()) in paths}
    return tuple(sorted(path for path in paths if path.lstrip("/") not in (*FOLDERS, "tmp", "var/tmp")))


def _fill(archive: tarfile.TarFile, *, packages: tuple[str, ...], paths: tuple[str, ...]) -> None:
    """Write the whole file system into the archive."""
    for name in ("bin", "sbin", "lib", "lib64", "lib32", "libx32"):
        if Path("/", name).is_symlink():
            archive.add(f"/{name}", name, recursive=False)
    for folder in FOLDERS:
        _folder(archive, folder, mode=0o755)
    for folder in ("tmp", "var/tmp"):
        _folder(archive, folder, mode=0o1777)
    for path in paths:
        if Path(path).exists() or Path(path).is_symlink():
            archive.add(path, path.lstrip("/"), recursive=False)
    for name in (
        "hostname",
        "hosts",
        "resolv.conf",
    ):  # where an engine mounts its own: not made anew by each build step
        _text(archive, f"etc/{name}", "")
    for kind in ("passwd", "group"):  # Debian's own users, not this machine's
        _text(
            archive, f"etc/{kind}", Path(f"/usr/share/base-passwd/{kind}.master").read_text(encoding="utf-8")
        )
    _text(archive, "var/lib/dpkg/status", _status(packages))
    for file in sorted((DPKG / "info").iterdir()):
        if file.stem.partition(":")[0] in packages or file.name == "format":
            archive.add(str(file), str(file).lstrip("/"), recursive=False)


def _merged(path: str) -> str:
    """`path` as it is where /bin, /lib and the like are links into /usr."""
    return re.sub(r"^/(bin|sbin|lib|lib32|lib64|libx32)(?=/|$)", r"/usr/\1", path)


def _is_alternative(link: Path) -> bool:
    return link.is_symlink() and str(link.readlink()).startswith("/etc/alternatives/")


def _status(packages: tuple[str, ...]) -> str:
    """dpkg's list of installed packages, with these packages only."""
    paragraphs = (DPKG / "status").read_text(encoding="utf-8").strip().split("\n\n")
    kept = (text for text in paragraphs if text.split("\n")[0].removeprefix("Package: ") in packages)
    return "\n\n".join(kept) + "\n"


def _folder(archive: tarfile.TarFile, name: str, *, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    archive.addfile(entry)


def _text(archive: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    entry = tarfile.TarInfo(name)
    entry.mode, entry.size = 0o644, len(content)
    archive.addfile(entry, io.BytesIO(content))


def _lines(*argv: str) -> list[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


if __name__ == "__main__":
    make(*sys.argv[1:])
