"""Machines that tests pretend to be: a stand-in for NVIDIA's management library, and a /sys to go with it.

`build` compiles tests/standins/fakenvml.c, `Machine` describes a box (`PLAN_BOX`, `DGX_A100`, ...), `StandIn`
puts both into a folder: its `env` makes any program that loads libnvidia-ml.so.1 see the machine, and
`write` changes it under a running one. The real nvidia-ml-py runs on top; nothing in Python is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid5

from parts import need

from lab.hardware.model import Hardware, from_json

STANDINS = Path(__file__).parent / "standins"
SOURCE = STANDINS / "fakenvml.c"
LIBRARY = "libnvidia-ml.so.1"
FAMILY = UUID("5f0c1c1e-0000-4000-8000-000000000000")

PIX, PXB, PHB, NODE, SYS = 10, 20, 30, 40, 50
LOST, NOT_SUPPORTED, DRIVER_NOT_LOADED, MISMATCH = 15, 3, 9, 18

A100: Mapping[str, object] = {
    "name": "NVIDIA A100-SXM4-80GB",
    "total_mib": 81920,
    "reserved_mib": 611,
    "major": 8,
    "minor": 0,
    "persistence": 1,
    "mig": 0,
    "ecc": 1,
    "limit_mw": 400_000,
    "limit_default_mw": 400_000,
    "limit_min_mw": 100_000,
    "limit_max_mw": 400_000,
    "power_mw": 62_000,
    "energy_mj": 123_456_789,
    "temp_c": 33,
    "sm_mhz": 210,
    "mem_mhz": 1593,
    "max_sm_mhz": 1410,
    "max_mem_mhz": 1593,
    "app_sm_mhz": 1410,
    "app_mem_mhz": 1593,
    "reasons": 1,
}
A100_PCIE = {**A100, "name": "NVIDIA A100 80GB PCIe", "limit_mw": 300_000, "limit_max_mw": 300_000}
A6000 = {
    **A100,
    "name": "NVIDIA RTX A6000",
    "total_mib": 49140,
    "reserved_mib": 457,
    "minor": 6,
    "mig": 2,
    "ecc": 0,
    "limit_mw": 300_000,
    "limit_max_mw": 300_000,
    "max_sm_mhz": 2100,
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A NUMA node: `cores` physical cores with `smt` threads each, on `socket`."""

    cores: int
    socket: int
    memory_mib: int = 257_726


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A box. `gpu_nodes` has the NUMA node of each GPU, `paths` and `links` are by pair, `fabric` by GPU."""

    name: str
    nodes: tuple[Node, ...]
    smt: int = 2
    gpu_nodes: tuple[int, ...] = ()
    cards: tuple[Mapping[str, object], ...] = ()
    paths: Mapping[tuple[int, int], int] = field(default_factory=dict)
    links: Mapping[tuple[int, int], int] = field(default_factory=dict)
    fabric: int = 0
    buses: tuple[int, ...] = ()
    driver: str = "555.42.06"
    cuda: int = 12050
    distances: tuple[tuple[int, ...], ...] = ()
    extra: tuple[str, ...] = ()

    def uuid(self, gpu: int) -> str:
        """The GPU's UUID, the same in every test."""
        return f"GPU-{uuid5(FAMILY, f'{self.name}/{gpu}')}"

    def bus(self, gpu: int) -> int:
        """The GPU's PCI bus number."""
        return self.buses[gpu] if self.buses else 0x07 + 8 * gpu

    def cpus(self, node: int) -> tuple[int, ...]:
        """CPU numbers of a node. As Linux counts: first every core's first thread, then the second ones."""
        before = sum(n.cores for n in self.nodes[:node])
        cores = sum(n.cores for n in self.nodes)
        own = range(before, before + self.nodes[node].cores)
        return tuple(core + cores * thread for thread in range(self.smt) for core in own)

    def path(self, a: int, b: int) -> int:
        """NVML's topology level between two GPUs; PXB within a node and SYS across where not given."""
        known = self.paths.get((min(a, b), max(a, b)))
        return known if known is not None else PXB if self.gpu_nodes[a] == self.gpu_nodes[b] else SYS

    def lines(self) -> list[str]:
        """The machine as lines of the stand-in's state file."""
        count = len(self.gpu_nodes)
        found = [f"driver {self.driver}", f"cuda {self.cuda}", f"gpus {count}"]
        for gpu, node in enumerate(self.gpu_nodes):
            values = {**(self.cards[gpu] if self.cards else A100), "uuid": self.uuid(gpu), "numa": node}
            values["bus"] = f"00000000:{self.bus(gpu):02X}:00.0"
            values["cpus"] = cpu_list(self.cpus(node))
            found += [f"gpu {gpu} {key} {value}" for key, value in values.items()]
            found += [f"path {gpu} {other} {self.path(gpu, other)}" for other in range(gpu)]
            found += [f"fabric {gpu} {self.fabric}"] * bool(self.fabric)
        found += [f"links {a} {b} {n}" for (a, b), n in self.links.items()]
        return [*found, *self.extra]

    def with_lines(self, *lines: str) -> Machine:
        """The same machine with more lines in its state, such as `gpu 1 fail 15`."""
        return replace(self, extra=(*self.extra, *lines))


