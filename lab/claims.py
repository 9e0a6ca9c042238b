"""What an experiment expects, as data: a `Measure` picks one number a trial, a `Claim` says what it should be,
a `Verdict` says whether it was. Claims are registered in plan.json before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Table = Literal["requests", "loads", "forwards"]
Rows = Literal["all", "first", "later", "prefill", "decode"]
Reduce = Literal["median", "mean", "sum", "min", "max", "p95", "p99", "count", "distinct"]
Op = Literal["<", "<=", ">", ">="]
By = Literal["ratio", "difference"]
Outcome = Literal["held", "refuted", "inconclusive", "untested"]
Capability = Literal["gpu", "nsys", "ncu", "nvlink"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number a trial: `reduce` over `column` of the rows of `table` that belong to `load`.

    Of `requests`, `rows` chooses within each group that shares a prefix: the `first` one sent, the `later`
    ones, or `all`; of `forwards` (a row a forward pass), those of a mode: `prefill` or `decode`. The table `loads` has
    one row a load, so `rows` and `reduce` do not matter there. `distinct` counts different values.
    """

    table: Table
    load: str
    column: str
    rows: Rows = "all"
    reduce: Reduce = "median"

    def label(self) -> str:
        """The measure in words, for a table's first column."""
        if self.table == "loads":
            return f"{self.column} in {self.load}"
        which = {
            "all": "every request" if self.table == "requests" else "every forward pass",
            "first": "first requests",
            "later": "later requests",
            "prefill": "prefill passes",
            "decode": "decode passes",
        }[self.rows]
        return f"{self.reduce} {self.column}, {which} of {self.load}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One expected observation with the threshold it is judged by.

    Without `against` and `base` the measure of `variant` itself is compared with `threshold`. With `against`, the ratio
    `variant / against`, paired by repeat, is. `base` is the measure of the other side where that is not the
    same one: another load, of the same variant unless `against` names one. `by` takes the difference instead, for
    numbers that can be 0. `needs` names what the machine must have; where it is
    absent the claim is *untested*, never silently dropped.
    """

    name: str
    says: str
    measure: Measure
    variant: str
    op: Op
    threshold: float
    against: str | None = None
    base: Measure | None = None
    by: By = "ratio"
    needs: tuple[Capability, ...] = ()

    @property
    def compares(self) -> bool:
        """Whether two sides are compared, not one number with the threshold."""
        return self.against is not None or self.base is not None

    def expectation(self) -> str:
        """The threshold in words, such as `cache-on / cache-off < 0.7`."""
        left, right = self.variant, self.against or self.variant
        if self.base is not None:
            left, right = f"{left}: {self.measure.label()}", f"{right}: {self.base.label()}"
        sides = f"{left} {'/' if self.by == 'ratio' else '-'} {right}" if self.compares else left
        return f"{sides} {self.op} {self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a claim.

    `value` with its 95 % interval [`low`, `high`] is the measure (or the ratio), over `n` repeats;
    all three are None where nothing could be computed, and `reason` then says why. For a ratio, `levels` are the
    geometric means of its two sides, in the measure's own unit `level_unit`.
    """

    claim: str
    outcome: Outcome
    reason: str
    unit: str
    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()
    levels: tuple[float, float] | None = None
    level_unit: str = ""

    def number(self) -> str:
        """The number with unit, interval, for a ratio its two sides, and n; "none" where there is none."""
        if self.value is None:
            return "none"
        text = f"{_short(self.value)} {self.unit}".rstrip()
        if self.low is not None and self.high is not None:
            text += f" [{_short(self.low)}, {_short(self.high)}]"
        if self.levels is not None:
            left, right = map(_short, self.levels)
            text += f" ({left} against {right} {self.level_unit})".replace(" )", ")")
        return f"{text}, n = {self.n}"


def _short(value: float) -> str:
    """Three digits, and no exponent for a number that people read as a whole one."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
