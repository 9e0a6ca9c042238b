"""The GPUs of this machine through NVML, with the links between them, as frozen data; those that do not answer are left
out, and said in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pynvml

from lab.hardware.model import Driver, Gpu, Link, MigDevice, PciePath
from lab.hardware.nvml import Handle, NvmlAbsentError, ask, session

T = TypeVar("T")

CPU_WORDS = 32  # of 64 CPUs each
NODE_WORDS = 16
PATHS: dict[int, PciePath] = {10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What NVML shows of a machine."""

    driver: Driver | None
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    notes: tuple[str, ...]


def read_gpus() -> Found:
    """All GPUs that answer, with the links between them; those that do not are in `notes`."""
    try:
        with session():
            return _read()
    except NvmlAbsentError as absent:
        return Found(driver=None, gpus=(), links=(), notes=(str(absent),))


def _read() -> Found:
    notes: list[str] = []
    driver = Driver(
        version=str(ask(pynvml.nvmlSystemGetDriverVersion)),
        cuda=_cuda(ask(pynvml.nvmlSystemGetCudaDriverVersion)),
    )
    handles: dict[int, Handle] = {}
    gpus: list[Gpu] = []
    count = int(pynvml.nvmlDeviceGetCount())
    if not count:
        notes.append(f"driver {driver.version} sees no GPU")
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(_gpu(handle, index))
            handles[index] = handle
        except pynvml.NVMLError as error:
            notes.append(f"GPU {index} is left out: the driver says {str(error)!r}")
    try:
        links = tuple(_links(handles, gpus))
    except pynvml.NVMLError as error:
        links = ()
        notes.append(f"the links between GPUs cannot be read: the driver says {str(error)!r}")
    return Found(driver=driver, gpus=tuple(gpus), links=links, notes=tuple(notes))


