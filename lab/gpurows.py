"""What gpu.csv says of a trial: rows of the table `gpus` (one a load and GPU), and the checks whether its numbers may be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from lab.plan import Trial
from lab.rundir import TrialFiles
from lab.telemetry.gpucsv import Sample, gaps, read_samples, strangers, throttle_names
from lab.validity import Check

Row = dict[str, object]
Windows = Mapping[str, tuple[float, float]]

COLUMNS = (
    *("trial", "variant", "repeat", "load", "gpu", "samples"),
    *("sm_util_pct", "memory_util_pct", "memory_used_mib", "power_w", "temperature_c", "sm_clock_mhz"),
    *("energy_j", "output_tokens", "j_per_output_token"),
)


def read_gpus(
    trial: Trial,
    files: TrialFiles,
    status: Mapping[str, object],
    *,
    windows: Windows,
    tokens: Mapping[str, float],
) -> tuple[list[Row], list[Check], list[str]]:
    """Rows, checks and what could not be read. `windows` are the loads in Unix time, `tokens` their output tokens.

    Nothing at all for a trial without GPUs.
    """
    gpus = trial.server.gpus
    if not gpus:
        return [], [], []
    if not files.gpus.is_file():
        return [], [Check(name="GPUs were watched", ok=False, detail="there is no gpu.csv")], []
    samples, problems = read_samples(files.gpus)
    rows = [
        _row(
            trial, load, gpu, [s for s in samples if s.gpu == gpu and start <= s.time_s <= end], tokens[load]
        )
        for load, (start, end) in windows.items()
        for gpu in gpus
    ]
    start = min(window[0] for window in windows.values())
    end = max(window[1] for window in windows.values())
    inside = [sample for sample in samples if start <= sample.time_s <= end]
    pids = status.get("gpu_pids")
    ours = frozenset(int(str(pid)) for pid in pids) if isinstance(pids, list) else frozenset()
    checks = [
        _watched(samples, gpus, start_s=start, end_s=end),
        _answered(inside),
        _not_slowed(inside),
        _alone(inside, ours=ours),
    ]
    return rows, checks, problems


def _row(trial: Trial, load: str, gpu: str, own: Sequence[Sample], tokens: float) -> Row:
    energy = energy_j(own)
    return {
        "trial": trial.name,
        "variant": trial.variant,
        "repeat": trial.repeat,
        "load": load,
        "gpu": gpu,
        "samples": len(own),
        "sm_util_pct": _mean([s.sm_util_pct for s in own]),
        "memory_util_pct": _mean([s.memory_util_pct for s in own]),
        "memory_used_mib": max(
            (s.memory_used_mib for s in own if s.memory_used_mib is not None), default=None
        ),
        "power_w": _mean([s.power_w for s in own]),
        "temperature_c": max((s.temperature_c for s in own if s.temperature_c is not None), default=None),
        "sm_clock_mhz": _mean([s.sm_clock_mhz for s in own]),
        "energy_j": energy,
        "output_tokens": tokens,
        "j_per_output_token": energy / tokens if energy is not None and tokens > 0 else None,
    }


def energy_j(samples: Sequence[Sample]) -> float | None:
    """Energy of one GPU over its samples in joules: power times time, by trapezoids. None with fewer than two."""
    known = [(s.monotonic_s, s.power_w) for s in samples if s.power_w is not None]
    if len(known) < 2:
        return None
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(known))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _watched(samples: Sequence[Sample], gpus: Sequence[str], *, start_s: float, end_s: float) -> Check:
    found = gaps(samples, gpus, start_s=start_s, end_s=end_s)
    detail = f"{len(samples)} samples of {len(gpus)} GPUs, none more than 3 s apart"
    if found:
        longest = max(found, key=lambda gap: gap.end_s - gap.start_s)
        detail = f"{len(found)} gaps, the longest of {longest.end_s - longest.start_s:.1f} s on {longest.gpu}"
    return Check(name="GPUs were watched", ok=not found, detail=detail)


def _answered(samples: Sequence[Sample]) -> Check:
    problems = sorted({f"{s.gpu}: {s.problem}" for s in samples if s.problem})
    return Check(
        name="GPUs answered",
        ok=not problems,
        detail="; ".join(problems)[:300] or "all along, without an error",
    )


# A large GPU under a heavy matrix product runs into its power limit as it is made (seen on an H100): that is said, and is not a
# fault of the trial.
POWER_CAP = "software power cap"


def _not_slowed(samples: Sequence[Sample]) -> Check:
    slowed: dict[str, int] = {}
    for sample in samples:
        for name in throttle_names(sample.clock_reasons or 0):
            slowed[name] = slowed.get(name, 0) + 1
    words = ", ".join(
        f"{name} in {count} of {len(samples)} samples" for name, count in sorted(slowed.items())
    )
    return Check(
        name="GPUs were not slowed",
        ok=not set(slowed) - {POWER_CAP},
        detail=words or "no reason for lower clocks was seen",
    )


def _alone(samples: Sequence[Sample], *, ours: frozenset[int]) -> Check:
    found = strangers(samples, ours=ours)
    words = "; ".join(
        f"{gpu}: pids {', '.join(map(str, sorted(pids)))}" for gpu, pids in sorted(found.items())
    )
    return Check(
        name="nobody else used the GPUs",
        ok=not found,
        detail=words or f"only the {len(ours)} processes that were there when the server was ready",
    )
