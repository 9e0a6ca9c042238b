"""The one module that talks to the Docker engine, through its SDK. In go names, ids and `Container`s, out come plain
data; whatever the engine refuses is an `EngineError` with its reason, an engine that does not answer an `EngineGone`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import docker
import requests.exceptions
from docker import errors

from lab.container import PORT, RUN_LABEL, Container, sdk_arguments, volume_options
from lab.errors import LabError

LOCAL = re.compile(r"(unix|npipe|http\+docker)://")
OLDEST = (20, 10)  # DeviceRequests by UUID, cgroup v2, BuildKit without more
ANSWER_S = 30.0
_GONE = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


class EngineError(Exception):
    """The engine refused something; the text is its reason."""


class EngineGone(EngineError):  # noqa: N818 - says what happened
    """The engine does not answer (any more)."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A container's state. `exit_code` is None while it runs or when it never ran; `oom` tells that the kernel
    killed one of its processes for want of memory."""

    running: bool
    exit_code: int | None
    oom: bool
    error: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image the engine has: its ID, labels, size in bytes."""

    id: str
    labels: dict[str, str]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A container, network or volume with the lab's label."""

    kind: str
    id: str
    name: str
    labels: dict[str, str]


class Engine:
    """A connection to the engine that `DOCKER_HOST` names, or the local one."""

    def __init__(self, client: docker.DockerClient, *, version: str, info: dict[str, object]) -> None:
        self._client = client
        self.version = version
        self.info = info

    # ---- what the engine is

    @property
    def has_cdi(self) -> bool:
        """Whether it knows GPUs by CDI specifications (`docker info` lists folders for them from 25 on)."""
        return bool(self.info.get("CDISpecDirs"))

    @property
    def cpus(self) -> int:
        """How many CPUs the engine's machine has."""
        return int(str(self.info.get("NCPU", 0)))

    # ---- containers

    def create(self, container: Container) -> str:
        """Create a container and return its id."""
        with _words():
            return str(self._client.containers.create(**sdk_arguments(container)).id)

    def start(self, container_id: str) -> None:
        """Start a created container."""
        with _words():
            self._client.api.start(container_id)

    def state(self, container_id: str) -> State | None:
        """The container's state; None when there is no such container."""
        try:
            with _words():
                state = self._client.api.inspect_container(container_id)["State"]
        except _NotThere:
            return None
        running = bool(state["Running"])
        began = state["Status"] != "created"
        code = None if running or not began else int(state["ExitCode"])
        return State(running=running, exit_code=code, oom=bool(state["OOMKilled"]), error=str(state["Error"]))

    def oom_noted(self, container_id: str) -> bool:
        """Whether the kernel killed one of the container's processes for want of memory, as far as the engine
        remembers. While a container runs its state does not tell."""
        only = {"container": container_id, "event": "oom"}
        with _words():
            noted = self._client.api.events(since=0, until=f"{time.time():.6f}", filters=only, decode=True)
            return any(True for _ in noted)

    def wait(self, container_id: str, *, limit_s: float | None = None) -> int:
        """Block until the container has ended; its exit code. Over a connection of its own, so that a thread
        can wait. After `limit_s` seconds `EngineGone`: the SDK does not tell that from an engine that went."""
        with _words():
            client = docker.DockerClient.from_env(timeout=limit_s)
            try:
                return int(client.api.wait(container_id)["StatusCode"])
            finally:
                client.close()

    def published(self, container_id: str) -> int:
        """The loopback port of the host that leads to the container's `PORT`."""
        with _words():
            ports = self._client.api.inspect_container(container_id)["NetworkSettings"]["Ports"]
        bindings = ports.get(f"{PORT}/tcp") or []
        if not bindings:
            raise EngineError(f"port {PORT} of the container is not published")
        return int(bindings[0]["HostPort"])

    def signal(self, container_id: str, name: str) -> None:
        """Send a signal to the container's first process; nothing when it has ended."""
        with suppress(_NotThere, _NotRunning), _words():
            self._client.api.kill(container_id, name)

    def said(self, container_id: str) -> str:
        """What the container wrote to the engine's log: little, since programs write to their own."""
        with suppress(_NotThere), _words():
            return str(self._client.api.logs(container_id).decode("utf-8", errors="replace"))
        return ""

    def run_once(self, container: Container, *, limit_s: float = 60.0) -> tuple[int, str]:
        """Run a short program to its end: exit code and what it wrote to standard output and error."""
        created = self.create(container)
        try:
            self.start(created)
            return self.wait(created, limit_s=limit_s), self.said(created)
        finally:
            self.remove(Thing(kind="container", id=created, name=container.name, labels={}))

    # ---- networks, volumes, images

    def create_network(self, name: str, *, labels: dict[str, str]) -> None:
        """A bridge network of its own."""
        with _words():
            self._client.networks.create(name, driver="bridge", labels=labels, check_duplicate=True)

    def create_volume(self, name: str, *, folder: str, labels: dict[str, str]) -> None:
        """A named volume that is the folder `folder` of the host."""
        with _words():
            self._client.volumes.create(
                name, driver="local", driver_opts=volume_options(folder), labels=labels
            )

    def image(self, name: str) -> Image | None:
        """The image of that name or ID; None when the engine does not have it."""
        try:
            with _words():
                found = self._client.api.inspect_image(name)
        except _NotThere:
            return None
        labels = found["Config"].get("Labels") or {}
        return Image(id=str(found["Id"]), labels=dict(labels), size_bytes=int(found["Size"]))

    # ---- what is ours

    def ours(self) -> Iterator[Thing]:
        """Everything with the lab's label: containers first, then networks and volumes, which they use."""
        only = {"label": RUN_LABEL}
        with _words():
            api = self._client.api
            for c in api.containers(all=True, filters=only):
                name = str(c["Names"][0]).lstrip("/") if c["Names"] else ""
                yield Thing(kind="container", id=str(c["Id"]), name=name, labels=dict(c["Labels"] or {}))
            for n in api.networks(filters=only):
                yield Thing(
                    kind="network", id=str(n["Id"]), name=str(n["Name"]), labels=dict(n["Labels"] or {})
                )
            for v in api.volumes(filters=only)["Volumes"] or []:
                yield Thing(
                    kind="volume", id=str(v["Name"]), name=str(v["Name"]), labels=dict(v["Labels"] or {})
                )

    def remove(self, thing: Thing) -> None:
        """Remove a container (killing it first), network or volume; nothing when it is gone already."""
        with suppress(_NotThere), _words():
            if thing.kind == "container":
                self._client.api.remove_container(thing.id, force=True, v=True)
            elif thing.kind == "network":
                self._client.api.remove_network(thing.id)
            else:
                self._client.api.remove_volume(thing.id)


