"""What the probe wrote in a trial, read and checked: in go the trial's event files and the server's own counters of each
load; out come tables and numbers, or the reason why there are none. Events that are lost or contradict the server's
counters are never made into numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan

import pandas as pd

from lab.errors import LabError
from lab.forwards import (
    FORWARD_COLUMNS,
    NUMBERS,
    batch_numbers,
    forward_table,
    request_table,
    retraction_numbers,
    tree_numbers,
)
from lab.gpurows import UNTESTED
from lab.plan import Plan
from lab.probe.labprobe.schema import LEVELS
from lab.read.events import ProbeFile, Totals, read_events, totals
from lab.rundir import TrialFiles
from lab.validity import Check

IN_USE = "the probe saw everything"
FITS = "the probe's events fit the counters"
COLUMNS_BY_LEVEL: Mapping[str, tuple[str, ...]] = {
    "batches": (*FORWARD_COLUMNS, *NUMBERS["batches"]),
    "requests": ("wait_ms", "service_order", *NUMBERS["requests"]),
    "cache": NUMBERS["cache"],
}


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The first rank's file; None with a `reason` where no number may be made of what there is."""

    file: ProbeFile | None = None
    others: tuple[ProbeFile, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    windows: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def forwards(self) -> pd.DataFrame:
        """`forwards.forward_table` of the loads."""
        if self.file is None:
            return pd.DataFrame(columns=["load", *FORWARD_COLUMNS, "worked"])
        return forward_table(self.file, self.windows)

    def requests(self) -> pd.DataFrame | None:
        """`forwards.request_table`, or None."""
        return None if self.file is None else request_table(self.file)

    def complete(
        self, numbers: dict[str, float], *, load: str, passes: pd.DataFrame, asked_policy: str
    ) -> None:
        """Add every number that the probe gives of a load, and the evicted tokens where the release does not count them."""
        if self.file is None:
            return
        window = self.windows[load]
        numbers |= batch_numbers(
            passes[passes["load"] == load], asked_policy=asked_policy, pool_tokens=numbers["pool_tokens"]
        )
        numbers |= {**retraction_numbers(self.file, window), **tree_numbers(self.file, window)}
        if isnan(numbers["evicted_tokens"]):
            numbers["evicted_tokens"] = float(totals(self.file, window=window).evicted_tokens)

    def in_use(self) -> Check:
        """Whether what is written is all there was."""
        if self.file is None:
            return Check(name=IN_USE, ok=True, detail=f"{UNTESTED}{self.reason}")
        ranks = f", {1 + len(self.others)} ranks" if self.others else ""
        return Check(
            name=IN_USE,
            ok=True,
            detail=f"level {self.file.level}, no event lost, every hook in use{ranks}",
        )

    def fits(self, load: str, counted: Mapping[str, float]) -> Check:
        """The events' sums against the server's own counters of the load, on every rank, to the token."""
        if self.file is None:
            return Check(name=FITS, ok=True, detail=f"{UNTESTED}{self.reason}")
        wrong: list[str] = []
        compared: list[str] = []
        for file in (self.file, *self.others):
            for name, value in _sums(totals(file, window=self.windows[load])).items():
                count = counted.get(name, float("nan"))
                if isnan(count):  # the release counts no such thing
                    continue
                compared.append(name)
                if value != count:
                    wrong.append(f"{name}, rank {file.rank}: events {value:.0f}, counter {count:.0f}")
        same = ", ".join(dict.fromkeys(compared)) or "nothing to compare"
        return Check(name=FITS, ok=not wrong, detail="; ".join(wrong) or f"equal: {same}")


def read_probe(files: TrialFiles, windows: Mapping[str, tuple[float, float]], *, level: str) -> Probed:
    """The trial's event files; `windows` are the loads' times, from their first request to the next load's start."""
    if level == "off":
        return Probed(reason="the experiment asks for no probe")
    try:
        found, empty = read_events(files.events)
    except LabError as error:
        return Probed(reason=f"{error.problem}: {error.why}")
    if not found:
        return Probed(reason="; ".join(empty) or "the server wrote no events: the probe was not loaded")
    reasons = [*empty, *(reason for file in found for reason in _flaws(file))]
    notes = tuple(f"{f.path.name} line {p.line}: {p.reason}" for f in found for p in f.problems[:3])
    if reasons:
        return Probed(reason="; ".join(reasons[:3]), notes=notes)
    return Probed(file=found[0], others=found[1:], notes=notes, windows=windows)


def absent_columns(plan: Plan, checks: pd.DataFrame) -> dict[str, str]:
    """Why columns that the probe gives are not there, by name: its level, or what was wrong in a trial."""
    said = checks.loc[checks["name"] == IN_USE, "detail"].astype(str)
    failed = [detail.removeprefix(UNTESTED) for detail in said if detail.startswith(UNTESTED)]
    found: dict[str, str] = {}
    for level, names in (*COLUMNS_BY_LEVEL.items(),):
        if plan.probe == "off" or LEVELS.index(level) > LEVELS.index(plan.probe):
            reason = f"the experiment's probe is {plan.probe!r}, this needs {level!r}"
        elif failed:
            reason = failed[0]
        else:
            continue
        found.update(dict.fromkeys(names, reason))
    return found


def _flaws(file: ProbeFile) -> list[str]:
    """Why numbers made of this file would not be true."""
    found = []
    if file.not_hooked:
        found.append(f"hooks not in use: {'; '.join(file.not_hooked[:3])}")
    if file.dropped:
        found.append(f"{file.dropped} events were lost")
    if file.errors:
        found.append(f"{file.errors} hook bodies raised")
    if file.backwards:
        found.append(f"{file.backwards} events are earlier than the one before: the clock went backwards")
    if file.clock_step_ms:
        found.append(f"the machine's clock was set by {file.clock_step_ms:.0f} ms during the trial")
    # SGLang ends its schedulers with SIGKILL, which may cut the last line; whatever that held is missed by `fits`.
    lines = 1 + sum(map(len, file.events.values())) + len(file.problems)
    torn = [problem for problem in file.problems if problem.line < lines]
    if torn:
        found.append(f"{len(torn)} lines cannot be read: {torn[0].reason}")
    return found


def _sums(sums: Totals) -> dict[str, float]:
    """What can be held against a counter, by the column of the table `loads`. Where the file does not follow requests,
    the tokens of prefill batches are those of the prompts, unless one was computed again after a retraction."""
    found = {"evicted_tokens": sums.evicted_tokens, "retracted_requests": sums.retracted_requests}
    if sums.prompt_tokens is not None and sums.cached_tokens is not None and sums.output_tokens is not None:
        found["prompt_tokens"] = sums.prompt_tokens
        found["cached_tokens"] = sums.cached_tokens
        found["generated_tokens"] = sums.output_tokens
    elif not sums.retracted_requests:
        found["prompt_tokens"] = sums.computed_tokens + sums.found_tokens
    return {name: float(value) for name, value in found.items()}
