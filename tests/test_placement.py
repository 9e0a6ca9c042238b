"""Where servers are put: on known machines by name, on random ones by what must hold for all."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nvmlstandin import (
    A100,
    DGX_A100,
    MACHINES,
    MIG_ON,
    NO_GPU,
    ONE_NODE,
    PCIE_ONLY,
    PLAN_BOX,
    SIXTEEN,
    TWO_SOCKETS,
    WORKSTATION,
    Machine,
    hardware_of,
)

from lab.errors import LabError
from lab.hardware.fabric import Fabric, cost, fabric_of, meets, nodes_of, worst
from lab.hardware.model import PCIE_PATHS, SCHEMA, Cpu, Gpu, Hardware, Link, NumaNode
from lab.hardware.placement import Placement, Request, place

SIXTEEN_IN_PAIRS = Machine(
    name="sixteen-in-pairs",
    nodes=TWO_SOCKETS,
    gpu_nodes=(0,) * 8 + (1,) * 8,
    links={(i, i + 1): 12 for i in range(0, 16, 2)},
    cards=(A100,) * 16,
)


def uuids(machine: Machine, *gpus: int) -> frozenset[str]:
    return frozenset(machine.uuid(gpu) for gpu in gpus)


def on(machine: Machine, request: Request, *busy: int) -> Placement:
    return place(hardware_of(machine), request, busy=uuids(machine, *busy))


# -- the plan's box ----------------------------------------------------------------------------------------------


def test_one_gpu_is_the_one_without_partner() -> None:
    found = on(PLAN_BOX, Request(tp=1))
    assert (found.indexes, found.gpus) == ((4,), (PLAN_BOX.uuid(4),))
    assert "every pair stays whole" in found.reason
    assert found.worse == ("GPU 0 would part the NVLink pair with GPU 1",)
    assert (found.mems, set(found.server_cpus) <= set(PLAN_BOX.cpus(1))) == ((1,), True)


def test_two_gpus_are_an_nvlink_pair() -> None:
    found = on(PLAN_BOX, Request(tp=2))
    assert found.indexes == (0, 1)
    assert "an NVLink pair (NV12), NUMA node 0" in found.reason
    assert "would cross NUMA nodes 0, 1 (SYS)" in found.worse[0]
    assert "would go over PXB instead of NVLink" in found.worse[1]


def test_four_gpus_are_two_pairs_of_one_socket() -> None:
    found = on(PLAN_BOX, Request(tp=4))
    assert found.indexes == (0, 1, 2, 3)
    assert "two NVLink pairs over PXB, NUMA node 0" in found.reason
    assert "would cross NUMA nodes" in found.worse[0]
    assert found.mems == (0,)


@pytest.mark.parametrize(("busy", "pair"), [((1,), (2, 3)), ((0, 3), (5, 6)), ((1, 2, 4), (5, 6))])
def test_a_busy_gpu_moves_the_pair_and_says_so(busy: tuple[int, ...], pair: tuple[int, ...]) -> None:
    found = on(PLAN_BOX, Request(tp=2), *busy)
    assert found.indexes == pair
    assert "in use, else it would be GPUs 0, 1" in found.reason


def test_one_gpu_beside_a_busy_partner_parts_no_pair() -> None:
    found = on(PLAN_BOX, Request(tp=1), 4, 3)
    assert found.indexes == (2,)
    assert "its NVLink partner GPU 3 is in use anyway" in found.reason


def test_one_gpu_when_all_have_partners_says_what_it_costs() -> None:
    found = on(PLAN_BOX, Request(tp=1), 4)
    assert found.indexes == (0,)
    assert "leaves GPU 1 alone" in found.reason


def test_four_gpus_with_one_busy_keep_pairs_whole() -> None:
    assert on(PLAN_BOX, Request(tp=4), 1).indexes == (2, 3, 5, 6)


def test_the_slowest_way_can_be_chosen_on_purpose() -> None:
    """What an experiment on links asks for: the same number of GPUs, joined in three ways."""
    fabric = fabric_of(hardware_of(PLAN_BOX))
    for wish, label in (("nvlink", "NV12"), ("pxb", "PXB"), ("sys", "SYS")):
        found = on(PLAN_BOX, Request(tp=2, link=wish))
        assert fabric.links[found.indexes[0], found.indexes[1]].label == label


def test_a_server_across_sockets_gets_memory_and_cpus_of_both() -> None:
    found = on(PLAN_BOX, Request(tp=2, link="sys"))
    assert found.mems == (0, 1)
    for node in (0, 1):
        assert set(found.server_cpus) & set(PLAN_BOX.cpus(node))


@pytest.mark.parametrize(
    ("request_", "busy", "problem", "why"),
    [
        (Request(tp=8), (), "needs 8 GPUs, this machine has 7", "NVLink joins 0-1 and 2-3 and 5-6"),
        (Request(tp=2), (0, 1, 2, 3, 4, 5), "needs 2 free GPUs, 1 is free", "in use: GPUs 0-5"),
        (Request(tp=4, link="nvlink"), (), "all joined by NVLink", "NVLink joins"),
        (Request(tp=5, same_numa=True), (), "no 5 free GPUs are on one NUMA node", "NUMA node 1: GPUs 4-6"),
        (Request(tp=2, link="sys", same_numa=True), (), "spread over NUMA nodes and on one NUMA node", ""),
        (Request(tp=-1), (), "makes no sense", ""),
    ],
)
def test_what_cannot_be_met_says_why(
    request_: Request, busy: tuple[int, ...], problem: str, why: str
) -> None:
    with pytest.raises(LabError) as caught:
        on(PLAN_BOX, request_, *busy)
    assert problem in caught.value.problem
    assert why in caught.value.why
    assert caught.value.fix


def test_an_unknown_link_lists_the_right_ones() -> None:
    with pytest.raises(LabError, match="unknown link 'nvlnk'"):
        on(PLAN_BOX, Request(tp=2, link="nvlnk"))  # type: ignore[arg-type]


def test_without_exclusive_the_fewest_busy_gpus_are_shared() -> None:
    found = on(PLAN_BOX, Request(tp=2, exclusive=False), 0, 1, 2, 3, 4, 5)
    assert found.indexes == (5, 6)
    assert "shared with others: GPU 5" in found.reason
    assert on(PLAN_BOX, Request(tp=2, exclusive=False), 1).indexes == (2, 3), "free ones come first"


# -- other machines ----------------------------------------------------------------------------------------------


def test_through_switches_numa_nodes_decide() -> None:
    assert on(DGX_A100, Request(tp=2), 0).indexes == (2, 3)
    assert on(DGX_A100, Request(tp=8)).mems == (1, 3, 5, 7)
    with pytest.raises(LabError, match="on one NUMA node"):
        on(DGX_A100, Request(tp=4, same_numa=True))


def test_a_box_with_pcie_only() -> None:
    found = on(PCIE_ONLY, Request(tp=2))
    assert found.indexes == (0, 1)
    assert "PIX, no NVLink between them" in found.reason
    with pytest.raises(LabError) as caught:
        on(PCIE_ONLY, Request(tp=2, link="nvlink"))
    assert "no NVLink" in caught.value.why


def test_a_workstation() -> None:
    assert on(WORKSTATION, Request(tp=2, link="pxb")).indexes == (0, 1), "PHB is PCIe inside a NUMA node"


def test_a_gpu_in_mig_mode_is_never_given() -> None:
    assert on(MIG_ON, Request(tp=1)).indexes == (1,)
    with pytest.raises(LabError) as caught:
        on(MIG_ON, Request(tp=2))
    assert "in MIG mode: GPU 0" in caught.value.why


def test_one_numa_node() -> None:
    found = on(ONE_NODE, Request(tp=2), 0)
    assert (found.indexes, found.mems) == ((2, 3), (0,))


def test_without_gpu_the_server_gets_cpus() -> None:
    found = on(NO_GPU, Request(tp=0))
    assert (found.gpus, found.mems) == ((), (0,))
    assert found.server_cpus == (0, 1, 2, 4, 5, 6), "cores 0-2 with their siblings"
    assert found.client_cpus == (3, 7)
    with pytest.raises(LabError) as caught:
        on(NO_GPU, Request(tp=1))
    assert "sees no GPU" in caught.value.why


def test_rank_order_puts_pairs_side_by_side() -> None:
    crossed = Machine(name="crossed", nodes=TWO_SOCKETS, gpu_nodes=(0,) * 4, links={(0, 2): 12, (1, 3): 12})
    assert on(crossed, Request(tp=4)).indexes == (0, 2, 1, 3)


def test_mixed_cards_are_kept_apart_where_possible() -> None:
    """GPU 4 is a PCIe card between SXM cards: a server on both would run at the slower one's pace."""
    assert on(PLAN_BOX, Request(tp=3)).indexes == (0, 1, 2)


