"""Rows on the GPUs themselves: do they answer, does the driver run the stacks, who uses them, are they set and cooled so that
numbers can be believed. In go what NVML said; out come rows. Nothing for a machine without NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab.doctor.finding import Finding, finding, text_of
from lab.hardware.model import Gpu, Hardware
from lab.hardware.nvml import NvmlAbsentError, Use, busy, session
from lab.stack import Stack, driver_runs
from lab.telemetry.gpucsv import COLUMNS, throttle_names
from lab.telemetry.reader import GpuReader, Wants

NVIDIA = "0x10de"
DISPLAY_CLASS = "0x03"
ENOUGH_FREE = 0.9
REASONS_CELL = COLUMNS.index("clock_reasons") - COLUMNS.index("gpu")


def present(hardware: Hardware, *, root: Path) -> list[Finding]:
    """Which GPUs answer, and which are there and do not."""
    on_bus = len(list(_on_bus(root)))
    version = hardware.driver.version if hardware.driver else ""
    silent = [note for note in hardware.notes if note.startswith("GPU ") and "left out" in note]
    if hardware.gpus:
        rows = [
            finding(
                "NVIDIA GPUs",
                good=True,
                state=f"{len(hardware.gpus)}, driver {version}",
                matters="invoke topo shows them",
            )
        ]
        return rows + [_silent(note) for note in silent]
    if not on_bus and not silent:
        return [
            finding("NVIDIA GPUs", good=True, state="none", matters="claims that need one come out untested")
        ]
    why = next(iter(hardware.notes), "the driver does not say why")
    return [
        finding(
            "NVIDIA GPUs",
            good=False,
            state=f"{on_bus or len(silent)} in the machine, none answers: {why}",
            matters="experiments run on the CPU until they do",
            fix="nvidia-smi and sudo dmesg | grep -i nvrm say more; install or reload NVIDIA's driver",
        )
    ]


def _silent(note: str) -> Finding:
    return finding(
        note.partition(" is left out")[0],
        good=False,
        state=note.partition(": ")[2],
        matters="a GPU that fell off the bus may take its neighbours along",
        fix="sudo dmesg | grep -i xid, then reset it (sudo nvidia-smi --gpu-reset) or restart the machine",
    )


def _on_bus(root: Path) -> Iterator[Path]:
    """PCI devices of NVIDIA that are display or 3D controllers."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        kind = text_of(vendor.with_name("class")) or ""
        if (text_of(vendor) or "").strip() == NVIDIA and kind.startswith(DISPLAY_CLASS):
            yield vendor.parent


def driver(hardware: Hardware, *, stacks: Sequence[Stack]) -> Iterator[Finding]:
    """The driver against every stack with CUDA, in one row."""
    if hardware.driver is None:
        return
    version = hardware.driver.version
    cuda = [stack for stack in stacks if stack.device == "cuda"]
    runs = [stack.name for stack in cuda if driver_runs(stack, driver=version)]
    too_old = [f"{stack.name} (needs {stack.needs.driver})" for stack in cuda if stack.name not in runs]
    words = [f"runs {', '.join(runs)}"] if runs else []
    words += [f"too old for {', '.join(too_old)}"] if too_old else []
    yield finding(
        "driver against stacks",
        good=bool(runs),
        state=f"{version} {'; '.join(words)}",
        matters=f"CUDA {hardware.driver.cuda} is the newest that this driver runs",
        fix="update NVIDIA's driver; until then experiments run on the CPU",
    )


def in_use(hardware: Hardware, uses: Sequence[Use]) -> Iterator[Finding]:
    """GPUs that somebody uses, and how much memory is free on each."""
    if not uses:
        return
    index = {gpu.uuid: gpu.index for gpu in hardware.gpus}
    used = busy(uses)
    words = "; ".join(f"GPU {index[uuid]}: {what}" for uuid, what in used.items())
    yield finding(
        "GPUs in use",
        good=not used,
        state=words or f"none of {len(uses)}",
        matters="the lab leaves them alone, and waits at most a minute for those it was told to use",
        fix="nvidia-smi shows who; end them, wait, or name others with --gpus",
    )
    total = {gpu.uuid: gpu.memory_mib for gpu in hardware.gpus}
    short = [use for use in uses if (use.free_mib or 0) < ENOUGH_FREE * (total[use.uuid] or 0)]
    yield finding(
        "free GPU memory",
        good=not short,
        state="; ".join(_free(uses, index)),
        matters="a server takes its share of what is free when it starts",
        fix=f"end what holds it on GPU {', '.join(str(index[use.uuid]) for use in short)}: nvidia-smi",
    )