def cpu_list(cpus: Iterable[int]) -> str:
    """Numbers as Linux writes them: `0-3,8`."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


TWO_SOCKETS = (Node(cores=32, socket=0), Node(cores=32, socket=1))
PLAN_BOX = Machine(
    name="plan",
    nodes=TWO_SOCKETS,
    gpu_nodes=(0, 0, 0, 0, 1, 1, 1),
    links={(0, 1): 12, (2, 3): 12, (5, 6): 12},
    cards=(A100, A100, A100, A100, A100_PCIE, A100, A100),
)
DGX_A100 = Machine(  # 2 x EPYC 7742 with four NUMA nodes a socket; GPUs sit on nodes 3, 1, 7, 5
    name="dgx-a100",
    nodes=tuple(Node(cores=16, socket=n // 4, memory_mib=128_796) for n in range(8)),
    gpu_nodes=(3, 3, 1, 1, 7, 7, 5, 5),
    fabric=12,
    buses=(0x07, 0x0F, 0x47, 0x4E, 0x87, 0x90, 0xB7, 0xBD),
    distances=tuple(
        tuple(10 if a == b else 12 if a // 4 == b // 4 else 32 for b in range(8)) for a in range(8)
    ),
)
PCIE_ONLY = Machine(
    name="pcie",
    nodes=TWO_SOCKETS,
    gpu_nodes=(0, 0, 1, 1),
    paths={(0, 1): PIX, (2, 3): PIX},
    cards=(A100_PCIE,) * 4,
)
WORKSTATION = Machine(
    name="workstation",
    nodes=(Node(cores=8, socket=0, memory_mib=64_216),),
    gpu_nodes=(0, 0),
    paths={(0, 1): PHB},
    cards=(A6000, A6000),
)
ONE_NODE = Machine(
    name="one-node",
    nodes=(Node(cores=32, socket=0),),
    gpu_nodes=(0, 0, 0, 0),
    links={(0, 1): 4, (2, 3): 4},
    paths={(a, b): NODE for a in range(4) for b in range(a + 1, 4)},
)
MIG_ON = Machine(
    name="mig",
    nodes=TWO_SOCKETS,
    gpu_nodes=(0, 1),
    extra=(
        "gpu 0 mig 1",
        "gpu 0 mig_device MIG-11111111-0000-4000-8000-000000000001 40192",
        "gpu 0 mig_device MIG-22222222-0000-4000-8000-000000000002 19968",
    ),
)
NO_GPU = Machine(name="no-gpu", nodes=(Node(cores=4, socket=0, memory_mib=16_000),))
SIXTEEN = Machine(
    name="sixteen",
    nodes=TWO_SOCKETS,
    gpu_nodes=(0,) * 8 + (1,) * 8,
    fabric=12,
)
MACHINES = (PLAN_BOX, DGX_A100, PCIE_ONLY, WORKSTATION, ONE_NODE, MIG_ON, NO_GPU, SIXTEEN)


@cache
def _compiled(lacks: tuple[str, ...]) -> bytes:
    need(shutil.which("gcc") is not None, "gcc, to build the stand-in for libnvidia-ml.so.1")
    words = ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{LIBRARY}"]
    with TemporaryDirectory() as name:
        made, hidden = Path(name) / LIBRARY, Path(name) / "hidden.map"
        hidden.write_text(f"{{ global: *; local: {''.join(f'{name}; ' for name in lacks)}}};\n")
        words += [f"-Wl,--version-script={hidden}"] if lacks else []
        subprocess.run([*words, "-o", str(made), str(SOURCE), "-ldl"], check=True)
        return made.read_bytes()


def build(folder: Path, *, lacks: Sequence[str] = ()) -> Path:
    """The library in `folder`, without the functions of `lacks`, as an older driver's does not have them."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    library.write_bytes(_compiled(tuple(lacks)))
    library.chmod(0o755)
    return library


@dataclass(frozen=True)
class StandIn:
    """A folder that holds a machine: `libnvidia-ml.so.1`, its `state`, and `sys` and `proc` under `root`."""

    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def root(self) -> Path:
        """What to give the lab as the root of the file system."""
        return self.folder / "root"

    @property
    def env(self) -> dict[str, str]:
        """The environment for a program that is to see the machine."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder),
            "NVML_STANDIN_STATE": str(self.state),
        }

    def write(self, machine: Machine) -> None:
        """Set the GPUs' state, at once as a whole: a program that runs sees it with its next call."""
        new = self.state.with_suffix(".new")
        new.write_text("\n".join(machine.lines()) + "\n")
        new.replace(self.state)