def connect() -> Engine:
    """The engine, after it has answered; `LabError` when it is absent or too old, with what to do."""
    host = os.environ.get("DOCKER_HOST", "")
    if host and not LOCAL.match(host):
        raise LabError(
            f"DOCKER_HOST is {host}, an engine on another machine",
            why="the lab mounts folders of this machine, and speaks to servers over its loopback",
            fix="run the lab on that machine, or use --runtime process",
        )
    try:
        client = docker.DockerClient.from_env(timeout=ANSWER_S)
        version = str(client.version()["Version"])
        found = Engine(client, version=version, info=client.info())
    except (errors.DockerException, *_GONE) as error:
        raise LabError(
            "no Docker engine answers",
            why=_reason(error),
            fix="start it (systemctl start docker), see that you may use its socket, or use --runtime process",
        ) from None
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        raise LabError(
            f"the Docker engine is {version}, the lab needs {'.'.join(map(str, OLDEST))} or newer",
            why="older ones cannot be asked for GPUs by their UUIDs",
            fix="install a newer engine, or use --runtime process",
        )
    return found


def accepted_ulimits(
    engine: Engine, *, wanted: dict[str, int], probe: Callable[[dict[str, int]], Container]
) -> tuple[dict[str, int], str]:
    """Those of the `wanted` limits that the engine can set, and in words why the others not.

    An engine without the right to raise limits (rootless, or itself in a container) refuses at start. `probe`
    makes a container that ends at once.
    """
    accepted: dict[str, int] = {}
    refused = []
    for name, value in wanted.items():
        try:
            engine.run_once(probe({name: value}))
            accepted[name] = value
        except EngineGone:
            raise
        except EngineError as error:
            if "rlimit" not in str(error):
                raise
            refused.append(f"the engine refuses the limit {name}={value} ({str(error)[-120:]})")
    return accepted, "; ".join(refused)


class _NotThere(EngineError):  # noqa: N818
    """404."""


class _NotRunning(EngineError):  # noqa: N818
    """409 of a signal to a container that has ended."""


@contextmanager
def _words() -> Iterator[None]:
    """The SDK's exceptions as ours."""
    try:
        yield
    except errors.NotFound as error:
        raise _NotThere(_reason(error)) from None
    except errors.APIError as error:
        kind = _NotRunning if error.status_code == 409 and "not running" in _reason(error) else EngineError
        raise kind(_reason(error)) from None
    except (errors.DockerException, *_GONE) as error:
        raise EngineGone(f"the Docker engine does not answer: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    explanation = getattr(error, "explanation", None) or str(error)
    return " ".join(str(explanation).split())
