"""Where a server goes: from a machine and a request come GPUs in rank order, CPUs and memory nodes, with the reason and
what would be worse. A pure function; what is busy is told to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import get_args

from lab.errors import LabError, unknown_name
from lab.hardware import words
from lab.hardware.cpusets import roomiest, split, usable_nodes
from lab.hardware.fabric import (
    Fabric,
    LinkWish,
    cost,
    fabric_of,
    in_rank_order,
    meets,
    nodes_of,
    rank,
    worst,
)
from lab.hardware.model import Hardware

TRY_ALL = 300
"""Up to so many groups all are compared; above, groups are grown from each GPU by its nearest neighbours, which finds
the same on machines whose links form a tree or a full mesh, as those on sale do."""
WORSE_SHOWN = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a variant asks for. `tp` GPUs, 0 for a server on CPUs; `link` is the slowest way between any two of them
    (see LinkWish; it says nothing about one GPU); `exclusive` False takes a GPU in use rather than none."""

    tp: int
    link: LinkWish = "any"
    same_numa: bool = False
    exclusive: bool = True


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a server goes. CPU sets are disjoint; empty ones mean: not pinned. `mems` are NUMA nodes."""

    gpus: tuple[str, ...]
    """UUIDs in rank order."""
    indexes: tuple[int, ...]
    """The same GPUs by index, for people."""
    server_cpus: tuple[int, ...]
    mems: tuple[int, ...]
    client_cpus: tuple[int, ...]
    client_mems: tuple[int, ...]
    sampler_cpus: tuple[int, ...]
    reason: str
    cpu_reason: str
    worse: tuple[str, ...]


def place(
    hardware: Hardware,
    request: Request,
    *,
    busy: frozenset[str] = frozenset(),
    cpus_allowed: Iterable[int] | None = None,
) -> Placement:
    """The best place for `request` on `hardware`, without the GPUs whose UUIDs are in `busy`.

    `cpus_allowed` narrows the CPUs further than the machine's own limits do. LabError when it cannot be met.
    """
    _check(request, hardware)
    allowed = frozenset(hardware.cpus_allowed)
    if cpus_allowed is not None:
        allowed &= frozenset(cpus_allowed)
    fabric = fabric_of(hardware)
    near = usable_nodes(hardware, cpus_allowed=allowed)
    chosen, reason, worse = _choose(hardware, fabric, request, busy=busy, near=near)
    nodes = nodes_of(fabric, chosen) if chosen else roomiest(hardware, cpus_allowed=allowed)
    if -1 in nodes:
        nodes = tuple(node.number for node in hardware.nodes)
    cpus = split(hardware, nodes=nodes, ranks=request.tp, cpus_allowed=allowed)
    return Placement(
        gpus=tuple(fabric.gpus[index].uuid for index in chosen),
        indexes=chosen,
        server_cpus=cpus.server,
        mems=cpus.mems,
        client_cpus=cpus.client,
        client_mems=cpus.client_mems,
        sampler_cpus=cpus.sampler,
        reason=reason,
        cpu_reason=cpus.reason,
        worse=worse,
    )


def _choose(
    hardware: Hardware, fabric: Fabric, request: Request, *, busy: frozenset[str], near: frozenset[int]
) -> tuple[tuple[int, ...], str, tuple[str, ...]]:
    """GPUs in rank order, why these, and what would be worse."""
    if request.tp == 0:
        return (), "no GPU asked for", ()
    whole = [gpu.index for gpu in hardware.gpus if not gpu.mig]
    taken = frozenset(gpu.index for gpu in hardware.gpus if gpu.uuid in busy)
    free = frozenset(whole) - taken
    chosen = _best(fabric, request, free, near=near)
    shared = ""
    if chosen is None and not request.exclusive:
        chosen = _best(fabric, request, frozenset(whole), near=near, taken=taken)
        used = [] if chosen is None else sorted(taken & set(chosen))
        shared = f"; shared with others: {words.gpus(used)}, no free GPUs will do"
    if chosen is None:
        raise _cannot(hardware, request, free=free, taken=taken)
    order = in_rank_order(fabric, chosen)
    parts = [f"{words.gpus(order)}: {words.group(fabric, order)}{shared}"]
    if request.tp == 1 and not shared:
        parts.append(words.lone(fabric, order[0], free=free))
    ideal = _best(fabric, request, frozenset(whole), near=near) if taken else chosen
    if ideal is not None and set(ideal) != set(chosen):
        used = sorted(taken & set(ideal))
        parts.append(f"{words.gpus(used)} in use, else it would be {words.gpus(ideal)}")
    return order, "; ".join(parts), _worse(fabric, order, free=free, near=near)


def _best(
    fabric: Fabric,
    request: Request,
    free: frozenset[int],
    *,
    near: frozenset[int],
    taken: frozenset[int] = frozenset(),
) -> tuple[int, ...] | None:
    """The cheapest group of GPUs of `free` that is what was asked for, with the fewest of `taken`; the lowest indexes
    where several are equal."""

    def good(group: Sequence[int]) -> bool:
        if request.same_numa and (len(nodes := nodes_of(fabric, group)) > 1 or -1 in nodes):
            return False
        return request.tp == 1 or meets(request.link, worst(fabric, group))

    found = {tuple(sorted(group)) for group in _groups(fabric, request, free)}
    return min(
        filter(good, found),
        key=lambda group: (len(taken & set(group)), cost(fabric, group, free=free, near=near), group),
        default=None,
    )


def _groups(fabric: Fabric, request: Request, free: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Every group of the size asked for, or where that is too many, those grown from each GPU by nearest neighbours;
    where a slow way is asked for, also with a far one last."""
    indexes, size = sorted(free), request.tp
    if comb(len(indexes), size) <= TRY_ALL:
        yield from combinations(indexes, size)
        return
    for seed in indexes:
        pool = [index for index in indexes if index != seed]
        if request.same_numa:
            node = fabric.gpus[seed].numa_node
            pool = [index for index in pool if fabric.gpus[index].numa_node == node]
        if len(pool) >= size - 1:
            yield _grow(fabric, seed, pool, size=size)
            if request.link in ("pxb", "sys"):
                yield _grow(fabric, seed, pool, size=size, far_last=True)


