"""One container as data, made from the plan, and its two spellings: the arguments of the Docker SDK and the words of
`docker run`. A test holds both against each other on a real engine. Pure: nothing here talks to an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GpuRequest = Literal["none", "nvidia", "cdi"]

# Where things lie inside a container.
STACK, MODEL, LAB, TRIAL, SCRATCH, JIT = (
    "/opt/stack",
    "/model",
    "/lab",
    "/trial",
    "/scratch",
    "/jit",
)
PORT = 30000

RUN_LABEL = "sglang-lab.run"
OWNER_LABEL = "sglang-lab.owner"

# Sent first by `docker stop`; SGLang ends in order on it.
STOP_SIGNAL = "SIGINT"

# The program's own output goes straight to the log file, unchanged and with the lab not in the way; what is left
# for the engine's log (the shell's complaints) is bounded.
SHELL = "/bin/sh"  # also the entry point, so that an image's own (CUDA's prints a page) is not run
TO_LOG = ("-c", 'exec "$@" >> "$0" 2>&1')
LOG_LIMIT = {"max-size": "10m", "max-file": "1"}

# What a profiled trial's server may do beyond the others. Tracing with nsys needs nothing; GPU counters are closed
# to all but administrators unless the driver says otherwise (NVIDIA's page ERR_NVGPUCTRPERM).
PROFILER_CAPABILITIES: dict[str, tuple[str, ...]] = {
    "": (),
    "nsys": (),
    "nsys-gpu-metrics": ("SYS_ADMIN",),
    "ncu": ("SYS_ADMIN",),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all containers of a run share. Sizes in GB (10^9 bytes).

    `image` is the image's ID (`sha256:...`), or its name where it is not built yet (dry run). `model`, `lab` and
    `jit` are folders of the host: the first two are mounted read-only, `jit` keeps what kernels were compiled
    at run time. `ulimits` the engine has accepted.
    """

    image: str
    image_name: str
    model: str
    lab: str
    jit: str
    gpu_request: GpuRequest = "none"
    shm_gb: float = 4.0
    memory_gb: float | None = None
    ulimits: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder (`kind` bind) or a named volume of the engine, and where the container sees it."""

    kind: Literal["bind", "volume"]
    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Container:
    """One container. Sizes in bytes; `cpus` and `mems` as cpuset lists, empty for all.

    `network` is a network's name or `container:NAME`, whose network it shares. `publish` is the host's loopback
    port for the container's `PORT`: 0 for any, None for no port. `gpus` are UUIDs.
    """

    name: str
    image: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, str], ...]
    user: str
    network: str
    mounts: tuple[Mount, ...]
    log: str
    workdir: str = SCRATCH
    cpus: str = ""
    mems: str = ""
    publish: int | None = None
    gpus: tuple[str, ...] = ()
    gpu_request: GpuRequest = "none"
    shm_bytes: int = 64_000_000
    memory_bytes: int | None = None
    ulimits: tuple[tuple[str, int], ...] = ()
    capabilities: tuple[str, ...] = ()

    @property
    def command(self) -> tuple[str, ...]:
        """What the shell is told: to become the program, with its output sent to the log."""
        return (*TO_LOG, self.log, *self.argv)


def volume_options(folder: str) -> dict[str, str]:
    """Options of the `local` volume driver that make a named volume of a folder: removing it keeps the folder."""
    return {"type": "none", "o": "bind", "device": folder}


def visible_devices(container: Container) -> tuple[tuple[str, str], ...]:
    """The environment that keeps NVIDIA's runtime from adding GPUs nobody asked for.

    CUDA's base images say "all", and where NVIDIA's runtime is the engine's default that is what every
    container gets. With a request for GPUs the engine sets the variable itself.
    """
    return () if container.gpus else (("NVIDIA_VISIBLE_DEVICES", "void"),)


def device_requests(container: Container) -> list[dict[str, object]]:
    """The request for exactly these GPUs, in the way the engine knows."""
    if not container.gpus:
        return []
    if container.gpu_request == "cdi":
        return [{"driver": "cdi", "device_ids": [f"nvidia.com/gpu={gpu}" for gpu in container.gpus]}]
    return [{"device_ids": list(container.gpus), "capabilities": [["gpu"]]}]


def sdk_arguments(container: Container) -> dict[str, object]:
    """Keyword arguments of the SDK's `containers.create`."""
    shares = container.network.startswith("container:")
    arguments: dict[str, object] = {
        "image": container.image,
        "command": list(container.command),
        "name": container.name,
        "environment": dict((*container.env, *visible_devices(container))),
        "labels": dict(container.labels),
        "user": container.user,
        "working_dir": container.workdir,
        "entrypoint": [SHELL],
        "init": True,
        "stop_signal": STOP_SIGNAL,
        "cap_drop": ["ALL"],
        "cap_add": list(container.capabilities),
        "security_opt": ["no-new-privileges"],
        "cpuset_cpus": container.cpus,
        "cpuset_mems": container.mems,
        "shm_size": container.shm_bytes,
        "ulimits": [{"Name": n, "Soft": v, "Hard": v} for n, v in container.ulimits],
        "mounts": [
            {"Type": m.kind, "Source": m.source, "Target": m.target, "ReadOnly": m.read_only}
            for m in container.mounts
        ],
        "device_requests": device_requests(container),
        "log_config": {"type": "json-file", "config": LOG_LIMIT},
        "network_mode" if shares else "network": container.network,
    }
    if container.memory_bytes is not None:  # without swap, so that too little memory shows at once
        arguments |= {"mem_limit": container.memory_bytes, "memswap_limit": container.memory_bytes}
    if container.publish is not None:
        arguments["ports"] = {f"{PORT}/tcp": ("127.0.0.1", container.publish or None)}
    return arguments


