"""Statistics over repeats. The trial is the unit: each number that comes in is one trial's, and n is small.

Intervals are Student's t at 95 %. Ratios are paired by repeat and taken on the log scale, so that "twice"
and "half" are equally far from one. The percentile bootstrap is not used: at three repeats it covers 0.75
of the time where it promises 0.95 (measured in docs/decisions/0005-statistics.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval; `low` and `high` are None for a single sample, which has none."""

    value: float
    low: float | None
    high: float | None
    n: int


def mean_interval(samples: Sequence[float]) -> Interval:
    """Mean and t interval of independent samples; samples that are all equal give an interval of no width."""
    _finite(samples)
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return Interval(value=mean, low=None, high=None, n=1)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1))
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * spread / math.sqrt(n)
    return Interval(value=mean, low=mean - half, high=mean + half, n=n)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Geometric mean of the paired ratios and its t interval on the log scale. All samples must be above 0."""
    if len(numerators) != len(denominators):
        raise ValueError("paired samples must have the same length")
    if any(x <= 0 for x in (*numerators, *denominators)):
        raise ValueError("a ratio needs samples above 0; compare differences instead")
    logs = mean_interval([math.log(a / b) for a, b in zip(numerators, denominators, strict=True)])
    return Interval(
        value=math.exp(logs.value),
        low=None if logs.low is None else math.exp(logs.low),
        high=None if logs.high is None else math.exp(logs.high),
        n=logs.n,
    )


def variation(samples: Sequence[float]) -> float | None:
    """Coefficient of variation (standard deviation over mean), None where it means nothing."""
    n = len(samples)
    if n < 2:
        return None
    mean = math.fsum(samples) / n
    if mean == 0:
        return None
    return math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1)) / abs(mean)


def _finite(samples: Sequence[float]) -> None:
    if not samples:
        raise ValueError("no samples")
    if not all(math.isfinite(x) for x in samples):
        raise ValueError("a sample is not a finite number")
