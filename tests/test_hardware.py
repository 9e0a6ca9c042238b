"""The machine as data: NVML through the real nvidia-ml-py on a stand-in library, /sys under a folder, files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvmlstandin import (
    DGX_A100,
    DRIVER_NOT_LOADED,
    LOST,
    MACHINES,
    MIG_ON,
    MISMATCH,
    NO_GPU,
    NOT_SUPPORTED,
    ONE_NODE,
    PLAN_BOX,
    SIXTEEN,
    WORKSTATION,
    Machine,
    StandIn,
    detect_text,
    hardware_of,
    limit_v1,
    limit_v2,
    put,
    stand_in,
)
from parts import need

from lab.errors import LabError
from lab.hardware.choose import check_one_node, resolve_gpus
from lab.hardware.detect import detect
from lab.hardware.model import Hardware, from_json, links_by_pair, read_hardware, to_json
from lab.hardware.sysfs import format_list, parse_list, read_host, read_limits

ROOT = Path(__file__).parents[1]
PLAN_MATRIX = """
X    NV12 PXB  PXB  SYS  SYS  SYS
NV12 X    PXB  PXB  SYS  SYS  SYS
PXB  PXB  X    NV12 SYS  SYS  SYS
PXB  PXB  NV12 X    SYS  SYS  SYS
SYS  SYS  SYS  SYS  X    PXB  PXB
SYS  SYS  SYS  SYS  PXB  X    NV12
SYS  SYS  SYS  SYS  PXB  NV12 X
"""


def seen(tmp_path: Path, machine: Machine, *, lacks: tuple[str, ...] = ()) -> Hardware:
    return from_json(detect_text(stand_in(tmp_path, machine, lacks=lacks)), where="detected")


# -- what NVML says ----------------------------------------------------------------------------------------------


def test_the_links_of_the_plans_box_cell_by_cell() -> None:
    links = links_by_pair(hardware_of(PLAN_BOX))
    for a, row in enumerate(PLAN_MATRIX.strip().splitlines()):
        for b, cell in enumerate(row.split()):
            assert (links[a, b].label if a != b else "X") == cell, (a, b)


def test_the_gpus_of_the_plans_box() -> None:
    hardware = hardware_of(PLAN_BOX)
    assert [gpu.numa_node for gpu in hardware.gpus] == [0, 0, 0, 0, 1, 1, 1]
    assert hardware.driver is not None
    assert (hardware.driver.version, hardware.driver.cuda) == ("555.42.06", "12.5")
    gpu = hardware.gpus[4]
    assert (gpu.index, gpu.uuid, gpu.pci_bus_id) == (4, PLAN_BOX.uuid(4), "0000:27:00.0")
    assert (gpu.name, gpu.memory_mib, gpu.compute_capability) == ("NVIDIA A100 80GB PCIe", 81920, "8.0")
    assert gpu.cpus == PLAN_BOX.cpus(1)
    assert (gpu.mig, gpu.ecc, gpu.persistence, gpu.nvlinks) == (False, True, True, 0)
    assert (gpu.power_limit_w, gpu.power_min_w, gpu.power_max_w) == (300.0, 100.0, 300.0)
    assert (gpu.sm_clock_max_mhz, gpu.memory_clock_max_mhz, gpu.sm_clock_set_mhz) == (1410, 1593, 1410)
    assert hardware.gpus[5].nvlinks == 12
    assert gpu.unanswered == ()
    assert hardware.notes == ()


def test_links_through_switches_join_all_pairs() -> None:
    hardware = hardware_of(DGX_A100)
    assert len(hardware.links) == 28
    assert {(link.label, link.switched) for link in hardware.links} == {("NV12", True)}
    assert [gpu.numa_node for gpu in hardware.gpus] == [3, 3, 1, 1, 7, 7, 5, 5]


def test_a_gpu_without_nvlink_or_mig_is_no_fault() -> None:
    hardware = hardware_of(WORKSTATION)
    assert [link.label for link in hardware.links] == ["PHB"]
    assert {gpu.mig for gpu in hardware.gpus} == {None}
    assert hardware.gpus[0].unanswered == ("MIG mode",)
    assert hardware.notes == ()


def test_mig_devices_are_listed_with_their_memory() -> None:
    first, second = hardware_of(MIG_ON).gpus
    assert (first.mig, [d.memory_mib for d in first.mig_devices]) == (True, [40192, 19968])
    assert (second.mig, second.mig_devices) == (False, ())


def test_sixteen_gpus() -> None:
    hardware = hardware_of(SIXTEEN)
    assert (len(hardware.gpus), len(hardware.links)) == (16, 120)


def test_a_driver_without_gpus() -> None:
    hardware = hardware_of(NO_GPU)
    assert hardware.driver is not None
    assert hardware.gpus == ()
    assert hardware.notes == ("driver 555.42.06 sees no GPU",)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (DRIVER_NOT_LOADED, "kernel driver is not loaded"),
        (MISMATCH, "have different versions"),
        (4, "refuses this user"),
        (999, "daemon-reload"),
        (24, "NVML does not start"),
    ],
)
def test_a_driver_that_does_not_start_is_a_note(tmp_path: Path, code: int, words: str) -> None:
    hardware = seen(tmp_path, PLAN_BOX.with_lines(f"init {code}"))
    assert (hardware.driver, hardware.gpus, hardware.links) == (None, (), ())
    assert words in hardware.notes[0]
    assert len(hardware.cpus) == 128


def test_without_the_library_the_cpus_are_still_read(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX)
    done = subprocess.run(("ldconfig", "-p"), capture_output=True, text=True)
    need("libnvidia-ml.so.1" not in done.stdout, "a machine without NVIDIA's driver")
    made.library.unlink()
    hardware = from_json(detect_text(made), where="detected")
    assert hardware.gpus == ()
    assert "libnvidia-ml.so.1 is not found" in hardware.notes[0]


@pytest.mark.parametrize("line", [f"gpu 3 fail {LOST}", f"reply nvmlDeviceGetEccMode 3 {LOST}"])
def test_a_lost_gpu_is_left_out_and_named(tmp_path: Path, line: str) -> None:
    """Whether it was lost before, or while it was being read."""
    hardware = seen(tmp_path, PLAN_BOX.with_lines(line))
    assert [gpu.index for gpu in hardware.gpus] == [0, 1, 2, 4, 5, 6]
    assert len(hardware.links) == 15
    assert [note for note in hardware.notes if "GPU 3" in note and "GPU is lost" in note]
    assert links_by_pair(hardware)[5, 6].label == "NV12"


def test_what_an_old_driver_lacks_is_none_and_named(tmp_path: Path) -> None:
    lacks = (
        *("nvmlDeviceGetEccMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetCpuAffinityWithinScope"),
        *("nvmlDeviceGetPowerManagementLimitConstraints", "nvmlDeviceGetMemoryAffinity"),
    )
    hardware = seen(tmp_path, PLAN_BOX, lacks=lacks)
    gpu = hardware.gpus[0]
    assert (gpu.ecc, gpu.mig, gpu.power_min_w) == (None, None, None)
    assert gpu.unanswered == ("MIG mode", "ECC mode", "power range")
    assert (gpu.numa_node, gpu.cpus) == (0, PLAN_BOX.cpus(0)), "from /sys and the older function"
    assert hardware.notes == ()


def test_a_driver_without_topology_leaves_the_paths_unknown(tmp_path: Path) -> None:
    hardware = seen(tmp_path, PLAN_BOX, lacks=("nvmlDeviceGetTopologyCommonAncestor",))
    links = links_by_pair(hardware)
    assert (links[0, 1].label, links[0, 2].label) == ("NV12", "UNKNOWN")


def test_a_gpu_of_no_known_node_is_named(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX.with_lines(f"reply nvmlDeviceGetMemoryAffinity * {NOT_SUPPORTED}"))
    for folder in (made.root / "sys/bus/pci/devices").iterdir():
        put(folder / "numa_node", "-1")
    hardware = from_json(detect_text(made), where="detected")
    assert {gpu.numa_node for gpu in hardware.gpus} == {None}
    assert len([note for note in hardware.notes if "on which NUMA node" in note]) == 7


def test_on_a_machine_of_one_node_the_gpu_is_there(tmp_path: Path) -> None:
    made = stand_in(tmp_path, ONE_NODE.with_lines(f"reply nvmlDeviceGetMemoryAffinity * {NOT_SUPPORTED}"))
    shutil.rmtree(made.root / "sys/bus")
    hardware = from_json(detect_text(made), where="detected")
    assert {gpu.numa_node for gpu in hardware.gpus} == {0}


USE = """
import json, sys
from dataclasses import asdict
from lab.hardware.nvml import read_use
print(json.dumps([asdict(use) for use in read_use(sys.argv[1:])]))
"""


def use_of(made: StandIn, *uuids: str) -> list[dict[str, object]]:
    words = (sys.executable, "-c", USE, *uuids)
    done = subprocess.run(words, env=made.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_use_counts_what_programs_hold_and_who(tmp_path: Path) -> None:
    lines = ("gpu 1 used_mib 7000", "gpu 1 proc 4242:7000", f"gpu 2 fail {LOST}")
    made = stand_in(tmp_path, PLAN_BOX.with_lines(*lines))
    free, used, lost, unknown = use_of(made, *(PLAN_BOX.uuid(i) for i in range(3)), "GPU-nothere")
    assert (free["used_mib"], free["free_mib"], free["pids"]) == (0, 81920 - 611, [])
    assert (used["used_mib"], used["pids"]) == (7000, [4242])
    assert (lost["problem"], lost["used_mib"]) == ("GPU is lost", None)
    assert unknown["problem"] == "Not Found"


def test_use_on_a_driver_with_the_old_memory_call_counts_the_reserve(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX, lacks=("nvmlDeviceGetMemoryInfo_v2",))
    assert use_of(made, PLAN_BOX.uuid(0))[0]["used_mib"] == 611


def test_use_without_a_driver_says_so(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX.with_lines(f"init {DRIVER_NOT_LOADED}"))
    assert "not loaded" in str(use_of(made, PLAN_BOX.uuid(0))[0]["problem"])


def test_only_the_modules_that_may_import_the_binding() -> None:
    found = {
        path.relative_to(ROOT / "lab").as_posix()
        for path in (ROOT / "lab").rglob("*.py")
        if "import pynvml" in path.read_text(encoding="utf-8")
    }
    assert found <= {"hardware/nvml.py", "hardware/gpus.py", "telemetry/reader.py"}


# -- what /sys and /proc say -------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 2000)))
def test_lists_of_cpus_survive_a_round_trip(numbers: set[int]) -> None:
    assert set(parse_list(format_list(numbers))) == numbers


@pytest.mark.parametrize("text", ["x", "3-1", "1,-", "-3", "1-2-3", "0-99999999"])
def test_a_bad_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the text is int()'s or ours
        parse_list(text)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_cpus_and_nodes_of_every_machine(machine: Machine) -> None:
    hardware = hardware_of(machine)
    assert [node.cpus for node in hardware.nodes] == [
        tuple(sorted(machine.cpus(n))) for n in range(len(machine.nodes))
    ]
    cores = sum(node.cores for node in machine.nodes)
    assert len({cpu.core for cpu in hardware.cpus}) == cores
    assert all(cpu.core == cpu.number % cores for cpu in hardware.cpus)
    assert [n.memory_mib for n in hardware.nodes] == [n.memory_mib for n in machine.nodes]
    assert hardware.cpus_allowed == tuple(cpu.number for cpu in hardware.cpus)
    assert from_json(to_json(hardware), where="again") == hardware


def test_distances_are_the_kernels() -> None:
    assert hardware_of(DGX_A100).nodes[3].distances == (12, 12, 12, 10, 32, 32, 32, 32)


def test_this_machine() -> None:
    """Against what Python is told by the system itself."""
    hardware = detect()
    assert set(hardware.cpus_allowed) == os.sched_getaffinity(0)
    assert len(hardware.cpus) == os.cpu_count()


@pytest.mark.parametrize("limit", [limit_v1, limit_v2])
def test_a_cpuset_leaves_fewer_cpus_and_nodes(tmp_path: Path, limit) -> None:
    made = stand_in(tmp_path, PLAN_BOX)
    limit(made.root, cpus="4-7,68-71", mems="0")
    hardware = from_json(detect_text(made), where="detected")
    assert hardware.cpus_allowed == (4, 5, 6, 7, 68, 69, 70, 71)
    assert hardware.mems_allowed == (0,)
    assert len(hardware.cpus) == 128


def test_in_a_container_the_cgroups_own_root_is_what_counts(tmp_path: Path) -> None:
    """/proc/self/cgroup names the host's path, which a container does not see."""
    put(tmp_path / "proc/self/cgroup", "4:cpuset:/docker/0123abcd")
    put(tmp_path / "sys/fs/cgroup/cpuset/cpuset.cpus", "1-2")
    put(tmp_path / "proc/self/status", "Cpus_allowed_list:\t0-2\nMems_allowed_list:\t0")
    limits = read_limits(tmp_path)
    assert (limits.cpus, limits.mems) == (frozenset({1, 2}), frozenset({0}))