def stand_in(folder: Path, machine: Machine, *, lacks: Sequence[str] = ()) -> StandIn:
    """Everything of `machine` in `folder`."""
    made = StandIn(folder)
    build(folder, lacks=lacks)
    made.write(machine)
    write_sys(made.root, machine)
    return made


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def write_sys(root: Path, machine: Machine) -> None:
    """CPUs, NUMA nodes and PCI devices of `machine` as Linux shows them in /sys."""
    everything = [cpu for node in range(len(machine.nodes)) for cpu in machine.cpus(node)]
    cores = len(everything) // machine.smt
    put(root / "sys/devices/system/cpu/online", cpu_list(everything))
    put(root / "sys/devices/system/node/online", cpu_list(range(len(machine.nodes))))
    put(root / "proc/cpuinfo", "processor\t: 0\nmodel name\t: Stand-in CPU @ 2.00GHz")
    put(root / "proc/self/status", f"Name:\tx\nCpus_allowed_list:\t{cpu_list(everything)}")
    for number, node in enumerate(machine.nodes):
        folder = root / f"sys/devices/system/node/node{number}"
        put(folder / "cpulist", cpu_list(machine.cpus(number)))
        put(folder / "meminfo", f"Node {number} MemTotal:       {node.memory_mib * 1024} kB")
        row = machine.distances[number] if machine.distances else None
        words = row or [10 if number == other else 21 for other in range(len(machine.nodes))]
        put(folder / "distance", " ".join(map(str, words)))
        for cpu in machine.cpus(number):
            topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            siblings = [cpu % cores + cores * thread for thread in range(machine.smt)]
            put(topology / "core_id", str(cpu % cores))
            put(topology / "physical_package_id", str(node.socket))
            put(topology / "thread_siblings_list", cpu_list(siblings))
    for gpu, node_number in enumerate(machine.gpu_nodes):
        folder = root / f"sys/bus/pci/devices/0000:{machine.bus(gpu):02x}:00.0"
        put(folder / "numa_node", str(node_number))
        put(folder / "local_cpulist", cpu_list(machine.cpus(node_number)))


def limit_v1(root: Path, *, cpus: str, mems: str, group: str = "/job_7") -> None:
    """Put the reader into a cgroup v1 cpuset."""
    put(root / "proc/self/cgroup", f"9:name=systemd:/\n3:cpuset:{group}\n0::/")
    put(root / f"sys/fs/cgroup/cpuset{group}/cpuset.effective_cpus", cpus)
    put(root / f"sys/fs/cgroup/cpuset{group}/cpuset.effective_mems", mems)


def limit_v2(root: Path, *, cpus: str, mems: str, group: str = "/docker/abc") -> None:
    """Put the reader into a cgroup v2 cpuset."""
    put(root / "proc/self/cgroup", f"0::{group}")
    put(root / f"sys/fs/cgroup{group}/cpuset.cpus.effective", cpus)
    put(root / f"sys/fs/cgroup{group}/cpuset.mems.effective", mems)


DETECT = "import sys; from pathlib import Path; from lab.hardware.detect import detect; from lab.hardware.model import to_json;"
DETECT += "print(to_json(detect(Path(sys.argv[1]))))"


def detect_text(made: StandIn) -> str:
    """What the lab sees of the machine, as hardware.json, found by a program of its own."""
    words = (sys.executable, "-c", DETECT, str(made.root))
    done = subprocess.run(words, env=made.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


_SEEN: dict[tuple[str, ...], Hardware] = {}


def hardware_of(machine: Machine) -> Hardware:
    """The machine as the lab detects it, with the real nvidia-ml-py; remembered."""
    key = (machine.name, *machine.lines())
    if key not in _SEEN:
        with TemporaryDirectory() as folder:
            text = detect_text(stand_in(Path(folder), machine))
        _SEEN[key] = from_json(text, where=machine.name)
    return _SEEN[key]


@dataclass(frozen=True)
class ContainerStandIn:
    """The stand-in of NVIDIA's container toolkit, installed for an engine.

    The engine finds the hook when `folder` is on its PATH before it starts, and the runtime when its
    daemon.json has `{"runtimes": {"nvidia": {"path": str(runtime)}}}`.
    """

    folder: Path

    @property
    def runtime(self) -> Path:
        return self.folder / "nvidia-container-runtime"

    @property
    def hook(self) -> Path:
        return self.folder / "nvidia-container-runtime-hook"

    def records(self, kind: str = "") -> list[dict[str, object]]:
        """What the engine passed, oldest first; `kind` is runtime or hook. Keys: argv, visible, capabilities,
        cpus, mems, args, env, gpus (their indexes)."""
        files = sorted((self.folder / "records").glob(f"{kind}*.json"), key=lambda p: p.stat().st_mtime_ns)
        return [json.loads(file.read_text()) for file in files]


def install_container_standin(folder: Path, made: StandIn, *, runc: str = "runc") -> ContainerStandIn:
    """Put runtime and hook into `folder`, for the machine of `made`; state changes show in running containers."""
    installed = ContainerStandIn(folder)
    (folder / "records").mkdir(parents=True, exist_ok=True)
    text = (STANDINS / "nvidia-container-runtime").read_text().partition("\n")[2]
    for path in (installed.runtime, installed.hook):
        path.write_text(f"#!{sys.executable} -I\n{text}")
        path.chmod(0o755)
    settings = {"records": folder / "records", "library": made.library, "state": made.folder, "runc": runc}
    put(folder / "settings.json", json.dumps({key: str(value) for key, value in settings.items()}))
    return installed
