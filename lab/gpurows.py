"""What gpu.csv says of a trial: rows of the table `gpus` (one a load and GPU), and the checks whether its numbers may be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median

from lab.errors import LabError
from lab.hardware.model import Gpu, Hardware, read_hardware
from lab.hardware.nvml import IDLE_MIB
from lab.plan import Trial
from lab.rundir import Run, TrialFiles
from lab.telemetry.gpucsv import Sample, gaps, read_samples, strangers, throttle_names
from lab.validity import Check

Row = dict[str, object]
Windows = Mapping[str, tuple[float, float]]

COLUMNS = (
    *("trial", "variant", "repeat", "load", "gpu", "samples"),
    *("sm_util_pct", "memory_util_pct", "memory_used_mib", "power_w", "temperature_c", "sm_clock_mhz"),
    *("energy_j", "output_tokens", "j_per_output_token"),
)
UNTESTED = "untested: "
"""How the detail of a check begins that nothing speaks against, and that could not be made here."""


def machine_of(run: Run) -> Hardware | None:
    """The machine of the run; None where it was not noted or cannot be read, which costs names, not the report."""
    try:
        return read_hardware(run.hardware) if run.hardware.is_file() else None
    except LabError:
        return None


def read_gpus(
    trial: Trial,
    files: TrialFiles,
    status: Mapping[str, object],
    *,
    windows: Windows,
    tokens: Mapping[str, float],
    machine: Hardware | None,
) -> tuple[list[Row], list[Check], list[str]]:
    """Rows, checks and what could not be read. `windows` are the loads in Unix time, `tokens` their output tokens,
    `machine` says how the clocks were set.

    Nothing at all for a trial without GPUs. `LabError` when gpu.csv is not one.
    """
    gpus = trial.server.gpus
    if not gpus:
        return [], [], []
    if not files.gpus.is_file():
        return [], [Check(name="GPUs were watched", ok=False, detail="there is no gpu.csv")], []
    samples, problems = read_samples(files.gpus)
    by_gpu = {gpu: [sample for sample in samples if sample.gpu == gpu] for gpu in gpus}
    rows = [
        _row(trial, load, gpu, [s for s in by_gpu[gpu] if start <= s.time_s <= end], tokens[load])
        for load, (start, end) in windows.items()
        for gpu in gpus
    ]
    start = min(window[0] for window in windows.values())
    end = max(window[1] for window in windows.values())
    inside = [sample for sample in samples if start <= sample.time_s <= end]
    pids = status.get("gpu_pids")
    ours = frozenset(int(str(pid)) for pid in pids) if isinstance(pids, list) else frozenset()
    cards = {gpu.uuid: gpu for gpu in machine.gpus} if machine else {}
    checks = [
        _watched(samples, gpus, start_s=start, end_s=end),
        _answered(inside),
        _not_slowed(inside),
        *(_clock(gpu, [s for s in inside if s.gpu == gpu], card=cards.get(gpu)) for gpu in gpus),
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
    unseen = [
        gpu for gpu in gpus if not any(s.gpu == gpu and start_s <= s.time_s <= end_s for s in samples)
    ]  # a load shorter than a gap may not go unseen either
    detail = f"{len(samples)} samples of {len(gpus)} GPUs, none more than 3 s apart"
    if found:
        longest = max(found, key=lambda gap: gap.end_s - gap.start_s)
        detail = f"{len(found)} gaps, the longest of {longest.end_s - longest.start_s:.1f} s on {longest.gpu}"
    elif unseen:
        detail = f"no sample during the loads of {', '.join(unseen)}"
    return Check(name="GPUs were watched", ok=not found and not unseen, detail=detail)


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
    known = [sample for sample in samples if sample.clock_reasons is not None]
    slowed: dict[str, int] = {}
    for sample in known:
        for name in throttle_names(sample.clock_reasons or 0):
            slowed[name] = slowed.get(name, 0) + 1
    words = ", ".join(f"{name} in {count} of {len(known)} samples" for name, count in sorted(slowed.items()))
    if not known:
        words = f"{UNTESTED}the driver gives no reasons for lower clocks"
    return Check(
        name="GPUs were not slowed",
        ok=not set(slowed) - {POWER_CAP},
        detail=words or "no reason for lower clocks was seen",
    )


BUSY_PCT = 50  # below this utilisation a GPU may rest between kernels, and its clock with it
CLOCK_SHARE = 0.9
SLOW_SHARE = 0.1  # of the samples; clocks need a moment to rise when a load begins
# By nvmlClocksEventReasons in nvml.h: idle; as application clocks or locked clocks say; power cap. A clock that is low for one
# of these is as somebody set it, or is said by the check above.
EXCUSED = 0x001 | 0x002 | 0x004


def _clock(gpu: str, samples: Sequence[Sample], *, card: Gpu | None) -> Check:
    """Was the SM clock of the busy GPU near the application clock, which is what NVML knows of what was asked for?
    NVML does not tell locked clocks (`nvidia-smi --lock-gpu-clocks`); a lower clock is excused where the driver says
    that a setting is why."""
    name = f"clock of {'GPU ' + str(card.index) if card else gpu} was near what is set"
    wanted = card.sm_clock_set_mhz if card else None
    if not wanted:
        detail = f"{UNTESTED}{'the driver does not say which clock is set' if card else 'no hardware.json'}"
        return Check(name=name, ok=True, detail=detail)
    clocks = [
        s.sm_clock_mhz
        for s in samples
        if s.sm_clock_mhz is not None
        and (s.sm_util_pct or 0) >= BUSY_PCT
        and not (s.clock_reasons or 0) & EXCUSED
    ]
    if not clocks:
        detail = f"{UNTESTED}no sample of a busy GPU whose clock only the setting decided ({wanted} MHz)"
        return Check(name=name, ok=True, detail=detail)
    slow = sum(clock < CLOCK_SHARE * wanted for clock in clocks)
    return Check(
        name=name,
        ok=slow <= SLOW_SHARE * len(clocks),
        detail=f"median {median(clocks):.0f} MHz, {wanted} MHz set; {slow} of {len(clocks)} samples of a busy GPU were "
        f"more than {1 - CLOCK_SHARE:.0%} below",
    )


def _alone(samples: Sequence[Sample], *, ours: frozenset[int]) -> Check:
    """Did only those processes compute on the GPUs that were there when the server was ready?

    The driver counts in the PID namespace of who asks, here always the lab's, so the numbers can be compared. What it cannot
    show: processes of namespaces that the lab does not see (their memory shows before the start), and who came between the
    look before the start and the server's being ready.
    """
    found = strangers(samples, ours=ours)
    words = "; ".join(f"{gpu}: {_pids(pids)}" for gpu, pids in sorted(found.items()))
    listed = [sample.processes for sample in samples if sample.processes is not None]
    held = max((sample.memory_used_mib or 0 for sample in samples), default=0)
    if not listed:
        words = f"{UNTESTED}the driver does not list processes"
    elif not ours and not found and held > IDLE_MIB:
        words = f"{UNTESTED}{held} MiB are in use and no process is listed: it lies in another PID namespace"
    return Check(
        name="nobody else used the GPUs",
        ok=not found,
        detail=words or f"only who was there when the server was ready: {_pids(ours)}",
    )


def _pids(pids: frozenset[int]) -> str:
    return f"pid{'s' * (len(pids) != 1)} {', '.join(map(str, sorted(pids)))}" if pids else "no process"