# -- CPUs --------------------------------------------------------------------------------------------------------


def test_cpus_are_whole_cores_near_the_gpu() -> None:
    found = on(PLAN_BOX, Request(tp=1))
    assert found.server_cpus == (*range(32, 60), *range(96, 124))
    assert found.client_cpus == (60, 61, 62, 63, 124, 125, 126, 127)
    assert (found.client_mems, found.sampler_cpus) == ((1,), (31, 95))


def limited(machine: Machine, tp: int, cpus: tuple[int, ...], **more: object) -> Placement:
    return place(replace(hardware_of(machine), cpus_allowed=cpus, **more), Request(tp=tp))  # type: ignore[arg-type]


def test_few_cores_near_the_gpu_send_the_client_to_the_other_node() -> None:
    found = limited(PLAN_BOX, 1, (32, 33, 34, 0, 1, 64))
    assert found.server_cpus == (32, 33, 34)
    assert found.client_cpus == (0, 1, 64)
    assert found.client_mems == (0,)
    assert "client on NUMA node 0" in found.cpu_reason


def test_too_few_cores_pin_nothing_and_say_so() -> None:
    found = limited(PLAN_BOX, 1, (32, 33, 96, 97))
    assert (found.server_cpus, found.client_cpus, found.sampler_cpus) == ((), (), ())
    assert "not pinned: 2 cores" in found.cpu_reason