def _free(uses: Sequence[Use], index: Mapping[str, int]) -> Iterator[str]:
    """GPUs with the same free memory, to the GiB, said together."""
    groups: dict[str, list[int]] = {}
    for use in uses:
        words = "not known" if use.free_mib is None else f"{use.free_mib / 1024:.0f} GiB"
        groups.setdefault(words, []).append(index[use.uuid])
    for words, gpus in groups.items():
        yield f"{words} on GPU {', '.join(map(str, gpus))}" if len(groups) > 1 else f"{words} on each"


def reasons_now(gpus: Sequence[Gpu]) -> dict[str, tuple[str, ...]]:
    """By UUID what slows a GPU's clocks at this moment; empty where NVML does not start."""
    try:
        with session():
            cells = {gpu.uuid: GpuReader(gpu.uuid).cells(Wants())[REASONS_CELL] for gpu in gpus}
    except NvmlAbsentError:
        return {}
    return {uuid: throttle_names(int(cell)) for uuid, cell in cells.items() if cell}


def settings(hardware: Hardware, *, slowed: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    """Clocks, power limits and persistence mode; `slowed` is what slows each GPU now."""
    if not hardware.gpus:
        return
    faults = [*_slowed(hardware, slowed), *_limited(hardware), *_unlike(hardware)]
    kinds = dict.fromkeys(
        f"{gpu.name}: {gpu.sm_clock_set_mhz or '?'} of {gpu.sm_clock_max_mhz or '?'} MHz, "
        f"{'?' if gpu.power_limit_w is None else f'{gpu.power_limit_w:.0f}'} W"
        for gpu in hardware.gpus
    )
    yield finding(
        "clocks and power limits",
        good=not faults,
        state="; ".join(fault for fault, _ in faults) or "; ".join(kinds),
        matters="GPUs of a kind must run alike to be compared; clocks locked by nvidia-smi -lgc do not show here",
        fix="; ".join(dict.fromkeys(fix for _, fix in faults)),
    )
    off = [gpu.index for gpu in hardware.gpus if gpu.persistence is False]
    if any(gpu.persistence is not None for gpu in hardware.gpus):
        yield finding(
            "persistence mode",
            good=not off,
            state=f"off on GPU {', '.join(map(str, off))}" if off else "on",
            matters="without it the driver sets a GPU up anew for each first user, and forgets its settings",
            fix="sudo nvidia-smi -pm 1",
        )


Fault = tuple[str, str]


def _slowed(hardware: Hardware, slowed: Mapping[str, tuple[str, ...]]) -> Iterator[Fault]:
    for gpu in hardware.gpus:
        if slowed.get(gpu.uuid):
            words = ", ".join(slowed[gpu.uuid])
            yield f"GPU {gpu.index} is slowed now: {words}", "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"


def _limited(hardware: Hardware) -> Iterator[Fault]:
    for gpu in hardware.gpus:
        limit, made = gpu.power_limit_w, gpu.power_default_w
        if limit is not None and made is not None and limit < made:
            yield (
                f"GPU {gpu.index} is limited to {limit:.0f} of {made:.0f} W",
                f"sudo nvidia-smi -i {gpu.index} -pl {made:.0f}",
            )


def _unlike(hardware: Hardware) -> Iterator[Fault]:
    """GPUs of one kind whose clocks are set differently."""
    for name in dict.fromkeys(gpu.name for gpu in hardware.gpus):
        clocks: dict[int, list[str]] = {}
        for gpu in hardware.gpus:
            if gpu.name == name and gpu.sm_clock_set_mhz:
                clocks.setdefault(gpu.sm_clock_set_mhz, []).append(str(gpu.index))
        if len(clocks) > 1:
            parts = (f"{mhz} MHz on GPU {', '.join(gpus)}" for mhz, gpus in sorted(clocks.items()))
            yield f"{name} is set to {' and '.join(parts)}", "sudo nvidia-smi -rac sets them back"
