"""Where each variant's server and client sit: GPUs by UUID in rank order, CPUs, memory nodes. In go the experiment, the site's
wishes and the machine; out comes a `Seat` a variant, with the reason. Pure: what is busy is told to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lab.errors import LabError
from lab.experiment import Experiment, Variant
from lab.hardware.choose import check_one_node, resolve_gpus
from lab.hardware.model import Hardware
from lab.hardware.placement import Placement, Request, place
from lab.site import Site
from lab.stack import Stack

TP_FLAGS = ("--tp", "--tp-size", "--tensor-parallel-size")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A variant's place. `gpus` are UUIDs in the order of ranks; empty CPU and node sets mean: not bound.

    `cuda_numbers` are CUDA's numbers of the GPUs as the server sees them: in a container those that it was given count
    from 0. `rank_cpus` are the CPUs of each rank of a server with several ranks and no GPU.
    """

    gpus: tuple[str, ...] = ()
    server_cpus: tuple[int, ...] = ()
    server_mems: tuple[int, ...] = ()
    client_cpus: tuple[int, ...] = ()
    client_mems: tuple[int, ...] = ()
    sampler_cpus: tuple[int, ...] = ()
    cuda_numbers: tuple[int, ...] = ()
    rank_cpus: tuple[tuple[int, ...], ...] = ()
    reason: str = ""


def tensor_parallel(argv: Sequence[str]) -> int:
    """How many ranks a server of these arguments has: the last `--tp-size` counts, 1 without one."""
    size = 1
    for flag, value in pairwise(argv):
        if flag in TP_FLAGS and value.isdigit():
            size = int(value)
    return size


def seats(
    experiment: Experiment,
    *,
    stack: Stack,
    site: Site,
    hardware: Hardware,
    asked: Sequence[str] = (),
    busy: Mapping[str, str] | None = None,
) -> dict[str, Seat]:
    """A seat for every variant, by name.

    `asked` are GPUs that a person named (indices or UUIDs), before the site's; `busy` maps UUIDs of GPUs in use
    to words. Raises `LabError` for a GPU or CPU that is not there, a CPU set across NUMA nodes where the site
    names one node, and a request that the machine cannot meet.
    """
    _check_site(site, hardware)
    # A process on a machine with one node has nothing to be bound to; a container's cpuset names the node anyway.
    bind = site.runtime == "docker" or len(hardware.nodes) > 1
    named = tuple(gpu.uuid for gpu in resolve_gpus(asked or site.gpus, hardware))
    used = dict(busy or {})
    ranks = {
        variant.name: tensor_parallel((*stack.server_args, *experiment.server, *variant.args))
        for variant in experiment.variants
    }
    most = max(ranks.values())
    if len(named) > most:
        raise LabError(
            f"{len(named)} GPUs are named, no server of {experiment.name!r} uses more than {most}",
            why="a rank has one GPU",
            fix=f"name {most}",
        )
    found = {
        variant.name: _seat(
            variant,
            ranks=ranks[variant.name],
            cuda=stack.device == "cuda",
            site=site,
            hardware=hardware,
            named=named,
            busy=used,
        )
        for variant in experiment.variants
    }
    contained = site.runtime == "docker"
    found = {
        name: replace(seat, cuda_numbers=_numbers(seat.gpus, hardware=hardware, contained=contained))
        for name, seat in found.items()
    }
    if stack.device == "cpu":
        found = {
            name: replace(seat, rank_cpus=_shares(seat.server_cpus or hardware.cpus_allowed, ranks[name]))
            for name, seat in found.items()
        }
    if bind:
        return found
    return {name: replace(seat, server_mems=(), client_mems=()) for name, seat in found.items()}