def test_a_gpu_near_the_allowed_cpus_comes_before_whole_pairs() -> None:
    found = limited(PLAN_BOX, 1, tuple(range(8)))
    assert found.indexes == (0,)


def test_no_allowed_cpu_near_the_gpu_is_said() -> None:
    found = limited(MIG_ON, 1, tuple(range(8)))
    assert found.indexes == (1,)
    assert "the server's CPUs are remote" in found.cpu_reason
    assert set(found.server_cpus) < set(range(8))


def test_a_node_without_memory_is_replaced_by_the_nearest() -> None:
    hardware = hardware_of(DGX_A100)
    nodes = tuple(replace(node, memory_mib=0) if node.number == 3 else node for node in hardware.nodes)
    found = place(replace(hardware, nodes=nodes), Request(tp=2))
    assert found.mems == (0,)
    assert "no memory for us" in found.cpu_reason


def test_memory_that_a_cgroup_forbids_is_not_named() -> None:
    found = limited(PLAN_BOX, 1, PLAN_BOX.cpus(1), mems_allowed=(0,))
    assert found.mems == (0,)


def test_narrower_cpus_can_be_asked_for() -> None:
    found = place(hardware_of(PLAN_BOX), Request(tp=2), cpus_allowed=range(6))
    assert set(found.server_cpus) | set(found.client_cpus) | set(found.sampler_cpus) == set(range(6))


# -- any machine -------------------------------------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    """Anything that can be read from a machine, sensible or not."""
    count = draw(st.integers(1, 4))
    smt = draw(st.integers(1, 2))
    sizes = [draw(st.integers(0, 9)) for _ in range(count)]
    cpus: list[Cpu] = []
    for node, cores in enumerate(sizes):
        for _ in range(cores):
            first = len(cpus)
            cpus += [Cpu(number=first + t, core=first, socket=node, node=node) for t in range(smt)]
    nodes = tuple(
        NumaNode(
            number=node,
            cpus=tuple(cpu.number for cpu in cpus if cpu.node == node),
            memory_mib=draw(st.sampled_from((None, 0, 65536))),
            distances=tuple(draw(st.integers(10, 40)) for _ in sizes) if draw(st.booleans()) else (),
        )
        for node in range(count)
    )
    gpus = tuple(
        Gpu(
            index=index,
            uuid=f"GPU-{index}",
            pci_bus_id=f"0000:{index:02x}:00.0",
            name=draw(st.sampled_from(("A", "B"))),
            memory_mib=81920,
            compute_capability="8.0",
            numa_node=draw(st.sampled_from((None, *range(count)))),
            cpus=(),
            mig=draw(st.sampled_from((None, False, False, False, True))),
        )
        for index in range(draw(st.integers(0, 8)))
    )
    links = tuple(
        Link(
            a=a,
            b=b,
            path=draw(st.sampled_from(PCIE_PATHS)),
            nvlinks=draw(st.sampled_from((0, 0, 4, 12))),
            switched=draw(st.booleans()),
        )
        for a, b in combinations(range(len(gpus)), 2)
        if draw(st.integers(0, 9))
    )
    numbers = [cpu.number for cpu in cpus]
    return Hardware(
        schema=SCHEMA,
        driver=None,
        gpus=gpus,
        links=links,
        cpus=tuple(cpus),
        nodes=nodes,
        cpus_allowed=tuple(cpu for cpu in numbers if draw(st.integers(0, 5))),
        mems_allowed=tuple(node for node in range(count) if draw(st.integers(0, 4))),
    )


