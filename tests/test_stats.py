"""The intervals: textbook answers, what must hold for any samples, and how often they cover the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.stats import mean_interval, ratio_interval, variation

above_zero = st.floats(min_value=1e-6, max_value=1e6)


def test_t_interval_of_five_numbers() -> None:
    """1..5: mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445 (any table of Student's t)."""
    found = mean_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert found.value == 3
    assert found.n == 5
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.30265), (4, 3.18245), (10, 2.26216), (31, 2.04227)])
def test_t_quantiles_of_the_table(n: int, t: float) -> None:
    """Half of the samples at -1, half at 1 (one at 0 if odd): the spread is known in closed form."""
    samples = [-1.0] * (n // 2) + [0.0] * (n % 2) + [1.0] * (n // 2)
    spread = math.sqrt(2 * (n // 2) / (n - 1))
    assert mean_interval(samples).high == pytest.approx(t * spread / math.sqrt(n), rel=1e-5)


def test_ratio_is_paired_and_geometric() -> None:
    """Ratios 2 and 4: geometric mean sqrt(8); the logs lie ln(2)/2 around it, t(0.975, 1) = 12.7062."""
    found = ratio_interval([2, 8], [1, 2])
    assert found.value == pytest.approx(math.sqrt(8))
    assert found.high == pytest.approx(math.sqrt(8) * math.exp(12.7062 * math.log(2) / 2), rel=1e-4)
    assert found.low == pytest.approx(math.sqrt(8) / math.exp(12.7062 * math.log(2) / 2), rel=1e-4)


def test_pairing_removes_what_both_share() -> None:
    """Repeats that differ tenfold but always by the same ratio: the ratio is certain all the same."""
    found = ratio_interval([1, 10, 100], [2, 20, 200])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_one_sample_has_no_interval_and_equal_ones_have_no_width() -> None:
    assert (mean_interval([7]).low, mean_interval([7]).high) == (None, None)
    assert ratio_interval([1], [2]).low is None
    assert (mean_interval([7, 7, 7]).low, mean_interval([7, 7, 7]).high) == (7, 7)


@pytest.mark.parametrize("samples", [[], [1, math.nan], [math.inf]])
def test_what_is_no_sample_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="sample"):
        mean_interval(samples)


@pytest.mark.parametrize(("a", "b"), [([0, 1], [1, 1]), ([1, 1], [1, 0]), ([-1], [1]), ([1, 2], [1])])
def test_no_ratio_of_zeros_or_of_unpaired_samples(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"ratio needs samples above 0|same length"):
        ratio_interval(a, b)


@given(st.lists(st.tuples(above_zero, above_zero), min_size=2, max_size=20))
def test_swapping_a_ratio_inverts_it(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = ratio_interval(a, b), ratio_interval(b, a)
    assert None not in (there.low, there.high, back.low, back.high)
    logs = [math.log(x) if x else -math.inf for x in (there.low or 0.0, there.value, there.high or 0.0)]
    inverse = [-math.log(x) if x else math.inf for x in (back.high or 0.0, back.value, back.low or 0.0)]
    assert logs == pytest.approx(inverse, abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-1e3, 1e3))
def test_an_interval_moves_with_its_samples(samples: list[float], shift: float) -> None:
    here, there = mean_interval(samples), mean_interval([x + shift for x in samples])
    assert here.low is not None
    assert here.high is not None
    assert here.low <= here.value <= here.high
    assert (there.low, there.value, there.high) == pytest.approx(
        (here.low + shift, here.value + shift, here.high + shift), abs=1e-3, rel=1e-6
    )


def test_variation() -> None:
    assert variation([9, 10, 11]) == pytest.approx(0.1)
    assert variation([5]) is None
    assert variation([-1, 1]) is None


def percentile_bootstrap(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of each row's mean, over all n^n resamples instead of a random draw."""
    n = logs.shape[1]
    resamples = np.array(list(itertools.product(range(n), repeat=n)))
    means = np.zeros((len(logs), len(resamples)))
    for column in resamples.T:
        means += logs[:, column]
    low, high = np.percentile(means / n, (2.5, 97.5), axis=1, method="inverted_cdf")
    return low, high


@pytest.mark.parametrize(("n", "bootstrap_covers"), [(3, 0.75), (5, 0.84)])
def test_paired_t_covers_what_it_promises_and_the_bootstrap_does_not(n: int, bootstrap_covers: float) -> None:
    """Trials whose log ratio is normal around log 0.5; the bounds are four standard errors of 2,000 runs.

    docs/decisions/0005-statistics.md holds these numbers from more runs.
    """
    runs = 2000
    draw = np.random.default_rng(5)
    ratios = np.exp(np.log(0.5) + 0.1 * draw.standard_normal((runs, n)))
    base = np.exp(0.3 * draw.standard_normal((runs, n)))  # how fast the machine happened to be: cancels out
    covered = 0
    for a, b in zip((base * ratios).tolist(), base.tolist(), strict=True):
        found = ratio_interval(a, b)
        covered += found.low is not None and found.high is not None and found.low <= 0.5 <= found.high
    assert abs(covered / runs - 0.95) < 0.02
    low, high = percentile_bootstrap(np.log(ratios))
    bootstrap = float(((low <= np.log(0.5)) & (np.log(0.5) <= high)).mean())
    assert abs(bootstrap - bootstrap_covers) < 0.04
