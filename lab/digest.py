"""A run in a few lines, read from its small files: what was asked, on what, and what came of it. In goes a run, out comes
a `Digest`, always: a file that is missing, cut or of a newer lab becomes a reason in it. Quick, for pages about many runs."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec

from lab.claims import Outcome
from lab.errors import LabError
from lab.rundir import Run, read_json, refuse_newer

State = Literal["reported", "cut short", "unreported", "unreadable"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a claim; `lacking` names what it needs and the machine has not."""

    outcome: str
    reason: str
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A run, for a line of a table.

    `state` is `reported` for one that was sealed and judged; for every other, `problem` says what is wrong with it. `used` and
    `trials` count trials, `used` None where that is not known. `scaled` tells that loads took small numbers.
    """

    run: Run
    state: State
    problem: str = ""
    question: str = ""
    stack: str = ""
    sglang: str = ""
    model: str = ""
    machine: str = ""
    scaled: bool = False
    trials: int = 0
    used: int | None = None
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        return self.run.path.parent.name

    @property
    def name(self) -> str:
        return self.run.path.name

    def when(self) -> str:
        """When it began, as its name says: `2026-11-23 13:50` (UTC)."""
        n = self.name
        return f"{n[:4]}-{n[4:6]}-{n[6:8]} {n[9:11]}:{n[11:13]}"

    def counts(self) -> str:
        """Its verdicts in words, such as `5 held, 1 refuted`; empty without any."""
        found = Counter(answer.outcome for answer in self.answers.values())
        return ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome])

    def used_of(self) -> str:
        """How many of its trials could be used."""
        return f"{'?' if self.used is None else self.used} of {self.trials}"


@dataclass(frozen=True, kw_only=True)
class _Load:
    scaled: str = ""


@dataclass(frozen=True, kw_only=True)
class _Server:
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Trial:
    name: str
    server: _Server = _Server()
    loads: tuple[_Load, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Claim:
    name: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What of plan.json is read here; whatever else stands there is passed over."""

    schema: int
    question: str
    stack: str
    sglang: str
    model: str
    trials: tuple[_Trial, ...]
    claims: tuple[_Claim, ...]
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    claim: str
    outcome: Outcome
    reason: str


def read_digest(run: Run) -> Digest:
    """The run's digest; never raises for what stands in the run's files."""
    try:
        plan = _read_plan(run)
    except LabError as error:
        return Digest(run=run, state="unreadable", problem=error.brief)
    try:
        answers, problem = _answers(run, plan), ""
    except LabError as error:
        answers, problem = {}, error.brief
    state: State = "unreadable" if problem else "reported"
    if not run.sums.is_file():
        state = "cut short"
        problem = (
            f"it was cut short, or is still running: {_ok(run, plan)} of {len(plan.trials)} trials are ok"
        )
    elif not run.verdicts.exists():
        state, problem = "unreported", "it was measured and not reported"
    return Digest(
        run=run,
        state=state,
        problem=problem,
        question=plan.question,
        stack=plan.stack,
        sglang=plan.sglang,
        model=plan.model,
        machine=_machine(run, plan),
        scaled=any(load.scaled for trial in plan.trials for load in trial.loads),
        trials=len(plan.trials),
        used=_used(run),
        answers=answers,
    )


def _read_plan(run: Run) -> _Plan:
    try:
        text = run.plan.read_bytes()
        refuse_newer(msgspec.json.decode(text, type=_Schema).schema, where="plan.json")
        return msgspec.json.decode(text, type=_Plan)
    except OSError as error:
        raise LabError(f"plan.json cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LabError("plan.json is not a plan of this lab", why=str(error)) from error


@dataclass(frozen=True, kw_only=True)
class _Schema:
    schema: int


def _answers(run: Run, plan: _Plan) -> dict[str, Answer]:
    """By claim what came of it; nothing for a run without verdicts."""
    if not run.verdicts.exists():
        return {}
    try:
        verdicts = msgspec.convert(read_json(run.verdicts).get("verdicts"), tuple[_Verdict, ...])
    except msgspec.ValidationError as error:
        raise LabError("verdicts.json holds no verdicts of this lab", why=str(error)) from error
    except OSError as error:
        raise LabError(f"verdicts.json cannot be read: {error.strerror}") from error
    needs = {claim.name: claim.needs for claim in plan.claims}
    return {
        v.claim: Answer(
            outcome=v.outcome,
            reason=v.reason,
            lacking=tuple(n for n in needs.get(v.claim, ()) if n not in plan.capabilities)
            if v.outcome == "untested"
            else (),
        )
        for v in verdicts
    }


def _used(run: Run) -> int | None:
    """How many trials the tables call valid; None without the table."""
    try:
        text = (run.tables / "trials.csv").read_text(encoding="utf-8")
        return [row["validity"] for row in csv.DictReader(io.StringIO(text))].count("valid")
    except (OSError, UnicodeDecodeError, csv.Error, KeyError):
        return None


def _ok(run: Run, plan: _Plan) -> int:
    count = 0
    for trial in plan.trials:
        try:
            status = read_json(run.trial(trial.name).status).get("status")
        except (LabError, OSError):
            continue
        count += status == "ok"
    return count


def _machine(run: Run, plan: _Plan) -> str:
    """CPUs, and the GPUs that servers had, in a few words."""
    try:
        told = read_json(run.environment).get("machine")
    except (LabError, OSError):
        told = None
    machine = told if isinstance(told, dict) else {}
    gpus = {gpu for trial in plan.trials for gpu in trial.server.gpus}
    cpus = f"{machine.get('cpus_usable', '?')} CPUs of {machine.get('cpu', 'an unknown kind')}"
    return f"{cpus}, {_gpus(run, gpus) if gpus else 'no GPU'}"


def _gpus(run: Run, used: set[str]) -> str:
    try:
        listed = json.loads(run.hardware.read_text(encoding="utf-8"))["gpus"]
        names = sorted({str(gpu["name"]) for gpu in listed if gpu["uuid"] in used})
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return f"{len(used)} GPU{'s' * (len(used) != 1)} {' and '.join(names)}".rstrip()
