"""What of an experiment a stack's release of SGLang can do: in go experiment, stack and dialect, out come the variants
that are left out, each with the reason, or a `LabError` when nothing is left to run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lab.dialect import Dialect
from lab.errors import LabError
from lab.experiment import Experiment
from lab.stack import Stack


def left_out_of(
    experiment: Experiment, *, stack: Stack, dialect: Dialect, unfit: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variants whose server arguments this release refuses, with the reasons, and those that are `unfit` for others.

    `LabError` when that are all of them, or when it has no program for one of the loads.
    """
    sglang = f"SGLang {stack.sglang}"
    reasons = dict(unfit or {}) | {
        variant.name: f"{sglang} has {', '.join(refused)}"
        for variant in experiment.variants
        if (refused := dialect.refused((*experiment.server, *variant.args), device=stack.device))
    }
    if len(reasons) == len(experiment.variants):
        raise _cannot(experiment, stack=stack, why="; ".join(dict.fromkeys(reasons.values())))
    for load in experiment.loads:
        if load.dataset not in dialect.datasets:
            raise _cannot(experiment, stack=stack, why=f"{sglang} has no load {load.dataset!r}")
    return reasons


def without(experiment: Experiment, names: Collection[str]) -> Experiment:
    """The experiment without the variants of these names."""
    return replace(experiment, variants=tuple(v for v in experiment.variants if v.name not in names))


def _cannot(experiment: Experiment, *, stack: Stack, why: str) -> LabError:
    return LabError(
        f"experiment {experiment.name!r} cannot run on stack {stack.name!r}",
        why=why,
        fix="name a stack with another release: --stack",
    )
