"""The five success criteria of the learning plan: which claims decide each, and whether they are answered. In go the
newest runs' digests by experiment, out comes for each box whether it is ticked, on what evidence, and what is open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lab.digest import Answer, Digest

RULE = (
    "A box is ticked when every claim it rests on is held or refuted in the newest run of its experiment: a refuted claim is an "
    "answer too. It stays open while any of them is untested, inconclusive or missing."
)
ANSWERED = ("held", "refuted")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A criterion as the plan words it, what must be known for it, and the claims, as (experiment, claim), that tell."""

    text: str
    asks: str
    claims: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A claim of a box: its experiment's newest run with a result and the answer there, None where there is none."""

    experiment: str
    claim: str
    digest: Digest | None
    answer: Answer | None

    @property
    def answered(self) -> bool:
        return self.answer is not None and self.answer.outcome in ANSWERED

    def open_because(self) -> str:
        """Why this is no answer yet."""
        if self.digest is None:
            return f"there is no run with a result: `invoke exp.{self.experiment}`"
        if self.answer is None:
            return "the newest run has no such claim; run the experiment again"
        if self.answer.lacking:
            return f"untested, for want of {', '.join(self.answer.lacking)}"
        return f"{self.answer.outcome}: {self.answer.reason}"


@dataclass(frozen=True, kw_only=True)
class Ticked:
    """A box with the evidence for each of its claims."""

    box: Box
    evidence: tuple[Evidence, ...]

    @property
    def ticked(self) -> bool:
        return all(e.answered for e in self.evidence)

    def open(self) -> tuple[tuple[str, tuple[Evidence, ...]], ...]:
        """What is not answered, put together by the reason."""
        found: dict[str, list[Evidence]] = {}
        for e in self.evidence:
            if not e.answered:
                found.setdefault(e.open_because(), []).append(e)
        return tuple((reason, tuple(those)) for reason, those in found.items())


def decide(newest: Mapping[str, Digest], *, boxes: tuple[Box, ...]) -> tuple[Ticked, ...]:
    """Every box with its evidence; `newest` holds by experiment its newest run that has a result."""
    return tuple(
        Ticked(
            box=box,
            evidence=tuple(
                Evidence(
                    experiment=experiment,
                    claim=claim,
                    digest=newest.get(experiment),
                    answer=newest[experiment].answers.get(claim) if experiment in newest else None,
                )
                for experiment, claim in box.claims
            ),
        )
        for box in boxes
    )


def _of(experiment: str, *claims: str) -> tuple[tuple[str, str], ...]:
    return tuple((experiment, claim) for claim in claims)


BOXES = (
    Box(
        text="Understood: RadixCache hit/miss behavior",
        asks="What does the cache find again, what does that save, and what does it forget when its pool is too small?",
        claims=_of(
            "radix",
            *("cold-start", "prefix-hit", "ttft-falls", "hit-share"),
            *("eviction", "eviction-cost", "eviction-order"),
        ),
    ),
    Box(
        text="Measured: Prefill vs decode kernel characteristics",
        asks="Which kernels take the time, are those of prefill and decode the same, and how do they grow with the context?",
        claims=(
            *_of("baseline", "attention-dominates", "two-kinds-of-kernels"),
            *_of("attention", "decode-reads-the-context", "prefill-grows-faster", "flashinfer-reads-it-too"),
        ),
    ),
    Box(
        text="Compared: FlashInfer vs Triton backend performance",
        asks="Which of the two prefills and decodes faster, launches its kernels with less overhead, and keeps the GPU busier?",
        claims=_of("attention", "prefill-triton", "decode-triton", "launch-overhead", "sm-use"),
    ),
    Box(
        text="Analyzed: TP scaling with NVLink topology",
        asks="What do two and four GPUs bring, what does it cost to leave NVLink, and how much of the time is communication?",
        claims=_of(
            "tp",
            *("less-than-double", "speed-up", "four-add-less"),
            *("pcie-prefill", "pcie-decode", "custom-all-reduce", "communication"),
        ),
    ),
    Box(
        text="Identified: Key bottlenecks in SGLang serving",
        asks="What limits a server: stalls of decoding behind prefill, the scheduler's own work, the order of service, the pool?",
        claims=(
            *_of("baseline", "batching-pays", "newcomers-interrupt"),
            *_of("batching", "batch-follows-load", "forming-is-cheap", "retraction", "work-twice"),
            *_of("overlap", "processed-late", "processed-in-turn"),
            *_of("policies", "lpm-hits-more", "lpm-mean-ttft"),
            *_of("memory", "knee", "small-pool-small-batch"),
        ),
    ),
)
