"""What an experiment expects, as data: a `Measure` picks one number a trial, a `Claim` says what it should be,
a `Verdict` says whether it was. Claims are registered in plan.json before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Table = Literal["requests", "loads"]
Rows = Literal["all", "first", "later"]
Reduce = Literal["median", "mean", "sum", "min", "max"]
Op = Literal["<", "<=", ">", ">="]
Outcome = Literal["held", "refuted", "inconclusive", "untested"]
Capability = Literal["gpu", "nsys", "ncu", "nvlink"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number a trial: `reduce` over `column` of the rows of `table` that belong to `load`.

    `rows` chooses within each group of requests that share a prefix: the `first` one sent, the `later`
    ones, or `all`. The table `loads` has one row a load, so `rows` and `reduce` do not matter there.
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
        which = {"all": "every request", "first": "first requests", "later": "later requests"}[self.rows]
        return f"{self.reduce} {self.column}, {which} of {self.load}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One expected observation with the threshold it is judged by.

    Without `against` the measure of `variant` itself is compared with `threshold`. With it, the ratio
    `variant / against`, paired by repeat, is. `needs` names what the machine must have; where it is
    absent the claim is *untested*, never silently dropped.
    """

    name: str
    says: str
    measure: Measure
    variant: str
    op: Op
    threshold: float
    against: str | None = None
    needs: tuple[Capability, ...] = ()

    def expectation(self) -> str:
        """The threshold in words, such as `cache-on / cache-off < 0.7`."""
        left = self.variant if self.against is None else f"{self.variant} / {self.against}"
        return f"{left} {self.op} {self.threshold:g}"


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
        text = f"{self.value:.3g} {self.unit}".rstrip()
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.3g}, {self.high:.3g}]"
        if self.levels is not None:
            text += f" ({self.levels[0]:.3g} against {self.levels[1]:.3g} {self.level_unit})"
        return f"{text}, n = {self.n}"