def test_quotas_of_both_versions(tmp_path: Path) -> None:
    put(tmp_path / "one/proc/self/cgroup", "5:cpu,cpuacct:/a")
    put(tmp_path / "one/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "150000")
    put(tmp_path / "one/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000")
    put(tmp_path / "two/proc/self/cgroup", "0::/a/b")
    put(tmp_path / "two/sys/fs/cgroup/a/b/cpu.max", "max 100000")
    put(tmp_path / "two/sys/fs/cgroup/a/cpu.max", "200000 100000")
    assert read_limits(tmp_path / "one").cpu_quota == 1.5
    assert read_limits(tmp_path / "two").cpu_quota == 2.0
    assert read_limits(tmp_path / "none").cpu_quota is None


def test_limits_that_name_no_cpu_of_the_machine_are_not_used(tmp_path: Path) -> None:
    made = stand_in(tmp_path, NO_GPU)
    limit_v2(made.root, cpus="500", mems="0")
    hardware = from_json(detect_text(made), where="detected")
    assert len(hardware.cpus_allowed) == 8
    assert [note for note in hardware.notes if "not used" in note]


def test_nodes_without_cpus_or_memory(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX)
    nodes = made.root / "sys/devices/system/node"
    put(nodes / "online", "0-3")
    put(nodes / "node2/cpulist", "")
    put(nodes / "node2/meminfo", "Node 2 MemTotal: 1048576 kB")
    put(nodes / "node3/cpulist", "")
    put(nodes / "node3/meminfo", "Node 3 MemTotal: 0 kB")
    host = read_host(made.root)
    assert [(node.cpus == (), node.memory_mib) for node in host.nodes[2:]] == [(True, 1024), (True, 0)]
    assert "NUMA node 2 has no CPUs" in host.notes
    assert "NUMA node 3 has no memory" in host.notes
    assert host.nodes[0].distances == (), "two numbers for four nodes say nothing"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    """A folder where a file should be cannot be read by anyone, not even root."""
    made = stand_in(tmp_path, PLAN_BOX)
    broken = made.root / "sys/devices/system/node/node1/cpulist"
    broken.unlink()
    broken.mkdir()
    put(made.root / "sys/devices/system/cpu/cpu5/topology/thread_siblings_list", "what?")
    host = read_host(made.root)
    assert "the CPUs of NUMA node 1 cannot be read" in host.notes
    assert [note for note in host.notes if "counted to node 0" in note]
    assert len(host.cpus) == 128
    assert host.cpus[5].core == 5


def test_an_empty_root_is_a_machine_of_unknown_cpus(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    assert (host.cpus, len(host.nodes)) == ((), 1)
    assert "the kernel does not say which CPUs there are" in host.notes


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    put(tmp_path / "sys/devices/system/cpu/online", "0-3")
    put(tmp_path / "proc/meminfo", "MemTotal:       2097152 kB")
    host = read_host(tmp_path)
    assert (host.nodes[0].cpus, host.nodes[0].memory_mib) == ((0, 1, 2, 3), 2048)


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_is_read_back(tmp_path: Path) -> None:
    hardware = hardware_of(PLAN_BOX)
    (tmp_path / "hardware.json").write_text(to_json(hardware))
    assert read_hardware(tmp_path / "hardware.json") == hardware


def test_a_missing_file_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="cannot read"):
        read_hardware(tmp_path / "nothere.json")


def changed(change) -> str:
    raw = json.loads(to_json(hardware_of(PLAN_BOX)))
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["gpus"][2].pop("uuid"), r"missing required field `uuid` - at `\$.gpus\[2\]`"),
        (lambda raw: raw.pop("nodes"), "missing required field `nodes`"),
        (lambda raw: raw.pop("schema"), '"schema"'),
        (lambda raw: raw.update(schema=2), "knows up to 1"),
        (lambda raw: raw["gpus"][0].update(memory_mib="80 GB"), r"\$.gpus\[0\].memory_mib"),
        (lambda raw: raw["links"][0].update(path="FAR"), r"\$.links\[0\].path"),
        (lambda raw: raw["links"][0].update(b=9), "a link between GPUs 0 and 9"),
        (lambda raw: raw["gpus"][1].update(uuid=raw["gpus"][0]["uuid"]), "two GPU UUIDs"),
        (lambda raw: raw["gpus"][1].update(numa_node=5), "on NUMA node 5"),
        (lambda raw: raw["nodes"][0]["cpus"].append(900), "CPUs \\[900\\]"),
        (lambda raw: raw.update(mems_allowed=[7]), "mems_allowed"),
    ],
)
def test_a_bad_file_is_refused_in_words(change, words: str) -> None:
    with pytest.raises(LabError) as caught:
        from_json(changed(change), where="hardware.json")
    assert caught.value.problem.startswith("hardware.json")
    assert caught.value.fix
    assert re.search(words, str(caught.value)), caught.value


