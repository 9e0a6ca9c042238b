"""The report's section on GPUs: the machine as a link matrix with the variants in their seats, and power, energy and energy
per output token of each variant and load. In go machine, plan and tables; out comes what the template prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lab.experiment import Experiment
from lab.gpurows import machine_of
from lab.hardware.fabric import Fabric, fabric_of
from lab.hardware.model import Hardware
from lab.hardware.topo import LEGEND
from lab.metrics import Metric
from lab.plan import Plan, Trial
from lab.report.gpuplots import draw_gpus
from lab.report.numbers import Number, number
from lab.rundir import Run

METRICS = (
    Metric(
        column="power_w",
        unit="W",
        means="mean power over the load, of all GPUs of the variant together",
        decimals=1,
    ),
    Metric(
        column="energy_j",
        unit="J",
        means="their energy over the load: power times time, by trapezoids between samples",
        decimals=1,
    ),
    Metric(
        column="j_per_output_token",
        unit="J/token",
        means="that energy over the output tokens of the load; prompt tokens are not counted apart",
        decimals=3,
    ),
    Metric(column="sm_clock_mhz", unit="MHz", means="mean SM clock over the load", decimals=0),
    Metric(
        column="memory_used_mib",
        unit="MiB",
        means="the most memory in use on one GPU, without what the driver reserves",
        decimals=0,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The machine as rows of cells, the first of them the heading; ways inside a variant's group are in bold."""

    rows: tuple[tuple[str, ...], ...]
    legend: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GpuSection:
    """What the template prints of the GPUs; `pictures` are file names with captions."""

    used: str
    matrix: Matrix | None
    numbers: tuple[Number, ...]
    pictures: tuple[tuple[str, str], ...]
    metrics: tuple[Metric, ...] = METRICS


def gpu_section(
    run: Run, plan: Plan, experiment: Experiment, tables: Mapping[str, pd.DataFrame]
) -> GpuSection | None:
    """The section, its pictures drawn; None for a run whose servers had no GPU."""
    used = {gpu for trial in plan.trials for gpu in trial.server.gpus}
    if not used:
        return None
    machine = machine_of(run)
    names = {gpu.uuid: f"GPU {gpu.index}" for gpu in machine.gpus} if machine else {}
    return GpuSection(
        used=_used(used, machine),
        matrix=matrix(machine, plan.trials) if machine else None,
        numbers=tuple(_numbers(experiment, tables)),
        pictures=draw_gpus(run, plan, tables, names=names),
    )


def _used(used: set[str], machine: Hardware | None) -> str:
    """The GPUs that the run's servers had, in words."""
    count = f"{len(used)} GPU{'s' * (len(used) != 1)}"
    if machine is None:
        return count
    names = sorted({gpu.name for gpu in machine.gpus if gpu.uuid in used})
    return f"{count} ({', '.join(names) or 'not in hardware.json'})"


def matrix(machine: Hardware, trials: Sequence[Trial]) -> Matrix:
    """Every GPU of the machine, its way to each other one, its NUMA node, and who sat there (by rank)."""
    fabric = fabric_of(machine)
    seats: dict[str, list[str]] = {}
    together: set[frozenset[str]] = set()
    for trial in {trial.variant: trial for trial in reversed(trials)}.values():
        for rank, gpu in enumerate(trial.server.gpus):
            of = f" (rank {rank})" if len(trial.server.gpus) > 1 else ""
            seats.setdefault(gpu, []).append(f"{trial.variant}{of}")
            together |= {frozenset((gpu, other)) for other in trial.server.gpus if other != gpu}
    rows = [("GPU", "name", *(str(gpu.index) for gpu in machine.gpus), "NUMA node", "who sat there")]
    seen: set[str] = set()
    for card in machine.gpus:
        cells = []
        for other in machine.gpus:
            label = _label(fabric, card.index, other.index)
            seen.add(label.rstrip("0123456789"))
            cells.append(f"**{label}**" if frozenset((card.uuid, other.uuid)) in together else label)
        node = "?" if card.numa_node is None else str(card.numa_node)
        who = ", ".join(sorted(seats.get(card.uuid, ()))) or "nobody"
        rows.append((str(card.index), card.name, *cells, node, who))
    legend = tuple(" ".join(text.split()) for key, text in LEGEND.items() if key in seen)
    return Matrix(rows=tuple(rows), legend=legend)


def _label(fabric: Fabric, a: int, b: int) -> str:
    link = fabric.links.get((a, b))
    return "X" if a == b else "UNKNOWN" if link is None else link.label


def by_trial(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a usable trial and load: its GPUs together. A sum is missing when one of its parts is."""
    table = tables["gpus"]
    usable = tables["trials"].loc[tables["trials"]["validity"] == "valid", "trial"]
    rows = table[table["trial"].isin(usable)]
    columns = ["power_w", "energy_j", "sm_clock_mhz", "memory_used_mib", "output_tokens"]
    rows = rows.assign(**{column: pd.to_numeric(rows[column], errors="coerce") for column in columns})
    groups = rows.groupby(["trial", "variant", "load"], sort=False)
    found = pd.DataFrame(
        {
            "power_w": groups["power_w"].apply(lambda part: part.sum(skipna=False)),
            "energy_j": groups["energy_j"].apply(lambda part: part.sum(skipna=False)),
            "sm_clock_mhz": groups["sm_clock_mhz"].mean(),
            "memory_used_mib": groups["memory_used_mib"].max(),
            "output_tokens": groups["output_tokens"].first(),
        }
    ).reset_index()
    tokens = found["output_tokens"].where(found["output_tokens"] > 0)
    found["j_per_output_token"] = found["energy_j"] / tokens
    return found


def _numbers(experiment: Experiment, tables: Mapping[str, pd.DataFrame]) -> list[Number]:
    """Power and energy over the repeats, for every load that is measured."""
    if "gpus" not in tables:
        return []
    trials = by_trial(tables)
    found = []
    for load in experiment.loads:
        if load.role != "measure":
            continue
        for variant in experiment.variants:
            own = trials[(trials["load"] == load.name) & (trials["variant"] == variant.name)]
            for metric in METRICS:
                values = [float(value) for value in own[metric.column].dropna()]
                if values:
                    found.append(
                        number(values, metric, load=load.name, variant=variant.name, what=metric.column)
                    )
    return found