def unseated(
    experiment: Experiment,
    *,
    stack: Stack,
    site: Site,
    hardware: Hardware,
    asked: Sequence[str] = (),
    busy: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The variants that have no place on this machine, with the reasons: too few GPUs, no two joined as they must be.

    Raises the first `LabError` when that are all of them.
    """
    reasons: dict[str, str] = {}
    errors: list[LabError] = []
    named = asked or site.gpus
    for variant in experiment.variants:
        ranks = tensor_parallel((*stack.server_args, *experiment.server, *variant.args))
        try:
            seats(
                replace(experiment, variants=(variant,)),
                stack=stack,
                site=site,
                hardware=hardware,
                asked=named[:ranks],
                busy=busy,
            )
        except LabError as error:
            errors.append(error)
            reasons[variant.name] = error.brief
    if errors and len(errors) == len(experiment.variants):
        raise errors[0]
    return reasons


def _numbers(gpus: Sequence[str], *, hardware: Hardware, contained: bool) -> tuple[int, ...]:
    """The GPUs as CUDA numbers them by bus, which is NVML's order."""
    index = {gpu.uuid: gpu.index for gpu in hardware.gpus}
    numbers = [index[uuid] for uuid in gpus]
    if contained:
        numbers = [sorted(numbers).index(number) for number in numbers]
    return tuple(numbers)


def _shares(cpus: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """The CPUs in `ranks` parts of the same size, in order; ranks share CPUs where there are fewer than ranks."""
    if ranks < 2:
        return ()
    each = max(1, len(cpus) // ranks)
    return tuple(tuple(cpus[(i * each + k) % len(cpus)] for k in range(each)) for i in range(ranks))


def _seat(
    variant: Variant,
    *,
    ranks: int,
    cuda: bool,
    site: Site,
    hardware: Hardware,
    named: tuple[str, ...],
    busy: Mapping[str, str],
) -> Seat:
    if named:
        if len(named) < ranks:
            raise LabError(
                f"variant {variant.name!r} needs {ranks} GPUs, {len(named)} are named",
                why=f"its server has {ranks} tensor-parallel ranks, one a GPU",
                fix="name as many with --gpus, or leave it out and let the lab choose",
            )
        chosen = named[:ranks]
        others = frozenset(gpu.uuid for gpu in hardware.gpus) - set(chosen)
        request = Request(tp=ranks, exclusive=False, link=variant.link, same_numa=variant.same_numa)
        found = place(hardware, request, busy=others)
        return _site_first(found, gpus=chosen, site=site, reason=f"GPUs as named; {found.cpu_reason}")
    request = Request(
        tp=ranks if cuda else 0, link=variant.link if cuda else "any", same_numa=cuda and variant.same_numa
    )
    found = place(hardware, request, busy=frozenset(busy))
    words = "; ".join(word for word in (found.reason if cuda else "", found.cpu_reason) if word)
    return _site_first(found, gpus=found.gpus, site=site, reason=words)


def _site_first(found: Placement, *, gpus: tuple[str, ...], site: Site, reason: str) -> Seat:
    """The seat, with CPUs and memory nodes as the site's file names them where it does."""
    if site.server_cpus or site.client_cpus:
        return Seat(
            gpus=gpus,
            server_cpus=site.server_cpus,
            server_mems=site.server_mems,
            client_cpus=site.client_cpus,
            client_mems=site.client_mems,
            sampler_cpus=tuple(cpu for cpu in found.sampler_cpus if cpu not in site.server_cpus),
            reason="CPUs and memory nodes as the site's file says",
        )
    return Seat(
        gpus=gpus,
        server_cpus=found.server_cpus,
        server_mems=site.server_mems or found.mems,
        client_cpus=found.client_cpus,
        client_mems=site.client_mems or found.client_mems,
        sampler_cpus=found.sampler_cpus,
        reason=reason,
    )


def _check_site(site: Site, hardware: Hardware) -> None:
    for who, cpus, mems in (
        ("server", site.server_cpus, site.server_mems),
        ("client", site.client_cpus, site.client_mems),
    ):
        absent = set(mems) - {node.number for node in hardware.nodes}
        if absent:
            raise LabError(
                f"site {site.name!r} asks for NUMA nodes {sorted(absent)}",
                why=f"the machine has {[node.number for node in hardware.nodes]}",
                fix=f"correct {who}_mems in the site's file",
            )
        if cpus and len(mems) == 1:
            check_one_node(cpus, mems, hardware)
