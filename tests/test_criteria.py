"""The plan's success criteria: ticked by answers, whichever they are, open with the reason otherwise, and resting only on
claims that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts import need

from lab import places
from lab.claims import Outcome
from lab.criteria import BOXES, Box, Ticked, decide
from lab.digest import Answer, Digest
from lab.experiment import experiment_names, load_experiment
from lab.rundir import Run

NAMES = experiment_names(places.EXPERIMENTS)
BOX = Box(text="Understood: it", asks="What is it?", claims=(("a", "first"), ("a", "second"), ("b", "third")))


def digest(experiment: str, **answers: Answer) -> Digest:
    run = Run(Path("runs") / experiment / "20260102T030405Z-ab12")
    return Digest(run=run, state="reported", answers=answers)


def answer(outcome: Outcome, reason: str = "so it is", lacking: tuple[str, ...] = ()) -> Answer:
    return Answer(outcome=outcome, reason=reason, lacking=lacking)


def ticked(first: Answer | None, third: Answer | None) -> Ticked:
    """The box with an answer to `second` in any case; None for no run of b, or no such claim in the run of a."""
    a = digest("a", second=answer("held"), **({"first": first} if first else {}))
    newest = {"a": a, **({"b": digest("b", third=third)} if third else {})}
    (found,) = decide(newest, boxes=(BOX,))
    return found


@pytest.mark.parametrize("first", ["held", "refuted"])
@pytest.mark.parametrize("third", ["held", "refuted"])
def test_an_answer_ticks_whichever_it_is(first: Outcome, third: Outcome) -> None:
    found = ticked(answer(first), answer(third))
    assert found.ticked
    assert found.open() == ()


@pytest.mark.parametrize(
    ("third", "reason"),
    [
        (answer("inconclusive", "one repeat has no spread"), "inconclusive: one repeat has no spread"),
        (answer("untested", "no lru: it counts none"), "untested: no lru: it counts none"),
        (answer("untested", "no gpu", ("gpu", "nsys")), "untested, for want of gpu, nsys"),
        (None, "there is no run with a result: `invoke exp.b`"),
    ],
)
def test_what_leaves_a_box_open(third: Answer | None, reason: str) -> None:
    found = ticked(answer("held"), third)
    assert not found.ticked
    ((said, those),) = found.open()
    assert said == reason
    assert [(e.experiment, e.claim) for e in those] == [("b", "third")]
    assert sum(e.answered for e in found.evidence) == 2


def test_a_claim_that_the_newest_run_has_not() -> None:
    found = ticked(None, answer("held"))
    assert not found.ticked
    assert [reason for reason, _ in found.open()] == [
        "the newest run has no such claim; run the experiment again"
    ]


def test_claims_open_for_one_reason_stand_together() -> None:
    (found,) = decide({}, boxes=(BOX,))
    assert [(reason, len(those)) for reason, those in found.open()] == [
        ("there is no run with a result: `invoke exp.a`", 2),
        ("there is no run with a result: `invoke exp.b`", 1),
    ]


def test_the_boxes_are_the_plans() -> None:
    assert [box.text for box in BOXES] == [
        "Understood: RadixCache hit/miss behavior",
        "Measured: Prefill vs decode kernel characteristics",
        "Compared: FlashInfer vs Triton backend performance",
        "Analyzed: TP scaling with NVLink topology",
        "Identified: Key bottlenecks in SGLang serving",
    ]
    for box in BOXES:
        assert len(box.claims) == len(set(box.claims)) > 0
        assert box.asks.endswith("?")


@pytest.mark.parametrize(("experiment", "claim"), sorted({pair for box in BOXES for pair in box.claims}))
def test_every_claim_of_a_box_exists(experiment: str, claim: str) -> None:
    need(experiment in NAMES, f"the experiment {experiment}")
    found = load_experiment(experiment, folder=places.EXPERIMENTS).experiment
    assert claim in [c.name for c in found.claims]


CPU_ONLY = {
    "Understood: RadixCache hit/miss behavior": set(),
    "Measured: Prefill vs decode kernel characteristics": {"gpu", "nsys"},
    "Compared: FlashInfer vs Triton backend performance": {"gpu", "nsys"},
    "Analyzed: TP scaling with NVLink topology": {"gpu", "nvlink", "nsys"},
    "Identified: Key bottlenecks in SGLang serving": set(),
}


@pytest.mark.parametrize("box", BOXES, ids=lambda box: box.text)
def test_what_a_machine_without_gpu_leaves_open(box: Box) -> None:
    """There, every claim with needs is untested and every other one at best answered."""
    newest: dict[str, Digest] = {}
    for experiment in sorted({experiment for experiment, _ in box.claims}):
        need(experiment in NAMES, f"the experiment {experiment}")
        claims = load_experiment(experiment, folder=places.EXPERIMENTS).experiment.claims
        newest[experiment] = digest(
            experiment,
            **{c.name: answer("untested", "-", c.needs) if c.needs else answer("held") for c in claims},
        )
    (found,) = decide(newest, boxes=(box,))
    lacking = {need for e in found.evidence if e.answer is not None for need in e.answer.lacking}
    assert lacking == CPU_ONLY[box.text]
    assert found.ticked is (not lacking)
