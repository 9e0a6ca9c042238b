"""One moment of one GPU through NVML, as the cells of a row of gpu.csv. A GPU that does not answer gives a row that says
so; the next moment it is asked again.

What is asked how often follows from what it costs (H100, driver 580.159, CPU time of one call in a loop): 3 us for
utilisation, power, temperature, a clock, reasons; 12 us for memory, 11 us for processes, 16 us for NVLink counters;
170 us for each PCIe counter; 4 ms for the energy counter. nvmlDeviceGetPcieThroughput waits for 21 ms; it is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pynvml

from lab.hardware.nvml import Handle, ask, memory_mib

NVLINK_ALL = 0xFFFFFFFF  # as scope: the sum over all links
PCIE = (pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES)
NVLINK = (
    (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVLINK_ALL),
    (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, NVLINK_ALL),
)
NUMBER_CELLS = 13
TYPES = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: "usVal",
}


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What to ask at this moment besides the cheap numbers."""

    often: bool = False
    """Memory used, temperature, memory clock, processes, NVLink counters."""
    pcie: bool = False
    energy: bool = False


class GpuReader:
    """Reads one GPU again and again; found by its UUID, and looked for again after it stopped answering."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self._handle: Handle | None = None
        self._reasons: Callable[[Handle], object] = pynvml.nvmlDeviceGetCurrentClocksEventReasons

    def cells(self, wants: Wants) -> list[str]:
        """The row from the column `gpu` on."""
        try:
            if self._handle is None:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
                self._choose()
            numbers = self._numbers(self._handle, wants)
            who = self._processes(self._handle) if wants.often else ""
            return [self.uuid, *numbers, who, ""]
        except pynvml.NVMLError as error:
            self._handle = None
            return [self.uuid, *[""] * NUMBER_CELLS, "", str(error)]

    def _choose(self) -> None:
        """Drivers before R535 know the reasons under their older name only."""
        if ask(partial(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle)) is None:
            self._reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons

    def _numbers(self, handle: Handle, wants: Wants) -> list[str]:
        util = ask(partial(pynvml.nvmlDeviceGetUtilizationRates, handle))
        power_mw = ask(partial(pynvml.nvmlDeviceGetPowerUsage, handle))
        energy_mj = ask(partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)) if wants.energy else None
        used_mib = temperature_c = memory_clock_mhz = None
        if wants.often:
            used_mib = memory_mib(handle)[0]
            temperature_c = ask(partial(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU))
            memory_clock_mhz = ask(partial(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM))
        return [
            "" if util is None else str(util.gpu),
            "" if util is None else str(util.memory),
            _cell(used_mib),
            "" if power_mw is None else f"{power_mw / 1000:.3f}",
            "" if energy_mj is None else f"{energy_mj / 1000:.3f}",
            _cell(temperature_c),
            _cell(ask(partial(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM))),
            _cell(memory_clock_mhz),
            _cell(ask(partial(self._reasons, handle))),
            *_counters(handle, PCIE, ask_it=wants.pcie),
            *_counters(handle, NVLINK, ask_it=wants.often),
        ]

    def _processes(self, handle: Handle) -> str:
        """Process ids with blanks between; `-` for nobody, so that it differs from not asked."""
        found = ask(partial(pynvml.nvmlDeviceGetComputeRunningProcesses, handle))
        return "" if found is None else " ".join(str(process.pid) for process in found) or "-"


def _counters(handle: Handle, wanted: tuple[object, ...], *, ask_it: bool) -> list[str]:
    values = ask(partial(pynvml.nvmlDeviceGetFieldValues, handle, wanted)) if ask_it else None
    if values is None:
        return [""] * len(wanted)
    return [
        _cell(getattr(value.value, TYPES[value.valueType]))
        if value.nvmlReturn == pynvml.NVML_SUCCESS and value.valueType in TYPES
        else ""
        for value in values
    ]


def _cell(value: object) -> str:
    return "" if value is None else str(value)
