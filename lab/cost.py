"""About how long a plan takes, for putting experiments in order and for telling a person when to come back. In goes a
plan, out come seconds. Nothing is judged by them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lab.plan import LoadStep, Plan, Trial


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast servers of a kind are: seconds to start and stop one, seconds a load takes beside its requests, prompt tokens
    a second, seconds of a decode step, and how many requests a batch holds where their number is not limited."""

    server_s: float
    load_s: float
    prefill_tokens_per_s: float
    step_s: float
    batch: int


# Stored runs of `nano` on two cores of an AMD EPYC: a server answers after 15 s and is gone after 2; 2,048-token prompts
# one at a time go at 6,000 tokens/s, short ones together at 16,000; 2,700 tokens/s are decoded 16 at a time.
CPU = Pace(server_s=17, load_s=0.5, prefill_tokens_per_s=8_000, step_s=0.006, batch=16)
# An 8-billion model on a data-centre GPU, from published figures; the start holds loading weights and capturing graphs.
GPU = Pace(server_s=75, load_s=0.5, prefill_tokens_per_s=15_000, step_s=0.012, batch=64)


def estimate_s(plan: Plan, *, done: Collection[str] = ()) -> float:
    """Seconds that the plan's trials take, without those named in `done`."""
    shared = _highest_hit_rates(plan)
    return sum(_trial_s(trial, shared) for trial in plan.trials if trial.name not in done)


def _trial_s(trial: Trial, shared: dict[str, float]) -> float:
    pace = GPU if trial.server.gpus else CPU
    return pace.server_s + sum(_load_s(step, pace, shared=shared[step.name]) for step in trial.loads)


def _load_s(step: LoadStep, pace: Pace, *, shared: float) -> float:
    """Either the server's work or the rate at which requests are sent sets the time, whichever takes longer."""
    output = step.output_tokens or 0
    distinct = max(0, step.working_set_tokens - step.requests * output)
    # A plan says which tokens are distinct. What is sent in all follows from the share that a cache would find again.
    prompt = distinct / (1 - shared) if shared < 1 else distinct
    computed = prompt * (1 - step.hit_rate)
    limit = step.concurrency if step.rate_per_s is None else pace.batch
    steps = step.requests * output / max(1, min(limit, step.requests))
    work = computed / pace.prefill_tokens_per_s + steps * pace.step_s
    sending = 0.0 if step.rate_per_s is None else step.requests / step.rate_per_s
    return pace.load_s + max(work, sending)


def _highest_hit_rates(plan: Plan) -> dict[str, float]:
    """By load the highest planned hit rate of any variant: variants without a cache plan 0."""
    found: dict[str, float] = {}
    for trial in plan.trials:
        for step in trial.loads:
            found[step.name] = max(step.hit_rate, found.get(step.name, 0.0))
    return found


def minutes(seconds: float) -> str:
    """A duration in words that promise no more than they know."""
    if seconds < 60:
        return "less than a minute"
    whole = round(seconds / 60)
    return f"about {whole} minute{'s' * (whole != 1)}"
