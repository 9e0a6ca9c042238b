"""The telemetry sampler, a process of its own: `python -m lab.telemetry.sampler --out gpu.csv --gpus UUID,UUID`.

It writes one row a GPU ten times a second until it gets SIGTERM or SIGINT, or its parent is gone, then one last row with
everything, and prints one JSON line about itself (rows, moments missed, CPU time). Numbers that are slow to get are
asked for less often: see `Rota`."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TextIO

from lab.hardware.nvml import NvmlAbsentError, session
from lab.hardware.sysfs import parse_list
from lab.telemetry.gpucsv import COLUMNS
from lab.telemetry.reader import GpuReader, Wants

HZ = 10.0
OFTEN_S = 1.0
PCIE_S = 10.0
RARELY_S = 60.0  # energy; between two readings power tells how it was spread
TWICE_S = 0.025  # between two readings of the PCIe counters, which wrap at 2^32 bytes
EVERYTHING = Wants(often=True, pcie=True, energy=True)


class Rota:
    """Says at each moment what is due besides the cheap numbers; everything is at the first."""

    def __init__(self) -> None:
        self._often_s = self._pcie_s = self._rarely_s = 0.0

    def due(self, now_s: float) -> Wants:
        """What to ask at `now_s` since the start."""
        often, pcie = now_s >= self._often_s, now_s >= self._pcie_s
        rarely = now_s >= self._rarely_s
        self._often_s = now_s + OFTEN_S if often else self._often_s
        self._pcie_s = now_s + PCIE_S if pcie else self._pcie_s
        self._rarely_s = now_s + RARELY_S if rarely else self._rarely_s
        return Wants(often=often, pcie=pcie, energy=rarely)


def main(words: Sequence[str] | None = None) -> int:
    """0 after a signal or when the parent is gone; 1 when NVML does not start, with the reason on stderr."""
    asked = _parse(words)
    _pin(asked.cpus)
    stop = Event()

    def ended(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ended)
    with Path(asked.out).open("x", encoding="utf-8") as out:
        out.write(",".join(COLUMNS) + "\n")
        out.flush()
        try:
            with session():
                summary = sample(asked.gpus.split(","), out, hz=asked.hz, stop=stop)
        except NvmlAbsentError as absent:
            print(f"no telemetry: {absent}", file=sys.stderr)
            return 1
    print(json.dumps(summary))
    return 0


def sample(gpus: Sequence[str], out: TextIO, *, hz: float, stop: Event) -> dict[str, float]:
    """Rows into `out` until `stop` is set or the parent is gone; NVML must be started. Returns the summary.

    Moments are multiples of 1/hz from the start. One that cannot be kept is missed, not made up for: two rows at
    once would say nothing, and a burst would disturb what is measured.
    """
    gc.set_threshold(100_000)  # nothing here makes cycles to look for
    readers = [GpuReader(gpu) for gpu in gpus]
    parent = os.getppid()
    start, cpu_start = time.monotonic(), time.process_time()
    period, moment, missed, rows = 1 / hz, 0, 0, 0
    rota = Rota()
    while not stop.is_set() and os.getppid() == parent:
        wants = rota.due(time.monotonic() - start)
        rows += _write(readers, out, wants)
        if wants.pcie:
            stop.wait(min(TWICE_S, period / 4))
            rows += _write(readers, out, Wants(pcie=True))
        due = int((time.monotonic() - start) / period) + 1
        missed += due - moment - 1
        moment = due
        stop.wait(max(0.0, start + moment * period - time.monotonic()))
    rows += _write(readers, out, EVERYTHING)
    seconds = time.monotonic() - start
    cpu_s = time.process_time() - cpu_start
    return {
        "rows": rows,
        "missed": missed,
        "seconds": round(seconds, 3),
        "cpu_s": round(cpu_s, 4),
        "core_pct": round(100 * cpu_s / max(seconds, period), 3),
    }


def _write(readers: Sequence[GpuReader], out: TextIO, wants: Wants) -> int:
    """One row a GPU, handed to the system at once; returns how many."""
    rows = []
    for reader in readers:
        times = f"{time.time():.6f},{time.monotonic():.6f}"
        rows.append(f"{times},{','.join(cell.replace(',', ';') for cell in reader.cells(wants))}\n")
    out.write("".join(rows))
    out.flush()
    return len(rows)


def _pin(cpus: str) -> None:
    """Onto the CPUs given, where the system allows it; the numbers are worth more than the pinning."""
    if cpus:
        try:
            os.sched_setaffinity(0, parse_list(cpus))
        except (OSError, ValueError) as error:
            print(f"not pinned to CPUs {cpus}: {error}", file=sys.stderr)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.telemetry.sampler", allow_abbrev=False)
    parser.add_argument("--out", required=True, help="the CSV to write; it must not exist")
    parser.add_argument("--gpus", required=True, help="UUIDs, with commas between")
    parser.add_argument("--hz", type=float, default=HZ, help="moments a second")
    parser.add_argument("--cpus", default="", help="run on these CPUs, such as 31,95")
    asked = parser.parse_args(words)
    if not 0.01 <= asked.hz <= 100:
        parser.error("--hz must be between 0.01 and 100")
    return asked


if __name__ == "__main__":
    sys.exit(main())
