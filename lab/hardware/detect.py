"""`detect`: this machine as Hardware, put together from NVML, /sys and the process's limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lab.hardware.gpus import read_gpus
from lab.hardware.model import SCHEMA, Gpu, Hardware
from lab.hardware.sysfs import Host, pci_node, read_host, read_limits


def detect(root: Path = Path("/")) -> Hardware:
    """The machine whose /sys and /proc stand under `root`, and the GPUs that NVML shows to this process."""
    host = read_host(root)
    limits = read_limits(root)
    found = read_gpus()
    notes = [*found.notes, *host.notes, *limits.notes]
    gpus = tuple(_at_home(gpu, host=host, root=root, notes=notes) for gpu in found.gpus)
    known = frozenset(cpu.number for cpu in host.cpus)
    nodes = frozenset(node.number for node in host.nodes)
    cpus_allowed = known if limits.cpus is None else known & limits.cpus
    mems_allowed = nodes if limits.mems is None else nodes & limits.mems
    if known and not cpus_allowed:
        notes.append("the limits of this process name no CPU that the machine has; they are not used")
    return Hardware(
        schema=SCHEMA,
        driver=found.driver,
        gpus=gpus,
        links=found.links,
        cpus=host.cpus,
        nodes=host.nodes,
        cpus_allowed=tuple(sorted(cpus_allowed or known)),
        mems_allowed=tuple(sorted(mems_allowed or nodes)),
        cpu_quota=limits.cpu_quota,
        cpu_model=host.cpu_model,
        notes=tuple(notes),
    )


def _at_home(gpu: Gpu, *, host: Host, root: Path, notes: list[str]) -> Gpu:
    """The GPU with its NUMA node and near CPUs: by NVML, else by /sys, else the machine's only node."""
    numbers = {node.number for node in host.nodes}
    by_kernel, near = pci_node(root, gpu.pci_bus_id)
    node = gpu.numa_node if gpu.numa_node is not None else by_kernel
    if node not in numbers:
        node = None
    if node is None and len(numbers) == 1:
        (node,) = numbers
    if node is None:
        notes.append(f"neither the driver nor the kernel says on which NUMA node GPU {gpu.index} is")
    known = {cpu.number for cpu in host.cpus}
    cpus = tuple(cpu for cpu in gpu.cpus or near if cpu in known)
    if not cpus and node is not None:
        cpus = next(n.cpus for n in host.nodes if n.number == node)
    return replace(gpu, numa_node=node, cpus=cpus)
