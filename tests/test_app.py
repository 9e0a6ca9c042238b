"""What the tasks are made of: numbers typed by a person, lines for the terminal, exit codes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from commandline import make_copy
from fakerun import make_run

from lab import app, places
from lab.claims import Verdict
from lab.errors import LabError, unknown_name
from lab.experiment import load_experiment
from lab.rundir import Run, seal


def test_a_number_that_was_not_given() -> None:
    assert app.whole_number("--repeats", "") is None
    assert app.whole_number("--repeats", "3") == 3
    assert app.whole_number("--repeats", "-3") == -3


@pytest.mark.parametrize("text", ["three", "3.0", "1e9", "0x3", " ", "3,", "9" * 5000])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(LabError, match="is not a whole number") as caught:
        app.whole_number("--repeats", text)
    assert caught.value.fix == "--repeats 3"


def test_verdict_lines_hold_number_unit_interval_and_n() -> None:
    lines = app.verdict_lines(
        (
            Verdict(
                claim="faster",
                outcome="held",
                reason="so it is",
                unit="ratio",
                n=3,
                value=0.31234,
                low=0.3,
                high=0.32,
            ),
            Verdict(claim="cold", outcome="inconclusive", reason="one repeat", unit="tokens", n=1, value=7.0),
            Verdict(claim="gone", outcome="untested", reason="no gpu", unit="", n=0),
        )
    ).splitlines()
    assert lines[0] == "faster  held          0.312 ratio [0.3, 0.32], n = 3; so it is"
    assert lines[1] == "cold    inconclusive  7 tokens, n = 1; one repeat"
    assert lines[2] == "gone    untested      no gpu"
    assert app.verdict_lines(()) == ""


def test_the_explanation_holds_every_claim_with_its_threshold() -> None:
    experiment = load_experiment("radix", folder=places.EXPERIMENTS).experiment
    text = app.explanation(experiment)
    assert experiment.mechanism in text
    for claim in experiment.claims:
        assert claim.says in text
        assert claim.expectation() in text
    for load in experiment.loads:
        assert f"{load.name}: {load.requests()} requests" in text


def test_an_unknown_name_lists_the_known_and_the_closest() -> None:
    error = unknown_name("site", "locl", ["zoo", "local"])
    assert str(error).splitlines() == [
        "unknown site 'locl'",
        "  why: the lab knows: local, zoo",
        "  fix: did you mean 'local'? use one of these names",
    ]
    assert "none" in unknown_name("site", "x", []).why


STRICT = """
import sys
from lab import app
codes = [app.report(app.find_run(name), strict=strict) for name in sys.argv[1:] for strict in (True, False)]
print("codes:", *codes)
"""


def test_strict_exits_with_3_when_a_claim_is_refuted_and_only_then(tmp_path: Path) -> None:
    """The hits of the fake run are 0.909: held above 0.8, refuted above 0.99."""
    copy = make_copy(tmp_path)
    held = make_run(copy.root)
    refuted = Run(held.path.with_name("20260103T030405Z-0000"))
    shutil.copytree(held.path, refuted.path)
    plan = refuted.plan.read_text()
    assert plan.count('"threshold": 0.8') == 1
    refuted.plan.write_text(plan.replace('"threshold": 0.8', '"threshold": 0.99'))
    for run in (held, refuted):
        seal(run)
    done = copy.run(sys.executable, "-c", STRICT, held.path.name, refuted.path.name)
    assert "codes: 0 0 3 0" in done.out, done.text
    assert "hits    refuted" in done.out
