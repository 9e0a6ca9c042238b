"""What `invoke topo` prints: the link matrix as `nvidia-smi topo -m` shows it, CPUs and NUMA nodes, NVLink islands, and
where TP = 1, 2, 4 would be placed, with the reason and what would be worse. Text in, text out: nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from lab.errors import LabError
from lab.hardware import words
from lab.hardware.fabric import Fabric, fabric_of, islands
from lab.hardware.model import Hardware
from lab.hardware.placement import Placement, Request, place
from lab.hardware.sysfs import format_list

SIZES = (1, 2, 4)
LEGEND = {
    "NV": "NV#   NVLink, that many links",
    "PIX": "PIX   PCIe, at most one switch between them",
    "PXB": "PXB   PCIe, several switches, not the CPU",
    "PHB": "PHB   PCIe through the CPU's host bridge",
    "NODE": "NODE  PCIe between host bridges of one NUMA node",
    "SYS": "SYS   PCIe and the link between NUMA nodes",
    "UNKNOWN": "UNKNOWN  the driver does not say",
}


def show(hardware: Hardware, *, as_json: bool = False, busy: Mapping[str, str] | None = None) -> str:
    """The page, ending in a newline; `busy` maps UUIDs of GPUs in use to words.

    As JSON it is the machine as `model.to_json` writes it, with the keys `islands`, `busy` and `placements` besides,
    so the text can be given to `--hardware` again.
    """
    used = dict(busy or {})
    fabric = fabric_of(hardware)
    if as_json:
        return _json(hardware, fabric, used)
    parts = [
        list(_summary(hardware)),
        list(_gpus(hardware, used)),
        list(_matrix(hardware, fabric)),
        list(_nodes(hardware)),
        list(_islands(fabric)),
        list(_placements(hardware, used)),
        [f"note: {note}" for note in hardware.notes],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns lined up, the first row as it comes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _summary(hardware: Hardware) -> Iterator[str]:
    cores = len({cpu.core for cpu in hardware.cpus})
    driver = hardware.driver
    software = f"driver {driver.version}, CUDA up to {driver.cuda}" if driver else "no NVIDIA driver"
    yield (
        f"{len(hardware.gpus)} GPU{'s' * (len(hardware.gpus) != 1)}, {len(hardware.cpus)} CPUs on {cores} cores, "
        f"{len(hardware.nodes)} NUMA node{'s' * (len(hardware.nodes) != 1)}; {software}"
    )
    if hardware.cpu_model:
        yield hardware.cpu_model
    if len(hardware.cpus_allowed) < len(hardware.cpus):
        yield f"this process may use CPUs {format_list(hardware.cpus_allowed)}"
    if len(hardware.mems_allowed) < len(hardware.nodes):
        yield f"this process may use the memory of NUMA nodes {format_list(hardware.mems_allowed)}"
    if hardware.cpu_quota is not None:
        yield f"this process may use the time of {hardware.cpu_quota:g} CPUs"


def _gpus(hardware: Hardware, busy: Mapping[str, str]) -> Iterator[str]:
    if not hardware.gpus:
        return
    rows = [("GPU", "name", "memory", "PCI", "UUID", "")]
    for gpu in hardware.gpus:
        memory = "?" if gpu.memory_mib is None else f"{gpu.memory_mib / 1024:.0f} GiB"
        state = [f"in use: {busy[gpu.uuid]}"] if gpu.uuid in busy else []
        state += ["MIG mode"] if gpu.mig else []
        rows.append((str(gpu.index), gpu.name, memory, gpu.pci_bus_id, gpu.uuid, ", ".join(state)))
    yield from table(rows)


def _matrix(hardware: Hardware, fabric: Fabric) -> Iterator[str]:
    if not hardware.gpus:
        return
    names = [f"GPU{gpu.index}" for gpu in hardware.gpus]
    rows = [["", *names, "CPU Affinity", "NUMA Affinity"]]
    seen: set[str] = set()
    for gpu in hardware.gpus:
        links = [fabric.links.get((gpu.index, other.index)) for other in hardware.gpus]
        labels = ["UNKNOWN" if link is None else link.label for link in links]
        cells = ["X" if other is gpu else label for other, label in zip(hardware.gpus, labels, strict=True)]
        seen |= {cell.rstrip("0123456789") for cell in cells}
        node = "N/A" if gpu.numa_node is None else str(gpu.numa_node)
        rows.append([f"GPU{gpu.index}", *cells, format_list(gpu.cpus) or "N/A", node])
    yield from table(rows)
    yield from (text for key, text in LEGEND.items() if key in seen)


def _nodes(hardware: Hardware) -> Iterator[str]:
    rows = [("NUMA node", "CPUs", "memory", "GPUs", "distances")]
    for node in hardware.nodes:
        memory = "?" if node.memory_mib is None else f"{node.memory_mib / 1024:.0f} GiB"
        gpus = format_list(gpu.index for gpu in hardware.gpus if gpu.numa_node == node.number)
        distances = " ".join(map(str, node.distances))
        rows.append((str(node.number), format_list(node.cpus) or "none", memory, gpus or "none", distances))
    yield from table(rows)


def _islands(fabric: Fabric) -> Iterator[str]:
    found = islands(fabric, fabric.gpus)
    if found:
        alone = sorted(set(fabric.gpus) - {index for island in found for index in island})
        joined = ", ".join(f"({','.join(map(str, island))})" for island in found)
        yield f"NVLink joins {joined}" + (f"; alone: {words.gpus(alone)}" if alone else "")


def _placements(hardware: Hardware, busy: Mapping[str, str]) -> Iterator[str]:
    for size in SIZES if hardware.gpus else (0,):
        try:
            chosen = place(hardware, Request(tp=size), busy=frozenset(busy))
        except LabError as error:
            yield f"TP={size}: not here: {error.problem.removeprefix(f'TP={size} ')}"
            continue
        yield (f"TP={size}: " if size else "no GPU: ") + _first(chosen)
        yield f"      CPUs: {_cpus(chosen)}"
        yield from (f"      worse: {text}" for text in chosen.worse)


def _first(chosen: Placement) -> str:
    return chosen.reason if chosen.gpus else "the server runs on CPUs"


def _cpus(chosen: Placement) -> str:
    if not chosen.server_cpus:
        return chosen.cpu_reason
    text = f"server {format_list(chosen.server_cpus)}, client {format_list(chosen.client_cpus)}"
    if chosen.sampler_cpus:
        text += f", sampler {format_list(chosen.sampler_cpus)}"
    return f"{text}; memory node {format_list(chosen.mems) or 'any'}"


def _json(hardware: Hardware, fabric: Fabric, busy: Mapping[str, str]) -> str:
    placements: dict[str, object] = {}
    for size in SIZES:
        try:
            placements[str(size)] = msgspec.to_builtins(
                place(hardware, Request(tp=size), busy=frozenset(busy))
            )
        except LabError as error:
            placements[str(size)] = {"impossible": error.problem, "why": error.why}
    whole = {
        **msgspec.to_builtins(hardware),
        "islands": islands(fabric, fabric.gpus),
        "busy": dict(busy),
        "placements": placements,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
