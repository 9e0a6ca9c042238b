"""A measured number as a line of the report: mean over repeats, interval, how steady it was. In go a trial's numbers, out
come the words that the template prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lab.metrics import Metric
from lab.stats import mean_interval, variation

UNSTEADY = 0.10  # coefficient of variation over repeats above which a number is called unsteady


@dataclass(frozen=True, kw_only=True)
class Number:
    """One line of a table of numbers."""

    load: str
    variant: str
    what: str
    value: str
    interval: str
    unit: str
    n: int
    steady: str


def number(values: Sequence[float], metric: Metric, *, load: str, variant: str, what: str) -> Number:
    """The line for one number a trial, written with the metric's unit and decimals."""
    interval = mean_interval(values)
    spread = variation(values)
    steady = "" if spread is None else f"{spread:.1%}"
    if spread is not None and spread > UNSTEADY:
        steady += " unsteady"
    d = metric.decimals
    return Number(
        load=load,
        variant=variant,
        what=what,
        value=f"{interval.value:,.{d}f}",
        interval="one repeat, none"
        if interval.low is None or interval.high is None
        else f"{interval.low:,.{d}f} to {interval.high:,.{d}f}",
        unit=metric.unit,
        n=interval.n,
        steady=steady,
    )
