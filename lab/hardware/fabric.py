"""The ways between GPUs, ready for comparing groups of them: how near two are, which NVLinks join, what choosing some
of them costs. Numbers only; the words are in `words`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

from lab.hardware.model import PCIE_PATHS, Gpu, Hardware, Link, links_by_pair

LinkWish: TypeAlias = Literal["nvlink", "pxb", "sys", "any"]
"""The slowest way that a group of GPUs has between any two: NVLink; PCIe inside one NUMA node (PIX, PXB, PHB, NODE);
between NUMA nodes (SYS, or not known); or whatever is best. Exact, so that variants can be compared."""

NVLINK = 0
RANKS = {path: rank for rank, path in enumerate(PCIE_PATHS, start=1)}
FIRST_SYS = RANKS["SYS"]

Cost: TypeAlias = tuple[int, int, int, int, int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """The GPUs of a machine by index, and the rank of each pair: 0 NVLink, then PCIe paths from near to far."""

    gpus: dict[int, Gpu]
    links: dict[tuple[int, int], Link]
    ranks: dict[int, dict[int, int]]
    partners: dict[int, frozenset[int]]
    """GPUs joined to a GPU by NVLinks of their own, not through switches."""


def fabric_of(hardware: Hardware) -> Fabric:
    """Everything that comparing groups needs, computed once. A pair without a link in the file counts as UNKNOWN."""
    links = dict(links_by_pair(hardware))
    indexes = [gpu.index for gpu in hardware.gpus]
    ranks = {a: dict.fromkeys(indexes, RANKS["UNKNOWN"]) for a in indexes}
    for (a, b), link in links.items():
        ranks[a][b] = NVLINK if link.nvlinks else RANKS[link.path]
    partners: dict[int, set[int]] = {gpu.index: set() for gpu in hardware.gpus}
    for link in hardware.links:
        if link.nvlinks and not link.switched:
            partners[link.a].add(link.b)
            partners[link.b].add(link.a)
    return Fabric(
        gpus={gpu.index: gpu for gpu in hardware.gpus},
        links=links,
        ranks=ranks,
        partners={index: frozenset(others) for index, others in partners.items()},
    )


def rank(fabric: Fabric, a: int, b: int) -> int:
    """How near two GPUs are, 0 is nearest."""
    return fabric.ranks[a][b]


def worst(fabric: Fabric, group: Iterable[int]) -> int:
    """The rank of the slowest way inside a group, 0 for one GPU alone."""
    return max((fabric.ranks[a][b] for a, b in combinations(group, 2)), default=NVLINK)


def label(fabric: Fabric, group: Sequence[int]) -> str:
    """The slowest way inside a group as `nvidia-smi topo -m` writes it, such as NV12 or PXB."""
    pairs = sorted(combinations(group, 2), key=lambda pair: rank(fabric, *pair))
    if not pairs:
        return ""
    link = fabric.links.get(pairs[-1])
    return "UNKNOWN" if link is None else link.label


def meets(wish: LinkWish, slowest: int) -> bool:
    """Whether a group of two or more whose slowest way has this rank is what was asked for."""
    if wish == "nvlink":
        return slowest == NVLINK
    if wish == "pxb":
        return NVLINK < slowest < FIRST_SYS
    return wish == "any" or slowest >= FIRST_SYS


def nodes_of(fabric: Fabric, group: Iterable[int]) -> tuple[int, ...]:
    """NUMA nodes of a group, sorted; -1 stands for not known."""
    found = (fabric.gpus[index].numa_node for index in group)
    return tuple(sorted({-1 if node is None else node for node in found}))


def cost(fabric: Fabric, group: Sequence[int], *, free: frozenset[int], near: frozenset[int]) -> Cost:
    """What a group costs, to be compared: the slowest way; GPUs on a NUMA node without a CPU for us (`near` has some);
    NUMA nodes; kinds of GPU; NVLinks that are parted from free GPUs outside; all ways together; fewer NVLinks; NVLinks
    to GPUs in use."""
    pairs = tuple(combinations(group, 2))
    ranks = [fabric.ranks[a][b] for a, b in pairs]
    links = [fabric.links[pair].nvlinks for pair in pairs if pair in fabric.links]
    inside = frozenset(group)
    outside = [other for index in group for other in fabric.partners[index] - inside]
    return (
        max(ranks, default=NVLINK),
        sum(fabric.gpus[index].numa_node not in near for index in group),
        len(nodes_of(fabric, group)),
        len({(fabric.gpus[index].name, fabric.gpus[index].memory_mib) for index in group}),
        sum(other in free for other in outside),
        sum(ranks),
        -sum(links),
        sum(other not in free for other in outside),
    )


def islands(fabric: Fabric, group: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Sets of two or more GPUs of `group` that NVLink joins, directly, through one another or through switches."""
    left = sorted(group)
    found: list[tuple[int, ...]] = []
    while left:
        island, todo = set[int](), [left[0]]
        while todo:
            at = todo.pop()
            island.add(at)
            todo += [other for other in left if other not in island and rank(fabric, at, other) == NVLINK]
        left = [index for index in left if index not in island]
        if len(island) > 1:
            found.append(tuple(sorted(island)))
    return tuple(found)


def in_rank_order(fabric: Fabric, group: Iterable[int]) -> tuple[int, ...]:
    """The group so that neighbours are as near as can be, beginning with the lowest index: what a ring wants."""
    left = sorted(group)
    order = left[:1]
    left = left[1:]
    while left:
        order.append(min(left, key=lambda other: (rank(fabric, order[-1], other), other)))
        left.remove(order[-1])
    return tuple(order)
