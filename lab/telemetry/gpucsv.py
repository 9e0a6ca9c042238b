"""gpu.csv, which the sampler writes: its columns, a reader that keeps what is whole, and what the samples say against a
trial: gaps, slowed clocks, GPUs that stopped answering, processes that are not ours.

One row is one GPU at one moment. An empty cell means that the GPU does not offer the number or was not asked at that
moment: utilisation, power, SM clock and reasons are asked for at each; memory, temperature, memory clock, processes and
NVLink once a second; PCIe in two rows 25 ms apart every ten seconds; energy every minute; everything at start and end.
Counters count from some moment in the past: use differences."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

from lab.errors import LabError

GAP_S = 3.0
TWICE_S = 0.05

THROTTLES = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of `clock_reasons` that mean slower than asked for, by nvmlClocksEventReasons in nvml.h. Not among them: idle
(0x1), application clocks (0x2) and display clocks (0x100), which are how somebody set the GPU."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One GPU at one moment; `time_s` is Unix time of the machine, which the server's log uses too."""

    time_s: float
    monotonic_s: float
    """A clock that nobody sets, for gaps."""
    gpu: str
    sm_util_pct: int | None = None
    memory_util_pct: int | None = None
    memory_used_mib: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    clock_reasons: int | None = None
    pcie_tx_bytes: int | None = None
    """Wraps at 2^32, several times a second under load: use `pcie_mib_per_s`."""
    pcie_rx_bytes: int | None = None
    nvlink_tx_kib: int | None = None
    nvlink_rx_kib: int | None = None
    processes: tuple[int, ...] | None = None
    problem: str = ""
    """What the driver said instead of numbers, such as `GPU is lost`."""


COLUMNS = tuple(field.name for field in fields(Sample))
FLOATS = frozenset({"time_s", "monotonic_s", "power_w", "energy_j"})


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch without samples of a GPU, in Unix time."""

    gpu: str
    start_s: float
    end_s: float


def read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    """All samples in order, and a sentence for each line that is not one: a killed sampler leaves its last line cut.

    LabError when the file cannot be opened or has other columns.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if tuple(header) != COLUMNS:
                raise LabError(
                    f"{path.name} has other columns than this lab writes",
                    why=f"it begins with {','.join(header)[:80]!r}",
                    fix="read it with the lab that wrote it",
                )
            for number, row in enumerate(rows, start=2):
                try:
                    samples.append(_sample(row))
                except ValueError as error:
                    problems.append(f"line {number} is left out: {error}")
    except (OSError, csv.Error) as error:
        raise LabError(f"cannot read {path}", why=str(error), fix="check that the run is complete") from error
    return samples, problems


def gaps(
    samples: Sequence[Sample],
    gpus: Iterable[str],
    *,
    start_s: float,
    end_s: float,
    longest_s: float = GAP_S,
) -> tuple[Gap, ...]:
    """Stretches longer than `longest_s` between `start_s` and `end_s` (Unix time) in which a GPU was not sampled.

    A row that holds only a problem is a sample: the sampler was there. Two rows are as far apart as the clock that
    nobody sets says.
    """
    found: list[Gap] = []
    for gpu in gpus:
        own = [s for s in samples if s.gpu == gpu and start_s <= s.time_s <= end_s]
        if not own:
            found += [Gap(gpu=gpu, start_s=start_s, end_s=end_s)] if end_s - start_s > longest_s else []
            continue
        edges = ((start_s, own[0].time_s), (own[-1].time_s, end_s))
        found += [Gap(gpu=gpu, start_s=a, end_s=b) for a, b in edges if b - a > longest_s]
        found += [
            Gap(gpu=gpu, start_s=one.time_s, end_s=two.time_s)
            for one, two in pairwise(own)
            if two.monotonic_s - one.monotonic_s > longest_s
        ]
    return tuple(sorted(found, key=lambda gap: (gap.start_s, gap.gpu)))


def pcie_mib_per_s(samples: Sequence[Sample], gpu: str) -> tuple[tuple[float, float, float], ...]:
    """(Unix time, MiB/s sent, MiB/s received by the GPU) for each two neighbouring rows, at most `TWICE_S` apart, that
    both have the counters. So short, counters of 2^32 bytes wrap at most once up to 85 GB/s, more than a slot has."""
    own = [sample for sample in samples if sample.gpu == gpu]
    found: list[tuple[float, float, float]] = []
    for one, two in pairwise(own):
        counters = (one.pcie_tx_bytes, two.pcie_tx_bytes, one.pcie_rx_bytes, two.pcie_rx_bytes)
        seconds = two.monotonic_s - one.monotonic_s
        if None in counters or not 0 < seconds <= TWICE_S:
            continue
        sent, received = (((b or 0) - (a or 0)) % 2**32 for a, b in (counters[:2], counters[2:]))
        found.append((two.time_s, sent / seconds / 2**20, received / seconds / 2**20))
    return tuple(found)


def throttle_names(clock_reasons: int) -> tuple[str, ...]:
    """Why the clocks were below what was asked for; empty when they were not."""
    return tuple(name for bit, name in THROTTLES.items() if clock_reasons & bit)


def strangers(samples: Iterable[Sample], *, ours: frozenset[int]) -> dict[str, frozenset[int]]:
    """Processes that used a GPU and are not among `ours`, by GPU."""
    found: dict[str, frozenset[int]] = {}
    for sample in samples:
        foreign = frozenset(sample.processes or ()) - ours
        if foreign:
            found[sample.gpu] = found.get(sample.gpu, frozenset()) | foreign
    return found


def _sample(row: Sequence[str]) -> Sample:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} cells, {len(COLUMNS)} columns")
    cells = dict(zip(COLUMNS, row, strict=True))
    values: dict[str, object] = {"gpu": cells.pop("gpu"), "problem": cells.pop("problem")}
    processes = cells.pop("processes")
    if processes:
        values["processes"] = tuple(int(pid) for pid in processes.split() if pid != "-")
    for name, cell in cells.items():
        if cell:
            values[name] = float(cell) if name in FLOATS else int(cell)
    if "time_s" not in values or "monotonic_s" not in values:
        raise ValueError("no time")
    return Sample(**values)  # type: ignore[arg-type]  # every cell was read as its column's type just above
