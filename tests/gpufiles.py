"""GPUs for runs made by tests: samples as the sampler writes them, and a whole fake run whose servers had GPUs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from fakerun import START, make_run
from nvmlstandin import PLAN_BOX, hardware_of

from lab.hardware.model import to_json as hardware_json
from lab.plan import read_plan
from lab.plan import to_json as plan_json
from lab.rundir import Run, write_text
from lab.telemetry.gpucsv import COLUMNS, Sample

PID = 4711
Change = Callable[[Sample], "Sample | None"]


def steady(
    gpus: Sequence[str], *, start_s: float, end_s: float, hz: float = 10.0, power_w: float = 300.0
) -> list[Sample]:
    """Busy GPUs as they are when all is well: 300 W, 1,410 MHz, our process."""
    return [
        Sample(
            time_s=start_s + i / hz,
            monotonic_s=1000 + i / hz,
            gpu=gpu,
            sm_util_pct=97,
            memory_util_pct=40,
            power_w=power_w,
            sm_clock_mhz=1410,
            clock_reasons=0,
            memory_used_mib=70_000 if i % 10 == 0 else None,
            temperature_c=60 if i % 10 == 0 else None,
            processes=(PID,) if i % 10 == 0 else None,
        )
        for i in range(int((end_s - start_s) * hz) + 1)
        for gpu in gpus
    ]


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """gpu.csv as the sampler writes it."""

    def cell(value: object) -> str:
        if isinstance(value, tuple):
            return " ".join(map(str, value)) or "-"
        return "" if value is None else str(value)

    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([cell(getattr(s, f.name)) for f in fields(Sample)] for s in samples)


def give_gpus(run: Run, *, indexes: Sequence[int] = (0, 1), changes: dict[str, Change] | None = None) -> None:
    """Turn a fake run into one whose servers had GPUs of the plan's box; `changes` spoils the samples of a trial
    by its name (None leaves a sample out)."""
    gpus = tuple(PLAN_BOX.uuid(index) for index in indexes)
    plan = read_plan(run)
    trials = tuple(
        replace(trial, server=replace(trial.server, gpus=gpus), placed="on purpose") for trial in plan.trials
    )
    run.plan.chmod(0o644)
    run.plan.write_text(plan_json(replace(plan, trials=trials)))
    write_text(run.hardware, hardware_json(hardware_of(PLAN_BOX)))
    for trial in trials:
        files = run.trial(trial.name)
        status = json.loads(files.status.read_text()) | {"gpu_pids": [PID], "gpus_left": ""}
        files.status.chmod(0o644)
        files.status.write_text(json.dumps(status))
        began = START + 100 * trial.index
        change: Change = (changes or {}).get(trial.name, lambda sample: sample)
        changed = (change(sample) for sample in steady(gpus, start_s=began, end_s=began + 90))
        write_samples(files.gpus, (sample for sample in changed if sample is not None))


def gpu_run(root: Path, *, indexes: Sequence[int] = (0, 1), changes: dict[str, Change] | None = None) -> Run:
    """A whole fake run with GPUs: four trials of two variants, loads of 15 s."""
    run = make_run(root)
    give_gpus(run, indexes=indexes, changes=changes)
    return run
