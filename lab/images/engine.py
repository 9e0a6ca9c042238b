"""The Docker engine of this machine as its command line shows it: which of the `docker` programs on PATH can build with
BuildKit, whether an engine answers, what it holds. Small questions only; building is `images.build`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.stacks.run import child_env

STACK_LABEL = "lab.stack"
WITHOUT = "or run without containers: --runtime process"


@dataclass(frozen=True, kw_only=True)
class Client:
    """A `docker` program that can build with BuildKit; `argv` is how its build begins."""

    path: Path
    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LabImage:
    """An image of the lab in the engine, with its labels (lab.stack, lab.stack.lock, lab.base and the versions)."""

    id: str
    tags: tuple[str, ...]
    size_bytes: int
    labels: Mapping[str, str]


def docker_env(env: Mapping[str, str]) -> dict[str, str]:
    """The part of `env` for docker: that of any child, and docker's own."""
    own = {key: value for key, value in env.items() if key.startswith(("DOCKER_", "BUILDX_"))}
    return {**child_env(env), **own, "DOCKER_BUILDKIT": "1"}


def find_client(*, env: Mapping[str, str]) -> Client:
    """The first `docker` on PATH that can build with BuildKit: with buildx, or older than 23, which brought it built in."""
    tried = []
    for folder in env.get("PATH", "").split(os.pathsep):
        path = Path(folder, "docker")
        if not folder or not os.access(path, os.X_OK):
            continue
        if _asked((str(path), "buildx", "version"), env=env) is not None:
            return Client(path=path, argv=(str(path), "buildx", "build", "--load"))
        version = re.search(r"version (\d+)\.", _asked((str(path), "--version"), env=env) or "")
        if version and int(version.group(1)) < 23:
            return Client(path=path, argv=(str(path), "build"))
        tried.append(f"{path} {'does not run' if version is None else f'{version.group(1)} has no buildx'}")
    raise LabError(
        "no docker on PATH can build images with BuildKit" if tried else "there is no docker on PATH",
        why="; ".join(tried),
        fix=f"install Docker with its buildx plugin (docker-buildx, docker-buildx-plugin), {WITHOUT}",
    )


def check_engine(client: Client, *, env: Mapping[str, str]) -> str:
    """The version of the engine that `client` reaches; `LabError` when none answers."""
    argv = (str(client.path), "version", "--format", "{{.Server.Version}}")
    result = _run(argv, env=env)
    if result.returncode or not result.stdout.strip():
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LabError(
            "no Docker engine answers",
            why=last,
            fix=f"start it (systemctl start docker, or dockerd), {WITHOUT}",
        )
    return result.stdout.strip()


def inspect_image(client: Client, name: str, *, env: Mapping[str, str]) -> Mapping[str, object] | None:
    """What the engine knows of the image (`docker image inspect`), or None when it does not have it."""
    result = _run((str(client.path), "image", "inspect", name), env=env)
    if result.returncode:
        return None
    found = json.loads(result.stdout)[0]
    if not isinstance(found, dict):
        raise TypeError(f"docker image inspect answered {found!r}")
    return found


def base_digest(client: Client, name: str, *, env: Mapping[str, str]) -> str:
    """The digest (sha256:...) under which a registry has the image, "" for one made on this machine."""
    found = inspect_image(client, name, env=env) or {}
    digests = found.get("RepoDigests")
    first = str(digests[0]) if isinstance(digests, list) and digests else ""
    return first.partition("@")[2]


def list_images(client: Client, *, env: Mapping[str, str]) -> tuple[LabImage, ...]:
    """The lab's images that the engine has, newest first."""
    argv = (str(client.path), "image", "ls", "--quiet", "--no-trunc", "--filter", f"label={STACK_LABEL}")
    result = _run(argv, env=env)
    found = (inspect_image(client, name, env=env) for name in dict.fromkeys(result.stdout.split()))
    return tuple(_lab_image(image) for image in found if image is not None)


def _lab_image(found: Mapping[str, object]) -> LabImage:
    config, tags, size = found["Config"], found["RepoTags"], found["Size"]
    stated = config.get("Labels") if isinstance(config, dict) else None
    return LabImage(
        id=str(found["Id"]),
        tags=tuple(str(tag) for tag in tags) if isinstance(tags, list) else (),
        size_bytes=size if isinstance(size, int) else 0,
        labels={str(key): str(value) for key, value in stated.items()} if isinstance(stated, dict) else {},
    )


def layers(client: Client, name: str, *, env: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Size as docker writes it ("1.03GB") and origin of every layer of the image that is not empty, the last one first."""
    argv = (str(client.path), "history", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", name)
    lines = (line.partition("\t") for line in _run(argv, env=env).stdout.splitlines())
    return tuple((size, origin) for size, _, origin in lines if size != "0B")


def free_gb(client: Client, *, env: Mapping[str, str]) -> float | None:
    """Free disk where the engine keeps its images, in GB (10^9 bytes); None where that is not a folder of this machine."""
    root = _asked((str(client.path), "info", "--format", "{{.DockerRootDir}}"), env=env)
    try:
        disk = os.statvfs((root or "").strip())
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize / 1e9


def _asked(argv: tuple[str, ...], *, env: Mapping[str, str]) -> str | None:
    """What the program prints; None when it does not run or fails."""
    try:
        result = _run(argv, env=env)
    except OSError:
        return None
    return None if result.returncode else result.stdout


def _run(argv: tuple[str, ...], *, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - our own argv
            argv,
            env=dict(env),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"{' '.join(argv[:2])} did not answer within 60 s")
