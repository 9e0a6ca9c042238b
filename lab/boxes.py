"""The containers of a run: from what the plan says of a process to a `Container`, and the names and labels that a
run's things have at the engine. Pure; the runtime fills in real values, commands.sh shell variables."""

from __future__ import annotations

from dataclasses import dataclass

from lab.container import (
    JIT,
    LAB,
    MODEL,
    OWNER_LABEL,
    PORT,
    PROFILER_CAPABILITIES,
    RUN_LABEL,
    SCRATCH,
    STACK,
    TRIAL,
    Container,
    Mount,
    Setup,
)
from lab.hardware.sysfs import format_list
from lab.plan import Process

GB = 1_000_000_000

# What the plan's placeholders are in every container.
PLACES = {"STACK": STACK, "MODEL": MODEL, "LAB": LAB, "JIT": JIT}
VALUES = {**PLACES, "TRIAL": TRIAL, "SCRATCH": SCRATCH, "PORT": str(PORT)}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a run's things are called at the engine, and the labels that make them ours.

    `owner` is the lab's process (`runtime.owner`); empty for a script, whose things no lab sweeps.
    """

    run_id: str
    owner: str = ""

    @property
    def prefix(self) -> str:
        """Starts every name; run names are unique."""
        return f"sglang-lab-{self.run_id}"

    @property
    def network(self) -> str:
        """The run's network."""
        return self.prefix

    @property
    def model(self) -> str:
        """The volume with the model."""
        return f"{self.prefix}-model"

    @property
    def jit(self) -> str:
        """The volume with what was compiled at run time."""
        return f"{self.prefix}-jit"

    @property
    def labels(self) -> dict[str, str]:
        """Of every container, network and volume."""
        owner = {OWNER_LABEL: self.owner} if self.owner else {}
        return {RUN_LABEL: self.run_id, **owner}


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a trial's folders are on the host."""

    trial: str
    scratch: str


def container(
    name: str,
    process: Process,
    *,
    setup: Setup,
    names: Names,
    folders: Folders,
    network: str,
    user: str,
    log: str,
    publish: int | None = None,
) -> Container:
    """The container for a process whose placeholders are filled in.

    `publish` is the host's loopback port for a process that listens (0: any) and None for one that does not;
    `log` is a path below the trial's folder.
    """
    listens = publish is not None
    return Container(
        name=f"{names.prefix}-{name}",
        image=setup.image,
        argv=process.argv,
        env=process.env,
        labels=tuple(sorted(names.labels.items())),
        user=user,
        network=network,
        mounts=(
            Mount(kind="bind", source=folders.trial, target=TRIAL),
            Mount(kind="bind", source=folders.scratch, target=SCRATCH),
            Mount(kind="bind", source=setup.lab, target=LAB, read_only=True),
            Mount(kind="volume", source=names.model, target=MODEL, read_only=True),
            Mount(kind="volume", source=names.jit, target=JIT),
        ),
        log=f"{TRIAL}/{log}",
        cpus=format_list(process.cpus),
        mems=format_list(process.mems),
        publish=publish,
        gpus=process.gpus,
        gpu_request=setup.gpu_request if process.gpus else "none",
        shm_bytes=int(setup.shm_gb * GB),
        memory_bytes=int(setup.memory_gb * GB) if listens and setup.memory_gb else None,
        ulimits=tuple(sorted(setup.ulimits.items())),
        capabilities=PROFILER_CAPABILITIES[process.profiler],
    )