def _grow(
    fabric: Fabric, seed: int, pool: Sequence[int], *, size: int, far_last: bool = False
) -> tuple[int, ...]:
    """The group that starts with `seed` and takes the nearest each time; with `far_last` the farthest at the end. Of
    equally near ones it prefers the same node and kind, one with a free NVLink partner while there is room for both,
    and one without when there is not."""
    group = [seed]
    home = fabric.gpus[seed]
    unlike = {i: (fabric.gpus[i].numa_node != home.numa_node, fabric.gpus[i].name != home.name) for i in pool}
    paired = {i: not fabric.partners[i].isdisjoint(pool) for i in pool}
    ways = {i: (way, way) for i in pool for way in (rank(fabric, seed, i),)}
    while len(group) < size:
        left = size - len(group)
        sign = -1 if far_last and left == 1 else 1
        index = min(
            (sign * slow, sign * total, unlike[i], paired[i] != (left > 1), i)
            for i, (slow, total) in ways.items()
        )[-1]
        group.append(index)
        del ways[index]
        row = fabric.ranks[index]
        ways = {i: (slow if slow > row[i] else row[i], total + row[i]) for i, (slow, total) in ways.items()}
    return tuple(group)


def _worse(
    fabric: Fabric, chosen: Sequence[int], *, free: frozenset[int], near: frozenset[int]
) -> tuple[str, ...]:
    """Neighbouring indexes, which is what one would type, where they are a worse choice; the worst first."""
    indexes = sorted(free)
    size = len(chosen)
    ours = cost(fabric, chosen, free=free, near=near)
    windows = [tuple(indexes[i : i + size]) for i in range(len(indexes) - size + 1)]
    costs = {window: cost(fabric, window, free=free, near=near) for window in windows}
    found: list[str] = []
    kinds: set[str] = set()
    for window in sorted((w for w in windows if costs[w] > ours), key=lambda w: costs[w], reverse=True):
        said = words.comparison(fabric, window, chosen, free=free)
        kind = said.partition(" would ")[2].split(" ")[0]
        if said and kind not in kinds:
            kinds.add(kind)
            found.append(said)
    return tuple(found[:WORSE_SHOWN])


def _check(request: Request, hardware: Hardware) -> None:
    if request.link not in get_args(LinkWish):
        raise unknown_name("link", request.link, get_args(LinkWish))
    if request.tp < 0:
        raise LabError(
            f"TP={request.tp} makes no sense", fix="ask for 1 or more GPUs, 0 for a server on CPUs"
        )
    if request.tp > len(hardware.gpus):
        why = "; ".join(hardware.notes) or words.inventory(hardware, taken=())
        raise LabError(
            f"TP={request.tp} needs {request.tp} GPUs, this machine has {len(hardware.gpus)}",
            why=why,
            fix="lower TP, or use a machine with more GPUs",
        )


def _cannot(hardware: Hardware, request: Request, *, free: frozenset[int], taken: frozenset[int]) -> LabError:
    why = words.inventory(hardware, taken=taken)
    if len(free) < request.tp:
        number = f"{len(free)} {'is' if len(free) == 1 else 'are'}"
        return LabError(
            f"TP={request.tp} needs {request.tp} free GPUs, {number} free",
            why=why,
            fix="wait until others are done, lower TP, or turn MIG off where it is on",
        )
    wanted = {
        "nvlink": ["all joined by NVLink"],
        "pxb": ["joined by PCIe inside NUMA nodes, at least two of them without NVLink"],
        "sys": ["spread over NUMA nodes"],
        "any": [],
    }[request.link]
    wanted += ["on one NUMA node"] if request.same_numa else []
    return LabError(
        f"no {request.tp} free GPUs are {' and '.join(wanted)}",
        why=why,
        fix='ask for less (link "any", same_numa off), lower TP, or wait until others are done',
    )