requests = st.builds(
    Request,
    tp=st.integers(0, 6),
    link=st.sampled_from(("any", "any", "nvlink", "pxb", "sys")),
    same_numa=st.booleans(),
    exclusive=st.booleans(),
)


def fits(fabric: Fabric, request: Request, group: tuple[int, ...]) -> bool:
    nodes = nodes_of(fabric, group)
    if request.same_numa and (len(nodes) > 1 or -1 in nodes):
        return False
    return request.tp == 1 or meets(request.link, worst(fabric, group))


@settings(max_examples=400, deadline=None)
@given(machines(), requests, st.sets(st.integers(0, 7)))
def test_what_holds_on_every_machine(hardware: Hardware, request: Request, used: set[int]) -> None:
    busy = frozenset(f"GPU-{index}" for index in used)
    fabric = fabric_of(hardware)
    whole = [gpu.index for gpu in hardware.gpus if not gpu.mig]
    can_be_had = (
        [index for index in whole if not request.exclusive or index not in used] if request.tp else []
    )
    possible = [g for g in combinations(can_be_had, request.tp) if not request.tp or fits(fabric, request, g)]
    try:
        found = place(hardware, request, busy=busy)
    except LabError:
        assert not possible, f"{possible[0]} would have done"
        return
    assert found == place(hardware, request, busy=busy), "the same question, the same answer"
    assert tuple(sorted(found.indexes)) in possible
    assert len(set(found.gpus)) == request.tp
    if not any(set(group).isdisjoint(used) for group in possible):
        assert request.tp == 0 or not request.exclusive
    elif request.tp:
        assert used.isdisjoint(found.indexes), "free GPUs would have done"
    check_cpus(hardware, found)


def check_cpus(hardware: Hardware, found: Placement) -> None:
    sets = [set(found.server_cpus), set(found.client_cpus), set(found.sampler_cpus)]
    core = {cpu.number: cpu.core for cpu in hardware.cpus}
    assert set.union(*sets) <= set(hardware.cpus_allowed)
    for one, two in combinations(sets, 2):
        assert {core[cpu] for cpu in one}.isdisjoint(core[cpu] for cpu in two)
    assert bool(found.server_cpus) == bool(found.client_cpus)
    assert set(found.mems) <= set(hardware.mems_allowed)
    memory = {node.number for node in hardware.nodes if node.memory_mib != 0} & set(hardware.mems_allowed)
    homes = {hardware.gpus[index].numa_node for index in found.indexes}
    assert homes & memory <= set(found.mems), "the memory node holds the GPU"
    assert found.mems or not memory
    if None not in homes and homes <= memory and homes:
        assert set(found.mems) == homes


@pytest.mark.parametrize("machine", [SIXTEEN, SIXTEEN_IN_PAIRS], ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
@given(
    tp=st.integers(3, 5),
    used=st.sets(st.integers(0, 15), max_size=6),
    link=st.sampled_from(("any", "nvlink", "sys")),
)
def test_the_quick_search_is_as_good_as_comparing_all(
    machine: Machine, tp: int, used: set[int], link: str
) -> None:
    """Groups of 3 to 5 out of 10 to 16 are too many to compare in `place`; here they all are."""
    hardware = hardware_of(machine)
    request = Request(tp=tp, link=link)  # type: ignore[arg-type]
    fabric = fabric_of(hardware)
    free = frozenset(range(16)) - used
    near = frozenset({0, 1})
    groups = [group for group in combinations(sorted(free), tp) if fits(fabric, request, group)]
    assume(groups)
    best = min(cost(fabric, group, free=free, near=near) for group in groups)
    found = place(hardware, request, busy=uuids(machine, *used))
    chosen = cost(fabric, sorted(found.indexes), free=free, near=near)
    assert chosen[:2] == best[:2], "the slowest way, and where"
    if link == "any":
        assert chosen == best


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_cpu_sets_on_every_known_machine(machine: Machine) -> None:
    hardware = hardware_of(machine)
    for tp in range(len(machine.gpu_nodes) + 1):
        try:
            check_cpus(hardware, place(hardware, Request(tp=tp)))
        except LabError:
            assert machine is MIG_ON
            assert tp == 2
