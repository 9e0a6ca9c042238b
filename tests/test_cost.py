"""The estimate of how long a plan takes: more work is more time, and a stored run is not far from it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from fakerun import make_fake_plan, small
from test_stored_runs import unpack

from lab.cost import estimate_s, minutes
from lab.plan import LoadStep, Plan, read_plan
from lab.rundir import read_json


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_fake_plan(small(tmp_path))


def changed(plan: Plan, **numbers: float | None) -> Plan:
    """The plan with other numbers in every load."""

    def other(step: LoadStep) -> LoadStep:
        return replace(step, **numbers)  # type: ignore[arg-type]

    return replace(plan, trials=tuple(replace(t, loads=tuple(map(other, t.loads))) for t in plan.trials))


def test_twice_the_trials_take_twice_as_long(tmp_path: Path) -> None:
    source = small(tmp_path)
    two, four = (estimate_s(make_fake_plan(source, repeats=n)) for n in (2, 4))
    assert four == pytest.approx(2 * two)


def test_trials_that_are_done_take_nothing(plan: Plan) -> None:
    names = [trial.name for trial in plan.trials]
    assert 0 < estimate_s(plan, done=names[:1]) < estimate_s(plan)
    assert estimate_s(plan, done=names) == 0


def test_a_trial_is_at_least_a_server(plan: Plan) -> None:
    empty = replace(plan, trials=tuple(replace(trial, loads=()) for trial in plan.trials))
    assert estimate_s(empty) / len(empty.trials) > 10


@pytest.mark.parametrize(
    ("numbers", "longer"),
    [
        ({"working_set_tokens": 10_000_000}, True),
        ({"output_tokens": 1_000}, True),
        ({"rate_per_s": 0.01}, True),
        ({"concurrency": 16}, False),
        ({"hit_rate": 1.0}, False),
    ],
)
def test_what_makes_a_load_longer(plan: Plan, numbers: dict[str, float], longer: bool) -> None:
    steps = {"working_set_tokens": 20_000, "output_tokens": 100, "hit_rate": 0.5}
    before = estimate_s(changed(plan, **steps))
    after = estimate_s(changed(plan, **{**steps, **numbers}))
    assert (after > before) is longer
    assert after != before or numbers == {"hit_rate": 1.0}


def test_a_variant_without_a_cache_computes_what_the_others_find(plan: Plan) -> None:
    """The plan says which tokens are distinct: with a hit rate of 0.9 elsewhere ten times as many are sent."""
    many = changed(plan, working_set_tokens=1_000_000, output_tokens=1)
    shared = replace(
        many,
        trials=tuple(
            replace(t, loads=tuple(replace(s, hit_rate=0.9 * (t.variant == "cache-on")) for s in t.loads))
            for t in many.trials
        ),
    )
    on = [t.name for t in shared.trials if t.variant == "cache-on"]
    off = [t.name for t in shared.trials if t.variant == "cache-off"]
    assert estimate_s(shared, done=on) > 5 * estimate_s(shared, done=off)


def test_a_stored_run_took_about_as_long_as_estimated(tmp_path: Path) -> None:
    """Within a factor of two: the order of experiments needs no more."""
    run = unpack("radix-good", tmp_path)
    plan = read_plan(run)
    times = [read_json(run.trial(trial.name).status) for trial in plan.trials]
    began, ended = (sorted(str(t[key]) for t in times) for key in ("started", "ended"))
    took = seconds_of_day(ended[-1]) - seconds_of_day(began[0])
    assert 0.5 < estimate_s(plan) / took < 2


def seconds_of_day(text: str) -> float:
    found = re.search(r"T(\d\d):(\d\d):([\d.]+)\+", text)
    assert found is not None
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "less than a minute"),
        (59, "less than a minute"),
        (61, "about 1 minute"),
        (150, "about 2 minutes"),
        (2400, "about 40 minutes"),
    ],
)
def test_minutes_in_words(seconds: float, words: str) -> None:
    assert minutes(seconds) == words
