"""Sentences about groups of GPUs: what joins them, why they were chosen, what another choice would cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lab.hardware.fabric import (
    NVLINK,
    Fabric,
    fabric_of,
    in_rank_order,
    islands,
    label,
    nodes_of,
    worst,
)
from lab.hardware.model import Hardware
from lab.hardware.sysfs import format_list

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def gpus(indexes: Iterable[int]) -> str:
    """`GPU 4`, `GPUs 0, 1`, `GPUs 0-3`."""
    numbers = sorted(indexes)
    text = format_list(numbers).replace(",", ", ") if len(numbers) > 2 else ", ".join(map(str, numbers))
    return f"GPU{'s' if len(numbers) != 1 else ''} {text or 'none'}"


def group(fabric: Fabric, chosen: Sequence[int]) -> str:
    """What joins a group: `two NVLink pairs over PXB, NUMA node 0`."""
    return (
        f"{_joined(fabric, chosen)}, {_where(fabric, chosen)}" if len(chosen) > 1 else _where(fabric, chosen)
    )


def lone(fabric: Fabric, index: int, *, free: frozenset[int]) -> str:
    """Why this GPU when one is asked for."""
    partners = fabric.partners[index]
    waiting = sorted(partners & free)
    if waiting:
        return f"every free GPU has a free NVLink partner, so {gpus([index])} leaves {gpus(waiting)} alone"
    if partners:
        return f"its NVLink partner {gpus(partners)} is in use anyway, so no pair is parted"
    others = any(fabric.partners[other] for other in free)
    return (
        "it has no NVLink partner, so every pair stays whole"
        if others
        else "the first free one; none is better"
    )


def comparison(fabric: Fabric, other: Sequence[int], chosen: Sequence[int], *, free: frozenset[int]) -> str:
    """How `other` would be worse than `chosen`; empty when it would not be in a way worth a sentence."""
    name = gpus(other)
    if len(other) == 1:
        waiting = sorted(fabric.partners[other[0]] & free)
        return f"{name} would part the NVLink pair with {gpus(waiting)}" if waiting else ""
    slow, ours = worst(fabric, other), worst(fabric, chosen)
    nodes = nodes_of(fabric, other)
    if len(nodes) > len(nodes_of(fabric, chosen)):
        return f"{name} would cross NUMA nodes {', '.join(str(n) for n in nodes if n >= 0)} ({label(fabric, other)})"
    if slow > ours:
        instead = "NVLink" if ours == NVLINK else label(fabric, chosen)
        return f"{name} would go over {label(fabric, other)} instead of {instead}"
    alone = {n for i in other for n in fabric.partners[i] & free} - set(other)
    if alone and not ({n for i in chosen for n in fabric.partners[i] & free} - set(chosen)):
        return f"{name} would leave {gpus(alone)} without NVLink partner"
    fewer = sum(map(len, islands(fabric, other))) < sum(map(len, islands(fabric, chosen)))
    return f"{name} would have fewer NVLinks" if fewer else ""


def inventory(hardware: Hardware, *, taken: Iterable[int]) -> str:
    """What there is, for an error: NVLink islands, NUMA nodes, GPUs that cannot be had."""
    fabric = fabric_of(hardware)
    joined = islands(fabric, fabric.gpus)
    nodes: dict[int | None, list[int]] = {}
    for gpu in hardware.gpus:
        nodes.setdefault(gpu.numa_node, []).append(gpu.index)
    parts = [
        f"NVLink joins {' and '.join(format_list(island) for island in joined)}" if joined else "no NVLink"
    ]
    for node, members in nodes.items():
        parts.append(f"NUMA node {'not known' if node is None else node}: {gpus(members)}")
    in_use = sorted(taken)
    parts += [f"in use: {gpus(in_use)}"] if in_use else []
    mig = [gpu.index for gpu in hardware.gpus if gpu.mig]
    parts += [f"in MIG mode: {gpus(mig)}"] if mig else []
    return "; ".join(parts)


def _joined(fabric: Fabric, chosen: Sequence[int]) -> str:
    slowest = label(fabric, chosen)
    if worst(fabric, chosen) == NVLINK:
        first, second = in_rank_order(fabric, chosen)[:2]
        link = fabric.links[first, second]
        if link.switched:
            return f"{'all ' * (len(chosen) > 2)}joined by NVLink through switches ({slowest})"
        return f"an NVLink pair ({slowest})" if len(chosen) == 2 else f"all joined by NVLink ({slowest})"
    found = islands(fabric, chosen)
    if not found:
        return f"{slowest}, no NVLink between them"
    parts = []
    for size, number in sorted(Counter(map(len, found)).items()):
        what = "pair" if size == 2 else f"group of {size}"
        parts.append(f"{_count(number)} NVLink {what}{'s' if number > 1 else ''}")
    single = len(chosen) - sum(map(len, found))
    parts += [f"{_count(single)} GPU{'s' if single > 1 else ''} alone"] if single else []
    return f"{' and '.join(parts)} over {slowest}"


def _where(fabric: Fabric, chosen: Sequence[int]) -> str:
    nodes = nodes_of(fabric, chosen)
    if -1 in nodes:
        return "NUMA node not known"
    return f"NUMA node {nodes[0]}" if len(nodes) == 1 else f"across NUMA nodes {', '.join(map(str, nodes))}"


def _count(number: int) -> str:
    return COUNTS[number] if number < len(COUNTS) else str(number)
