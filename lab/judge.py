"""Claims against tables: each claim becomes a verdict. Reads only valid trials, writes verdicts.json.

held: the whole 95 % interval satisfies the claim; refuted: the whole interval contradicts it; inconclusive:
the interval holds both, or one repeat has none; untested: a capability or a number is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import geometric_mean

import pandas as pd

from lab.claims import Claim, Measure, Op, Reduce, Verdict
from lab.metrics import METRICS
from lab.stats import Interval, mean_interval, ratio_interval


def judge(
    claims: tuple[Claim, ...],
    tables: Mapping[str, pd.DataFrame],
    *,
    capabilities: tuple[str, ...],
    absent: Mapping[str, str] | None = None,
) -> tuple[Verdict, ...]:
    """One verdict a claim, in order. `tables` holds `trials`, `requests` and `loads` of `tables.tabulate`.

    `absent` says why a variant or a column is not there, by its name.
    """
    return tuple(_judge(claim, tables, capabilities, absent or {}) for claim in claims)


def samples(measure: Measure, variant: str, tables: Mapping[str, pd.DataFrame]) -> dict[int, float]:
    """The measure of each valid trial of `variant`, by repeat. A trial that lacks the number is left out."""
    trials = tables["trials"]
    valid = trials[(trials["variant"] == variant) & (trials["validity"] == "valid")]
    rows = tables[measure.table]
    if measure.column not in rows.columns:
        return {}
    rows = rows[(rows["load"] == measure.load) & rows["trial"].isin(valid["trial"])]
    rows = rows[_which(measure, rows)]
    found: dict[int, float] = {}
    for repeat, group in rows.groupby("repeat"):
        value = _reduce(group[measure.column].dropna(), measure.reduce)
        if math.isfinite(value):
            found[int(str(repeat))] = value
    return found


def _which(measure: Measure, rows: pd.DataFrame) -> pd.Series[bool]:
    """The rows that the measure is of."""
    if measure.table == "requests" and measure.rows in ("first", "later"):
        return (rows["group_order"] == 0) == (measure.rows == "first")
    if measure.table == "forwards" and measure.rows in ("prefill", "decode"):
        return (rows["mode"] == "decode") == (measure.rows == "decode")
    return pd.Series(True, index=rows.index)


def _reduce(column: pd.Series[float], how: Reduce) -> float:
    """The column as one number. Of nothing it is missing (NaN), a sum and a count too: no rows are not a zero."""
    if column.empty:
        return math.nan
    if how in ("p95", "p99"):
        return float(column.quantile(float(how[1:]) / 100))
    return float(column.nunique() if how == "distinct" else column.agg(how))


def _judge(
    claim: Claim,
    tables: Mapping[str, pd.DataFrame],
    capabilities: tuple[str, ...],
    absent: Mapping[str, str],
) -> Verdict:
    unit = "ratio" if claim.compares and claim.by == "ratio" else _unit(claim.measure)
    lacking = [need for need in claim.needs if need not in capabilities]
    if lacking:
        return _untested(claim, unit, f"this machine has no {', '.join(lacking)}")
    own = samples(claim.measure, claim.variant, tables)
    base = claim.base or claim.measure
    other = own if not claim.compares else samples(base, claim.against or claim.variant, tables)
    repeats = sorted(own.keys() & other.keys())
    if not repeats:
        for name in (claim.variant, claim.against or "", claim.measure.column, base.column):
            if name in absent:
                return _untested(claim, unit, f"no {name}: {absent[name]}")
        where = claim.variant if claim.against is None else f"{claim.variant} and {claim.against}"
        what = claim.measure.label() if own or not claim.base else base.label()
        return _untested(claim, unit, f"no valid trial of {where} has {what}")
    values = [own[r] for r in repeats]
    if not claim.compares:
        return _verdict(claim, unit, mean_interval(values), tuple(values))
    others = [other[r] for r in repeats]
    if claim.by == "difference":
        differences = tuple(a - b for a, b in zip(values, others, strict=True))
        return _verdict(claim, unit, mean_interval(differences), differences)
    if any(x <= 0 for x in (*values, *others)):
        return _untested(claim, unit, "a measurement is 0, so there is no ratio")
    ratios = tuple(a / b for a, b in zip(values, others, strict=True))
    verdict = _verdict(claim, unit, ratio_interval(values, others), ratios)
    levels = (geometric_mean(values), geometric_mean(others))
    return replace(verdict, levels=levels, level_unit=_unit(claim.measure))


def _verdict(claim: Claim, unit: str, interval: Interval, values: tuple[float, ...]) -> Verdict:
    if interval.low is None or interval.high is None:
        outcome, reason = "inconclusive", "one repeat has no spread; use --repeats 3 or more"
    else:
        ends = [_satisfies(x, claim.op, claim.threshold) for x in (interval.low, interval.high)]
        expected = claim.expectation()
        if all(ends):
            outcome, reason = "held", f"the whole interval satisfies {expected}"
        elif not any(ends):
            outcome, reason = "refuted", f"the whole interval contradicts {expected}"
        else:
            outcome, reason = (
                "inconclusive",
                f"the interval holds values on both sides of {expected}; more --repeats narrow it",
            )
    return Verdict(
        claim=claim.name,
        outcome=outcome,  # type: ignore[arg-type]  # one of the four by construction
        reason=reason,
        unit=unit,
        n=interval.n,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        samples=values,
    )


def _untested(claim: Claim, unit: str, reason: str) -> Verdict:
    return Verdict(claim=claim.name, outcome="untested", reason=reason, unit=unit, n=0)


def _unit(measure: Measure) -> str:
    metric = METRICS.get(measure.column)
    return metric.unit if metric else ""


def _satisfies(value: float, op: Op, threshold: float) -> bool:
    return {
        "<": value < threshold,
        "<=": value <= threshold,
        ">": value > threshold,
        ">=": value >= threshold,
    }[op]