def _gpu(handle: Handle, index: int) -> Gpu:
    """One GPU. UUID, name and PCI address must be there, everything else may be missing."""
    missing: list[str] = []

    def may(what: str, call: Callable[[], T]) -> T | None:
        value = ask(call)
        if value is None:
            missing.append(what)
        return value

    def number(what: str, call: Callable[[], object]) -> int | None:
        value = may(what, call)
        return None if value is None else int(str(value))

    def watts(what: str, call: Callable[[], object]) -> float | None:
        milliwatts = number(what, call)
        return None if milliwatts is None else milliwatts / 1000

    memory = may("memory", partial(pynvml.nvmlDeviceGetMemoryInfo, handle))
    capability = may("compute capability", partial(pynvml.nvmlDeviceGetCudaComputeCapability, handle))
    mig = may("MIG mode", partial(pynvml.nvmlDeviceGetMigMode, handle))
    ecc = may("ECC mode", partial(pynvml.nvmlDeviceGetEccMode, handle))
    persistence = number("persistence mode", partial(pynvml.nvmlDeviceGetPersistenceMode, handle))
    limits = may("power range", partial(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle))
    sm, dram = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    return Gpu(
        index=index,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        pci_bus_id=_bus_id(pynvml.nvmlDeviceGetPciInfo(handle).busId),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        memory_mib=None if memory is None else int(memory.total) >> 20,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        numa_node=_numa_node(handle),
        cpus=_near_cpus(handle),
        mig=None if mig is None else bool(mig[0]),
        mig_devices=tuple(_mig_devices(handle)) if mig and mig[0] else (),
        ecc=None if ecc is None else bool(ecc[0]),
        persistence=None if persistence is None else bool(persistence),
        power_limit_w=watts("power limit", partial(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        power_default_w=watts(
            "power default", partial(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        ),
        power_min_w=None if limits is None else int(limits[0]) / 1000,
        power_max_w=None if limits is None else int(limits[1]) / 1000,
        sm_clock_max_mhz=number("highest SM clock", partial(pynvml.nvmlDeviceGetMaxClockInfo, handle, sm)),
        memory_clock_max_mhz=number(
            "highest memory clock", partial(pynvml.nvmlDeviceGetMaxClockInfo, handle, dram)
        ),
        sm_clock_set_mhz=number("set SM clock", partial(pynvml.nvmlDeviceGetApplicationsClock, handle, sm)),
        memory_clock_set_mhz=number(
            "set memory clock", partial(pynvml.nvmlDeviceGetApplicationsClock, handle, dram)
        ),
        nvlinks=sum(1 for _ in _active_links(handle)),
        unanswered=tuple(missing),
    )


def _numa_node(handle: Handle) -> int | None:
    """The one NUMA node whose memory is nearest. nvmlDeviceGetNumaNodeId is something else: the node that a GPU
    *is*, on machines where GPU memory is a NUMA node."""
    scope = pynvml.NVML_AFFINITY_SCOPE_NODE
    words = ask(partial(pynvml.nvmlDeviceGetMemoryAffinity, handle, NODE_WORDS, scope))
    nodes = _bits(words)
    return nodes[0] if len(nodes) == 1 else None


def _near_cpus(handle: Handle) -> tuple[int, ...]:
    scope = pynvml.NVML_AFFINITY_SCOPE_NODE
    words = ask(partial(pynvml.nvmlDeviceGetCpuAffinityWithinScope, handle, CPU_WORDS, scope))
    if words is None:
        words = ask(partial(pynvml.nvmlDeviceGetCpuAffinity, handle, CPU_WORDS))
    return _bits(words)


def _bits(words: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(64 * i + b for i, word in enumerate(words or ()) for b in range(64) if word >> b & 1)


def _mig_devices(handle: Handle) -> Iterator[MigDevice]:
    for index in range(int(ask(partial(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)) or 0)):
        device = ask(partial(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index))
        if device is not None:
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            yield MigDevice(uuid=str(pynvml.nvmlDeviceGetUUID(device)), memory_mib=int(memory.total) >> 20)


def _active_links(handle: Handle) -> Iterator[int]:
    for number in range(pynvml.NVML_NVLINK_MAX_LINKS):
        active = ask(partial(pynvml.nvmlDeviceGetNvLinkState, handle, number))
        if active is None:  # no such link, nor any after it
            return
        if active:
            yield number


def _links(handles: dict[int, Handle], gpus: Sequence[Gpu]) -> Iterator[Link]:
    direct, switched = _nvlinks(handles, gpus)
    for index, a in enumerate(gpus):
        for b in gpus[index + 1 :]:
            one, two = handles[a.index], handles[b.index]
            level = ask(partial(pynvml.nvmlDeviceGetTopologyCommonAncestor, one, two))
            own = max(direct.get((a.index, b.index), 0), direct.get((b.index, a.index), 0))
            shared = min(switched[a.index], switched[b.index])
            yield Link(
                a=a.index,
                b=b.index,
                path="UNKNOWN" if level is None else PATHS.get(level, "UNKNOWN"),
                nvlinks=own or shared,
                switched=not own and shared > 0,
            )


def _nvlinks(
    handles: dict[int, Handle], gpus: Sequence[Gpu]
) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """NVLinks from one GPU straight to another, by pair of indexes; and NVLinks to switches, by index."""
    at_bus = {gpu.pci_bus_id: gpu.index for gpu in gpus}
    direct: dict[tuple[int, int], int] = {}
    switched = dict.fromkeys(handles, 0)
    for index, handle in handles.items():
        for link in _active_links(handle):
            remote = ask(partial(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link))
            kind = ask(partial(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link))
            other = at_bus.get(_bus_id(remote.busId)) if remote is not None else None
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switched[index] += 1
            elif other is not None:
                direct[index, other] = direct.get((index, other), 0) + 1
    return direct, switched


def _bus_id(raw: object) -> str:
    """NVML's 00000000:07:00.0 as /sys writes it, 0000:07:00.0."""
    text = raw.decode() if isinstance(raw, bytes) else str(raw)
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def _cuda(number: int | None) -> str:
    """12050 is CUDA 12.5."""
    return "unknown" if number is None else f"{number // 1000}.{number % 1000 // 10}"
