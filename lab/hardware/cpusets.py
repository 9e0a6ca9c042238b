"""Which CPUs and memory nodes server, client and sampler get, once it is known on which NUMA nodes the GPUs are.

The unit is the physical core: SMT siblings always go to the same program, so no two programs share a core's
execution units. A program gets all of its cores' siblings that the limits allow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lab.hardware.model import Hardware
from lab.hardware.sysfs import format_list

SERVER_BESIDE_RANKS = 2  # a scheduler for each rank, and beside them tokenizer and detokenizer
CLIENT_CORES = 4

Core = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CpuSets:
    """CPUs by program, disjoint; empty where nothing is pinned. `mems` are memory nodes of the server."""

    server: tuple[int, ...]
    client: tuple[int, ...]
    sampler: tuple[int, ...]
    mems: tuple[int, ...]
    client_mems: tuple[int, ...]
    reason: str


def roomiest(hardware: Hardware, *, cpus_allowed: frozenset[int]) -> tuple[int, ...]:
    """The NUMA node with most cores for us, for a server without GPU; every node where there is no CPU list."""
    by_node = _cores(hardware, cpus_allowed=cpus_allowed)
    if not by_node:
        return tuple(node.number for node in hardware.nodes)
    return (min(by_node, key=lambda node: (-len(by_node[node]), node)),)


def usable_nodes(hardware: Hardware, *, cpus_allowed: frozenset[int]) -> frozenset[int]:
    """NUMA nodes with at least one CPU for us."""
    return frozenset(cpu.node for cpu in hardware.cpus if cpu.number in cpus_allowed)


def split(hardware: Hardware, *, nodes: Sequence[int], ranks: int, cpus_allowed: frozenset[int]) -> CpuSets:
    """Cores for a server of `ranks` ranks on the NUMA nodes `nodes`, for its client and for a sampler.

    The client gets up to four cores of the same nodes, or of the nearest other node when the server would be left
    with fewer than it has busy processes. Where that cannot be either, nothing is pinned: it would only hurt.
    """
    by_node = _cores(hardware, cpus_allowed=cpus_allowed)
    order = _by_distance(hardware, home=nodes, there=by_node)
    home = [node for node in nodes if node in by_node]
    said: list[str] = []
    if not home:
        said.append(f"no CPU of NUMA node {format_list(nodes)} is allowed, so the server's CPUs are remote")
        home = order[:1]
    local = [core for node in home for core in by_node[node]]
    others = [core for node in order if node not in home for core in by_node[node]]
    least = max(1, ranks) + SERVER_BESIDE_RANKS
    mems = _memory(hardware, nodes=nodes, said=said)
    if len(local) > least:
        count = min(max(1, len(local) // 4), CLIENT_CORES, len(local) - least)
        server, client = local[:-count], local[-count:]
        said.append(f"client on cores of the same NUMA node, apart from the server's {len(server)}")
        client_nodes = home
    elif others:
        nearest = next(node for node in order if node not in home)
        server, client = local, by_node[nearest][:CLIENT_CORES]
        said.append(f"{len(local)} cores near the GPU are all for the server; client on NUMA node {nearest}")
        client_nodes = [nearest]
    else:
        said.append(f"CPUs not pinned: {len(local)} cores are too few to keep server and client apart")
        return _sets((), (), (), mems=mems, client_mems=mems, said=said)
    kept, sampler = _sampler(server, client, others, least=least, said=said)
    client_mems = _memory(hardware, nodes=client_nodes, said=[])
    return _sets(kept, client, sampler, mems=mems, client_mems=client_mems, said=said)


def _sampler(
    server: Sequence[Core], client: Sequence[Core], others: Sequence[Core], *, least: int, said: list[str]
) -> tuple[Sequence[Core], Sequence[Core]]:
    """The server's cores and one for the sampler: of another node, else of the server's when it has one to spare."""
    spare = [core for core in others if core not in client]
    if spare:
        return server, spare[-1:]
    if len(server) > least:
        return server[:-1], server[-1:]
    said.append("no core to spare for the sampler")
    return server, ()


def _sets(
    server: Sequence[Core],
    client: Sequence[Core],
    sampler: Sequence[Core],
    *,
    mems: tuple[int, ...],
    client_mems: tuple[int, ...],
    said: list[str],
) -> CpuSets:
    def flat(cores: Sequence[Core]) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in cores for cpu in core))

    return CpuSets(
        server=flat(server),
        client=flat(client),
        sampler=flat(sampler),
        mems=mems,
        client_mems=client_mems,
        reason="; ".join(said),
    )


def _cores(hardware: Hardware, *, cpus_allowed: frozenset[int]) -> dict[int, list[Core]]:
    """Physical cores by NUMA node, each as its allowed CPUs, in order of their numbers."""
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in hardware.cpus:
        if cpu.number in cpus_allowed:
            cores.setdefault((cpu.node, cpu.core), []).append(cpu.number)
    found: dict[int, list[Core]] = {}
    for (node, _), cpus in sorted(cores.items()):
        found.setdefault(node, []).append(tuple(sorted(cpus)))
    return found


def _memory(hardware: Hardware, *, nodes: Sequence[int], said: list[str]) -> tuple[int, ...]:
    """Memory nodes: those given as far as they have memory for us, else the nearest one that has."""
    known = {node.number for node in hardware.nodes if node.memory_mib != 0} & set(hardware.mems_allowed)
    own = tuple(sorted(set(nodes) & known))
    if own or not known:
        return own
    nearest = _by_distance(hardware, home=nodes, there=known)[0]
    said.append(f"NUMA node {format_list(nodes)} has no memory for us; the nearest that has is {nearest}")
    return (nearest,)


def _by_distance(hardware: Hardware, *, home: Sequence[int], there: Collection[int]) -> list[int]:
    """The nodes of `there` by the kernel's distance from `home`, nearest first."""
    numbers = [node.number for node in hardware.nodes]
    rows = {node.number: dict(zip(numbers, node.distances, strict=False)) for node in hardware.nodes}

    def far(node: int) -> tuple[int, int]:
        known = [rows[one][node] for one in home if node in rows.get(one, {})]
        return min(known, default=10 if node in home else 255), node

    return sorted(there, key=far)