def run_words(container: Container) -> list[tuple[str, ...]]:
    """The words of `docker run` after those two, one option (with its value) an item; the image, and then the
    command, come last."""
    c = container
    options: list[tuple[str, ...]] = [
        ("--name", c.name),
        *(("--label", f"{key}={value}") for key, value in c.labels),
        ("--user", c.user),
        ("--workdir", c.workdir),
        ("--entrypoint", SHELL),
        ("--init",),
        ("--stop-signal", STOP_SIGNAL),
        ("--cap-drop", "ALL"),
        *(("--cap-add", name) for name in c.capabilities),
        ("--security-opt", "no-new-privileges"),
        *((("--cpuset-cpus", c.cpus),) if c.cpus else ()),
        *((("--cpuset-mems", c.mems),) if c.mems else ()),
        ("--shm-size", str(c.shm_bytes)),
        *(("--ulimit", f"{name}={value}:{value}") for name, value in c.ulimits),
        *(("--mount", _mount_word(mount)) for mount in c.mounts),
        *_gpu_words(c),
        ("--log-driver", "json-file"),
        *(("--log-opt", f"{key}={value}") for key, value in LOG_LIMIT.items()),
        ("--network", c.network),
    ]
    if c.memory_bytes is not None:
        options += [("--memory", str(c.memory_bytes)), ("--memory-swap", str(c.memory_bytes))]
    if c.publish is not None:
        options.append(("--publish", f"127.0.0.1:{c.publish or ''}:{PORT}"))
    env = (*c.env, *visible_devices(c))
    return [*options, *(("--env", f"{key}={value}") for key, value in env), (c.image,), c.command]


def _mount_word(mount: Mount) -> str:
    only = ",readonly" if mount.read_only else ""
    return f"type={mount.kind},source={mount.source},target={mount.target}{only}"


def _gpu_words(container: Container) -> list[tuple[str, ...]]:
    if not container.gpus:
        return []
    if container.gpu_request == "cdi":
        return [("--device", f"nvidia.com/gpu={gpu}") for gpu in container.gpus]
    return [("--gpus", f'"device={",".join(container.gpus)}"')]