@given(st.integers(0, 20000), st.text(max_size=3))
def test_a_damaged_file_never_ends_in_a_traceback(at: int, patch: str) -> None:
    text = to_json(hardware_of(WORKSTATION))
    at %= len(text)
    for damaged in (text[:at], text[:at] + patch + text[at + 1 :]):
        with suppress(LabError):
            from_json(damaged, where="x")


# -- GPUs and CPUs that a person names ---------------------------------------------------------------------------


def test_gpus_by_index_uuid_and_prefix_in_the_order_asked() -> None:
    hardware = hardware_of(PLAN_BOX)
    prefix = PLAN_BOX.uuid(2)[:12]
    chosen = resolve_gpus((PLAN_BOX.uuid(6), "0", prefix, PLAN_BOX.uuid(3)[4:14].upper()), hardware)
    assert [gpu.index for gpu in chosen] == [6, 0, 2, 3]


@pytest.mark.parametrize("word", ["7", "-1", "GPU-nothere", "", "GPU-", "0x1"])
def test_a_gpu_that_is_not_there_lists_those_that_are(word: str) -> None:
    with pytest.raises(LabError, match="is not there") as caught:
        resolve_gpus((word,), hardware_of(PLAN_BOX))
    assert PLAN_BOX.uuid(6) in caught.value.why


