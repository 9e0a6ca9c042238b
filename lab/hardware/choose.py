"""GPUs and CPUs that a person names, against the machine: UUIDs and CPU sets go out, or an error that lists what is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lab.errors import LabError
from lab.hardware.model import Gpu, Hardware
from lab.hardware.sysfs import format_list


def resolve_gpus(asked: Sequence[str], hardware: Hardware) -> tuple[Gpu, ...]:
    """The GPUs in the order asked for; each is an index, a UUID, or the beginning of one UUID (`GPU-5f` or `5f`)."""
    chosen: list[Gpu] = []
    for word in asked:
        gpu = _resolve(word.strip(), hardware)
        if gpu in chosen:
            raise LabError(
                f"GPU {gpu.index} is named twice",
                why=f"{word!r} is {gpu.uuid}",
                fix="name each GPU once",
            )
        chosen.append(gpu)
    return tuple(chosen)


def check_one_node(cpus: Iterable[int], mems: Iterable[int], hardware: Hardware) -> int:
    """The NUMA node that holds all of `cpus` and `mems`; LabError when they are not there or are on several."""
    node_of = {cpu.number: cpu.node for cpu in hardware.cpus}
    wanted, memory = sorted(set(cpus)), sorted(set(mems))
    there = {node.number for node in hardware.nodes}
    layout = "; ".join(f"node {n.number} has CPUs {format_list(n.cpus) or 'none'}" for n in hardware.nodes)
    absent = [cpu for cpu in wanted if cpu not in node_of]
    if absent or not set(memory) <= there or not wanted:
        problem = (
            f"CPUs {format_list(absent)} are not there"
            if absent
            else f"memory nodes {format_list(set(memory) - there)} are not there"
            if wanted
            else "no CPUs are named"
        )
        raise LabError(problem, why=layout, fix="name CPUs and a memory node of one NUMA node")
    nodes = sorted({node_of[cpu] for cpu in wanted} | set(memory))
    if len(nodes) > 1:
        raise LabError(
            f"CPUs {format_list(wanted)} and memory {format_list(memory) or 'anywhere'} "
            f"lie on NUMA nodes {', '.join(map(str, nodes))}; one is asked for",
            why=layout,
            fix="name CPUs and a memory node of one NUMA node",
        )
    return nodes[0]


def _resolve(word: str, hardware: Hardware) -> Gpu:
    if word.isdigit():
        found = [gpu for gpu in hardware.gpus if gpu.index == int(word)]
    else:
        tail = word.lower().removeprefix("gpu-")
        found = [gpu for gpu in hardware.gpus if gpu.uuid.lower().removeprefix("gpu-").startswith(tail)]
        found = found if tail else []
    if len(found) == 1:
        return found[0]
    problem = f"GPU {word!r} is not there" if not found else f"GPU {word!r} could be any of {len(found)}"
    raise LabError(problem, why=_listing(found or hardware.gpus), fix="name a GPU by its index or UUID")


def _listing(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "this machine has no GPU that answers (invoke doctor says why)"
    return "the GPUs are " + ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
