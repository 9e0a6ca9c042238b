"""A machine as frozen data: GPUs, the links between them, CPUs, NUMA nodes, limits. `to_json` and `from_json` carry
it from one machine to another as hardware.json, so that placements can be planned for a box that is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec

from lab.errors import LabError

SCHEMA = 1

PciePath: TypeAlias = Literal["PIX", "PXB", "PHB", "NODE", "SYS", "UNKNOWN"]
"""The way between two GPUs over PCIe, near to far, in the words of `nvidia-smi topo -m`: one switch (PIX), several
switches (PXB), through the CPU's host bridge (PHB), between host bridges of one NUMA node (NODE), between NUMA nodes
(SYS); UNKNOWN where the driver does not say."""
PCIE_PATHS: tuple[PciePath, ...] = get_args(PciePath)


@dataclass(frozen=True, kw_only=True)
class MigDevice:
    """A slice of a GPU in MIG mode."""

    uuid: str
    memory_mib: int


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. None stands for what its driver does not answer; `unanswered` has the driver's words for it.

    `index` is NVML's and nvidia-smi's (PCI order). `pci_bus_id` is written as in /sys: 0000:07:00.0.
    """

    index: int
    uuid: str
    pci_bus_id: str
    name: str
    memory_mib: int | None
    compute_capability: str | None
    numa_node: int | None
    cpus: tuple[int, ...]
    """CPUs that the driver calls near; empty where it does not say."""
    mig: bool | None = None
    mig_devices: tuple[MigDevice, ...] = ()
    ecc: bool | None = None
    persistence: bool | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    power_min_w: float | None = None
    power_max_w: float | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    sm_clock_set_mhz: int | None = None
    """The application clock: what the SMs run at when nothing slows them."""
    memory_clock_set_mhz: int | None = None
    nvlinks: int = 0
    """Active NVLinks, to whatever they lead."""
    unanswered: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects GPUs `a` and `b` (indexes, a < b): a number of NVLinks, and the way over PCIe in any case."""

    a: int
    b: int
    path: PciePath
    nvlinks: int = 0
    switched: bool = False
    """The NVLinks lead through switches (NVSwitch), so they are shared with the other GPUs."""

    @property
    def label(self) -> str:
        """As `nvidia-smi topo -m` writes it: NV12, PXB, ..."""
        return f"NV{self.nvlinks}" if self.nvlinks else self.path


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A logical CPU. `core` is the lowest-numbered CPU of its physical core, so SMT siblings share it."""

    number: int
    core: int
    socket: int
    node: int


@dataclass(frozen=True, kw_only=True)
class NumaNode:
    """A NUMA node. `cpus` may be empty (memory only), `memory_mib` may be 0 (CPUs only) or None (not known).

    `distances` are the kernel's, 10 for itself, in the order of `Hardware.nodes`; empty where it does not say.
    """

    number: int
    cpus: tuple[int, ...]
    memory_mib: int | None
    distances: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Driver:
    """NVIDIA's driver; `cuda` is the newest CUDA version it runs without help, such as 12.5."""

    version: str
    cuda: str


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine. `driver` is None where there is none or it does not answer; `notes` say what could not be read.

    `cpus_allowed` and `mems_allowed` (NUMA nodes) are what affinity and cgroups leave to this process;
    `cpu_quota` is the cgroup's limit in CPUs, None without one.
    """

    schema: int
    driver: Driver | None
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    cpus: tuple[Cpu, ...]
    nodes: tuple[NumaNode, ...]
    cpus_allowed: tuple[int, ...]
    mems_allowed: tuple[int, ...]
    cpu_quota: float | None = None
    cpu_model: str | None = None
    notes: tuple[str, ...] = ()


def links_by_pair(hardware: Hardware) -> Mapping[tuple[int, int], Link]:
    """Each link under (a, b) and (b, a)."""
    return {pair: link for link in hardware.links for pair in ((link.a, link.b), (link.b, link.a))}


def to_json(hardware: Hardware) -> str:
    """The machine as text, the same for the same machine."""
    return json.dumps(msgspec.to_builtins(hardware), indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, *, where: str) -> Hardware:
    """Read a machine back; every field is checked by type, and what refers to something must find it."""
    try:
        raw = msgspec.json.decode(text)
        _check_schema(raw, where=where)
        hardware = msgspec.convert(raw, Hardware)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise LabError(
            f"{where} does not describe a machine",
            why=f"{error}; it was cut short or changed",
            fix="write it again on the machine: invoke topo --json > hardware.json",
        ) from error
    for fault in _faults(hardware):
        raise LabError(f"{where} contradicts itself", why=fault, fix="correct the file, or write it again")
    return hardware


def read_hardware(path: Path) -> Hardware:
    """The machine in the file at `path`, such as a run's hardware.json."""
    try:
        return from_json(path.read_text(encoding="utf-8"), where=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(
            f"cannot read {path}",
            why=str(error),
            fix="name a file that `invoke topo --json` wrote",
        ) from error


def _check_schema(raw: object, *, where: str) -> None:
    if not isinstance(raw, dict) or type(raw.get("schema")) is not int:
        raise LabError(
            f"{where} does not describe a machine",
            why='it is not a JSON object with a number "schema"',
            fix="write it again on the machine: invoke topo --json > hardware.json",
        )
    if raw["schema"] > SCHEMA:
        raise LabError(
            f"{where} has schema {raw['schema']}, this lab knows up to {SCHEMA}",
            why="a newer lab wrote it",
            fix="update the lab",
        )


def _faults(hardware: Hardware) -> Iterator[str]:
    """What in a file cannot be: two things of one name, or one thing that names another that is not there."""
    indexes = [gpu.index for gpu in hardware.gpus]
    for what, names in (
        ("GPU indexes", indexes),
        ("GPU UUIDs", [gpu.uuid for gpu in hardware.gpus]),
        ("CPU numbers", [cpu.number for cpu in hardware.cpus]),
        ("NUMA nodes", [node.number for node in hardware.nodes]),
        ("links", [(link.a, link.b) for link in hardware.links]),
    ):
        if len(set(names)) < len(names):
            yield f"two {what} are the same"
    numbers = {cpu.number for cpu in hardware.cpus}
    nodes = {node.number for node in hardware.nodes}
    for link in hardware.links:
        if link.a not in indexes or link.b not in indexes or link.a >= link.b:
            yield f"a link between GPUs {link.a} and {link.b}; the GPUs are {indexes}, the lower one comes first"
    for gpu in hardware.gpus:
        if gpu.numa_node is not None and gpu.numa_node not in nodes:
            yield f"GPU {gpu.index} is on NUMA node {gpu.numa_node}; the nodes are {sorted(nodes)}"
    for node in hardware.nodes:
        if not set(node.cpus) <= numbers:
            yield f"NUMA node {node.number} has CPUs {sorted(set(node.cpus) - numbers)} that are not listed"
    if not set(hardware.cpus_allowed) <= numbers:
        yield f"cpus_allowed has {sorted(set(hardware.cpus_allowed) - numbers)}, which are not listed"
    if not set(hardware.mems_allowed) <= nodes:
        yield f"mems_allowed has {sorted(set(hardware.mems_allowed) - nodes)}, which are not listed"