def test_a_prefix_of_two_gpus_is_refused() -> None:
    hardware = hardware_of(PLAN_BOX)
    twins = tuple(replace(gpu, uuid=f"GPU-abc{gpu.index}") for gpu in hardware.gpus)
    with pytest.raises(LabError, match="could be any of 7"):
        resolve_gpus(("GPU-ab",), replace(hardware, gpus=twins))


def test_a_gpu_named_twice_is_refused() -> None:
    with pytest.raises(LabError, match="named twice"):
        resolve_gpus(("1", PLAN_BOX.uuid(1)), hardware_of(PLAN_BOX))


def test_naming_a_gpu_where_there_is_none() -> None:
    with pytest.raises(LabError, match="not there") as caught:
        resolve_gpus(("0",), hardware_of(NO_GPU))
    assert "no GPU that answers" in caught.value.why


def test_cpus_of_one_node() -> None:
    hardware = hardware_of(PLAN_BOX)
    assert check_one_node((32, 40, 96), (1,), hardware) == 1
    assert check_one_node((0, 64), (), hardware) == 0


@pytest.mark.parametrize(
    ("cpus", "mems", "words"),
    [
        ((31, 32), (), "lie on NUMA nodes 0, 1"),
        ((0, 1), (1,), "lie on NUMA nodes 0, 1"),
        ((0, 200), (0,), "CPUs 200 are not there"),
        ((0,), (2,), "memory nodes 2 are not there"),
        ((), (0,), "no CPUs"),
    ],
)
def test_cpus_across_nodes_are_refused(cpus: tuple[int, ...], mems: tuple[int, ...], words: str) -> None:
    with pytest.raises(LabError, match=words) as caught:
        check_one_node(cpus, mems, hardware_of(PLAN_BOX))
    assert "node 1 has CPUs 32-63,96-127" in caught.value.why
