"""What of an experiment a stack's release of SGLang and a machine can do: in go experiment, stack, dialect and what the
machine has, out come the variants that are left out, each with the reason, or a `LabError` when nothing is left to run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lab.dialect import Dialect
from lab.errors import LabError
from lab.experiment import Experiment
from lab.stack import Stack


def left_out_of(
    experiment: Experiment, *, stack: Stack, dialect: Dialect, capabilities: Collection[str] = ()
) -> dict[str, str]:
    """The variants whose server arguments this release refuses, or that need what is absent, with the reasons.

    `LabError` when that are all of them, or when it has no program for one of the loads.
    """
    sglang = f"SGLang {stack.sglang}"
    reasons = {
        variant.name: f"{sglang} has {', '.join(refused)}"
        for variant in experiment.variants
        if (refused := dialect.refused((*experiment.server, *variant.args), device=stack.device))
    }
    for variant in experiment.variants:
        if lacking := [need for need in variant.needs if need not in capabilities]:
            reasons[variant.name] = f"this machine has no {', '.join(lacking)}"
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
