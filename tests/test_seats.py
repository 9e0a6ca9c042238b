"""Where variants sit: on the first user's box, on small machines, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nvmlstandin import NO_GPU, PLAN_BOX, WORKSTATION, Machine, Node, hardware_of

from lab import places
from lab.errors import LabError
from lab.experiment import Experiment, Variant, load_experiment
from lab.seats import Seat, seats, tensor_parallel, unseated
from lab.site import Site
from lab.stack import load_stack

RADIX = load_experiment("radix", folder=places.EXPERIMENTS).experiment
CPU = load_stack("cpu", root=places.ROOT)
CUDA = load_stack("cu125", root=places.ROOT)
DOCKER = Site(name="box", runtime="docker")
BOX = hardware_of(PLAN_BOX)


def experiment(*sizes: int, **wish: object) -> Experiment:
    variants = tuple(
        Variant(name=f"tp{n}", says=f"{n} GPUs", args=("--tp-size", str(n)), **wish)  # type: ignore[arg-type]
        for n in sizes
    )
    return replace(RADIX, variants=variants)


def on_box(*sizes: int, busy: tuple[int, ...] = (), site: Site = DOCKER, asked: tuple[str, ...] = ()) -> Seat:
    used = {PLAN_BOX.uuid(gpu): "1 process" for gpu in busy}
    found = seats(experiment(*sizes), stack=CUDA, site=site, hardware=BOX, asked=asked, busy=used)
    return found[f"tp{sizes[-1]}"]


def uuids(*indexes: int) -> tuple[str, ...]:
    return tuple(PLAN_BOX.uuid(gpu) for gpu in indexes)


def test_each_variant_gets_as_many_gpus_as_it_has_ranks() -> None:
    found = seats(experiment(1, 2, 4), stack=CUDA, site=DOCKER, hardware=BOX)
    assert [len(found[f"tp{n}"].gpus) for n in (1, 2, 4)] == [1, 2, 4]
    assert found["tp1"].gpus == uuids(4), "the one without a partner"
    assert set(found["tp4"].gpus) == set(uuids(0, 1, 2, 3))


def test_cpus_and_memory_are_those_of_the_gpus_socket() -> None:
    seat = on_box(1)
    near = set(PLAN_BOX.cpus(1))
    assert set(seat.server_cpus) <= near
    assert seat.server_mems == (1,)
    assert not set(seat.server_cpus) & set(seat.client_cpus)
    assert seat.client_cpus
    assert seat.reason


def test_a_busy_gpu_is_left_alone() -> None:
    assert set(on_box(2, busy=(1,)).gpus) in ({*uuids(2, 3)}, {*uuids(5, 6)})


def test_named_gpus_are_taken_in_the_order_named() -> None:
    seat = on_box(2, asked=("6", PLAN_BOX.uuid(5)))
    assert seat.gpus == uuids(6, 5)
    assert seat.server_mems == (1,)
    assert on_box(2, 1, asked=("0", "1")).gpus == uuids(0)
    with pytest.raises(LabError, match="2 GPUs are named, no server of 'radix' uses more than 1"):
        on_box(1, asked=("0", "1"))
    assert on_box(1, site=replace(DOCKER, gpus=("3",))).gpus == uuids(3)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (("9",), "GPU '9' is not there"),
        (("GPU-0000",), "GPU 'GPU-0000' is not there"),
        (("0", "0"), "named twice"),
        (("0",), "needs 2 GPUs, 1 are named"),
    ],
)
def test_gpus_that_cannot_be_had(asked: tuple[str, ...], problem: str) -> None:
    with pytest.raises(LabError, match=problem):
        on_box(2, asked=asked)


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(LabError):
        seats(experiment(4), stack=CUDA, site=DOCKER, hardware=hardware_of(WORKSTATION))


def test_cpus_across_nodes_where_one_is_asked_for() -> None:
    both = (PLAN_BOX.cpus(0)[0], PLAN_BOX.cpus(1)[0])
    with pytest.raises(LabError, match="NUMA nodes 0, 1; one is asked for"):
        on_box(1, site=replace(DOCKER, server_cpus=both, server_mems=(0,)))
    with pytest.raises(LabError, match=r"asks for NUMA nodes \[7\]"):
        on_box(1, site=replace(DOCKER, server_mems=(7,)))


def test_the_sites_cpus_come_first() -> None:
    seat = on_box(1, site=replace(DOCKER, server_cpus=(1, 2), client_cpus=(3,), server_mems=(0,)))
    assert (seat.server_cpus, seat.client_cpus, seat.server_mems) == ((1, 2), (3,), (0,))


def test_without_a_gpu_the_cpu_stack_sits_on_one_node() -> None:
    found = seats(RADIX, stack=CPU, site=DOCKER, hardware=BOX)["cache-on"]
    assert found.gpus == ()
    assert found.server_cpus
    assert len(found.server_mems) == 1
    small = seats(RADIX, stack=CPU, site=DOCKER, hardware=hardware_of(NO_GPU))["cache-on"]
    assert not set(small.server_cpus) & set(small.client_cpus)


def test_two_cpus_are_too_few_to_pin_and_the_seat_says_so() -> None:
    tiny = hardware_of(Machine(name="tiny", nodes=(Node(cores=2, socket=0, memory_mib=8000),), smt=1))
    seat = seats(RADIX, stack=CPU, site=DOCKER, hardware=tiny)["cache-on"]
    assert (seat.server_cpus, seat.client_cpus) == ((), ())
    assert "not pinned" in seat.reason
    alone = seats(RADIX, stack=CPU, site=Site(name="x", runtime="process"), hardware=tiny)["cache-on"]
    assert (alone.server_mems, alone.client_mems) == ((), ()), "one node: nothing to bind a process to"


def test_the_last_size_counts() -> None:
    assert tensor_parallel(("--tp-size", "2", "--tp", "4")) == 4
    assert tensor_parallel(("--device", "cpu")) == 1


def test_cuda_counts_a_containers_gpus_from_0_and_a_process_sees_all() -> None:
    asked = ("6", "5")
    assert on_box(2, asked=asked).cuda_numbers == (1, 0), "in the order of ranks"
    process = replace(DOCKER, runtime="process")
    assert on_box(2, asked=asked, site=process).cuda_numbers == (6, 5)


def test_ranks_on_cpus_share_them_evenly() -> None:
    found = seats(experiment(1, 2), stack=CPU, site=DOCKER, hardware=hardware_of(NO_GPU))
    assert found["tp1"].rank_cpus == ()
    first, second = found["tp2"].rank_cpus
    assert len(first) == len(second) > 0
    assert not set(first) & set(second)
    one_cpu = replace(hardware_of(NO_GPU), cpus_allowed=(3,))
    alone = seats(experiment(2), stack=CPU, site=replace(DOCKER, runtime="process"), hardware=one_cpu)
    assert alone["tp2"].rank_cpus == ((3,), (3,))


def test_a_variant_without_a_place_is_left_out_with_the_reason() -> None:
    small = hardware_of(WORKSTATION)
    reasons = unseated(experiment(1, 2, 4), stack=CUDA, site=DOCKER, hardware=small)
    assert set(reasons) == {"tp4"}
    assert "4" in reasons["tp4"]
    far = unseated(experiment(2, link="nvlink"), stack=CUDA, site=DOCKER, hardware=BOX)
    assert far == {}
    named = replace(DOCKER, gpus=("0", "1"))
    assert set(unseated(experiment(1, 2, 4), stack=CUDA, site=named, hardware=BOX)) == {"tp4"}
    with pytest.raises(LabError):
        unseated(experiment(4), stack=CUDA, site=DOCKER, hardware=small)
