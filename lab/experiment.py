"""Experiments: a question, its mechanism, variants, loads and claims, one file each in lab/experiments/.

An experiment names no host, path or image; `load_experiment` finds it by name, checks it, and returns it
together with the bytes of its file, whose hash is registered in the plan."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
import re
import traceback
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec

from lab.claims import By, Capability, Claim, Op, Reduce, Rows, Table
from lab.errors import LabError, unknown_name
from lab.hardware.fabric import LinkWish
from lab.workload import Workload

NAME = re.compile(r"[a-z][a-z0-9-]*")

Probe = Literal["off", "batches", "requests", "cache"]
Picture = Literal[
    "ttft", "cached-share", "eviction", "batches", "pools", "tree", "service", "steps", "measures"
]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs between two servers: arguments added to those every server of the experiment gets.

    With GPUs, `link` is the slowest way between any two of a server's, and `same_numa` asks for one NUMA node.
    `needs` is what the machine must have; where it is absent the variant is left out, with the reason on the page.
    """

    name: str
    says: str
    args: tuple[str, ...] = ()
    link: LinkWish = "any"
    same_numa: bool = False
    needs: tuple[Capability, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of somebody else, printed apart from what was measured: its setup, source, and whether it compares."""

    figure: str
    setup: str
    source: str
    comparable: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question about SGLang with everything needed to answer it.

    `mechanism` is Markdown that teaches how the thing works; `sources` are the places in SGLang's source
    to read; `server` are arguments of every variant's server; `try_next` closes the report. `probe` is how much
    is written down inside the server (docs/decisions/0011-probe.md), `pictures` what the report draws, as far as there are data.
    """

    name: str
    question: str
    mechanism: str
    sources: tuple[str, ...]
    server: tuple[str, ...]
    variants: tuple[Variant, ...]
    loads: tuple[Workload, ...]
    claims: tuple[Claim, ...]
    try_next: tuple[str, ...]
    published: tuple[Published, ...] = ()
    repeats: int = 3
    probe: Probe = "batches"
    pictures: tuple[Picture, ...] = ("ttft", "cached-share", "eviction")

    def loads_of(self, variant: str) -> tuple[Workload, ...]:
        """The loads a trial of `variant` runs, in order."""
        return tuple(load for load in self.loads if not load.variants or variant in load.variants)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An experiment together with the text it was read from; `sha256` is of that text."""

    experiment: Experiment
    text: str
    sha256: str


def experiment_names(folder: Path) -> tuple[str, ...]:
    """Names of the experiments in `folder`: its Python files, underscores as dashes."""
    return tuple(sorted(p.stem.replace("_", "-") for p in folder.glob("*.py") if p.stem != "__init__"))


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring, read without importing it (invoke --list must be quick)."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def load_experiment(name: str, *, folder: Path) -> Source:
    """Read, import and check the experiment called `name`. Raises LabError for one that is not there or not sound."""
    path = folder / f"{name.replace('-', '_')}.py"
    if not NAME.fullmatch(name) or not path.is_file():
        raise unknown_name("experiment", name, experiment_names(folder))
    text = path.read_text(encoding="utf-8")
    experiment = load_file(path)
    if experiment.name != name:
        raise LabError(
            f"{path.name} says name={experiment.name!r}",
            why="the command, the run's folder and the file have one name",
            fix=f"write name={name!r}, or rename the file",
        )
    return Source(experiment=experiment, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def load_file(path: Path) -> Experiment:
    """The experiment that a Python file defines as EXPERIMENT, checked."""
    spec = importlib.util.spec_from_file_location(f"lab_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:  # a plain .py file always has both
        raise RuntimeError(f"no import loader for {path.name}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise LabError(
            f"{path.name} cannot be read: syntax error in line {error.lineno}",
            why=str(error.msg),
            fix="correct the file",
        ) from error
    except LabError:
        raise
    except Exception as error:  # whatever a person's file may raise
        line = next(
            (
                f.lineno
                for f in reversed(traceback.extract_tb(error.__traceback__))
                if f.filename == str(path)
            ),
            "?",
        )
        raise LabError(
            f"{path.name} cannot be read: {type(error).__name__} in line {line}",
            why=str(error),
            fix="correct the file",
        ) from error
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise LabError(
            f"{path.name} defines no experiment",
            why="the lab looks for a module-level EXPERIMENT = Experiment(...)",
            fix="copy lab/experiments/radix.py and change it",
        )
    _check_types(experiment, where=path.name)
    check(experiment)
    return experiment


def _check_types(experiment: Experiment, *, where: str) -> None:
    """A value of the wrong type must not be found out after the measurement."""
    parts: list[tuple[str, object, object]] = []
    for field in fields(Experiment):
        value = getattr(experiment, field.name)
        if field.name in ("variants", "loads", "claims", "published"):
            items = value if isinstance(value, tuple) else (value,)
            parts += [(f"{field.name}: {getattr(item, 'name', item)!r}", item, type(item)) for item in items]
        parts.append((field.name, value, get_type_hints(Experiment)[field.name]))
    for name, value, wanted in parts:
        try:
            if is_dataclass(wanted):
                msgspec.convert(msgspec.to_builtins(value), wanted)
            elif get_origin(wanted) is tuple and isinstance(get_args(wanted)[0], type):
                if not isinstance(value, tuple) or not all(isinstance(v, get_args(wanted)[0]) for v in value):
                    raise msgspec.ValidationError(f"Expected a tuple of {get_args(wanted)[0].__name__}")
            else:
                msgspec.convert(value, wanted)
        except (msgspec.ValidationError, TypeError) as error:
            raise LabError(
                f"{where}: {name} is not what it should be", why=str(error), fix="correct the file"
            ) from error


def check(experiment: Experiment) -> None:
    """Raise LabError unless names are unique and every claim and load refers to what exists."""
    variants = [v.name for v in experiment.variants]
    loads = [load.name for load in experiment.loads]
    for kind, names in (
        ("variant", variants),
        ("load", loads),
        ("claim", [c.name for c in experiment.claims]),
    ):
        for name in names:
            if not NAME.fullmatch(name) or names.count(name) > 1:
                raise LabError(
                    f"experiment {experiment.name!r}: bad or repeated {kind} name {name!r}",
                    why="names become folders and table keys",
                    fix="use lower-case letters, digits and dashes, each name once",
                )
    for load in experiment.loads:
        load.check()
        for name in load.variants:
            _known("variant", name, variants)
    for claim in experiment.claims:
        for measure in (claim.measure, claim.base or claim.measure):
            _known("load", measure.load, loads)
        for name in (claim.variant, *((claim.against,) if claim.against else ())):
            _known("variant", name, variants)
        _check_words(claim)
        _check_sides(claim, experiment)


def _check_sides(claim: Claim, experiment: Experiment) -> None:
    """Each side of a claim must be measured: its variant runs its load, and its rows are of its table."""
    sides = {(claim.variant, claim.measure), (claim.against or claim.variant, claim.base or claim.measure)}
    for variant, measure in sorted(sides, key=str):
        run = [load.name for load in experiment.loads_of(variant)]
        if measure.load not in run:
            raise LabError(
                f"claim {claim.name!r}: variant {variant!r} does not run load {measure.load!r}",
                why=f"it runs {', '.join(run)}",
                fix="name another load, or let the load's variants include it",
            )
        rows = {"requests": ("all", "first", "later"), "forwards": ("all", "prefill", "decode")}
        if measure.rows not in rows.get(measure.table, get_args(Rows)):
            raise LabError(
                f"claim {claim.name!r}: the table {measure.table!r} has no rows {measure.rows!r}",
                why="first and later are of requests, prefill and decode of forwards",
                fix=f"use one of {', '.join(rows[measure.table])}",
            )


def _check_words(claim: Claim) -> None:
    """A wrong word in a claim must not be found out after the measurement."""
    measures = (claim.measure, claim.base or claim.measure)
    for kind, word, valid in (
        ("op", claim.op, get_args(Op)),
        ("by", claim.by, get_args(By)),
        *(("table", measure.table, get_args(Table)) for measure in measures),
        *(("rows", measure.rows, get_args(Rows)) for measure in measures),
        *(("reduce", measure.reduce, get_args(Reduce)) for measure in measures),
        *(("capability", need, get_args(Capability)) for need in claim.needs),
    ):
        if word not in valid:
            raise unknown_name(kind, word, valid)
    if not math.isfinite(claim.threshold):
        raise LabError(
            f"claim {claim.name!r}: threshold is {claim.threshold}",
            why="a measurement is compared with it",
            fix="use a finite number",
        )


def _known(kind: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise unknown_name(kind, name, names)
