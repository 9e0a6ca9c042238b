"""Experiments: what is read from a file, what is refused, and what an experiment file may not say."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lab import places
from lab.claims import Claim, Measure
from lab.errors import LabError
from lab.experiment import (
    Experiment,
    Variant,
    check,
    experiment_names,
    first_line,
    load_experiment,
    load_file,
)
from lab.workload import Chat, RandomIds, Workload

RADIX = load_experiment("radix", folder=places.EXPERIMENTS)
NAMES = experiment_names(places.EXPERIMENTS)


def small(**changes: object) -> Experiment:
    """A sound experiment with one variant, one load and one claim."""
    claim = Claim(
        name="claim",
        says="It is so.",
        measure=Measure(table="loads", load="load", column="hit_rate"),
        variant="one",
        op=">",
        threshold=0.5,
    )
    experiment = Experiment(
        name="small",
        question="Is it?",
        mechanism="So.",
        sources=(),
        server=(),
        variants=(Variant(name="one", says="one"),),
        loads=(RandomIds(name="load", seed=1, prompts=2, input_tokens=8, output_tokens=2),),
        claims=(claim,),
        try_next=(),
    )
    return replace(experiment, **changes)  # type: ignore[arg-type]


def with_claim(**changes: object) -> Experiment:
    return small(claims=(replace(small().claims[0], **changes),))  # type: ignore[arg-type]


def with_measure(**changes: object) -> Experiment:
    return with_claim(measure=replace(small().claims[0].measure, **changes))  # type: ignore[arg-type]


def refused(experiment: Experiment) -> LabError:
    with pytest.raises(LabError) as caught:
        check(experiment)
    assert caught.value.why
    assert caught.value.fix
    return caught.value


def test_radix_has_the_three_expectations_of_the_plan() -> None:
    """Cold start, hits that shorten TTFT against the control, eviction; testable without any capability."""
    experiment = RADIX.experiment
    assert {"cold-start", "prefix-hit", "ttft-falls", "eviction"} <= {c.name for c in experiment.claims}
    assert all(not claim.needs for claim in experiment.claims)
    control = next(v for v in experiment.variants if v.name == "cache-off")
    assert control.args == ("--disable-radix-cache",)
    assert experiment.repeats >= 3


def test_radix_loads_fit_the_story_of_its_pool() -> None:
    pool = int(RADIX.experiment.server[RADIX.experiment.server.index("--max-total-tokens") + 1])
    loads = {load.name: load for load in RADIX.experiment.loads}
    assert loads["chat"].working_set_tokens() < pool
    assert loads["shared"].working_set_tokens() < pool
    assert loads["pressure"].working_set_tokens() > 1.5 * pool


def test_the_source_is_the_file_with_its_hash() -> None:
    file = places.EXPERIMENTS / "radix.py"
    assert RADIX.text == file.read_text(encoding="utf-8")
    assert RADIX.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_sound_and_named_like_its_file(name: str) -> None:
    source = load_experiment(name, folder=places.EXPERIMENTS)
    assert source.experiment.name == name
    assert first_line(places.EXPERIMENTS / f"{name.replace('-', '_')}.py")
    for text in (source.experiment.question, source.experiment.mechanism, *source.experiment.sources):
        assert text.strip()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_names_no_host_path_or_image(name: str) -> None:
    source = load_experiment(name, folder=places.EXPERIMENTS)
    words = [*source.experiment.server, *(a for v in source.experiment.variants for a in v.args)]
    for word in words:
        assert not word.startswith(("/", "~", ".")), f"{word} is a path"
        assert word not in ("--host", "--port", "--model-path", "--device"), (
            f"{word} belongs to site and stack"
        )
    assert not re.search(r"https?://|localhost|\d+\.\d+\.\d+\.\d+|docker|:latest|\bimage\b", source.text)
    assert not re.search(r"[\"'(\s](/[a-z]+){2,}", source.text)
    assert "import os" not in source.text
    assert "pathlib" not in source.text


@pytest.mark.parametrize("name", ["radiks", "", "../radix", "radix.py", "RADIX", "__init__", "radix\n"])
def test_unknown_experiment_lists_the_known_ones(name: str) -> None:
    with pytest.raises(LabError, match="unknown experiment") as caught:
        load_experiment(name, folder=places.EXPERIMENTS)
    assert all(known in caught.value.why for known in NAMES)


def test_a_file_without_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("EXPERIMENT = 3\n")
    with pytest.raises(LabError, match=r"empty\.py defines no experiment"):
        load_file(tmp_path / "empty.py")


def test_a_sound_experiment_passes() -> None:
    check(small())


def test_unknown_variant_in_a_claim_lists_the_known_ones() -> None:
    for bad in (with_claim(variant="two"), with_claim(against="two")):
        error = refused(bad)
        assert error.problem == "unknown variant 'two'"
        assert "one" in error.why


def test_unknown_load_in_a_claim_lists_the_known_ones() -> None:
    error = refused(with_measure(load="lod"))
    assert error.problem == "unknown load 'lod'"
    assert "did you mean 'load'" in error.fix


def test_unknown_variant_of_a_load() -> None:
    load = replace(small().loads[0], variants=("one", "three"))
    assert refused(small(loads=(load,))).problem == "unknown variant 'three'"


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (with_claim(op="="), "unknown op '='"),
        (with_claim(needs=("gpus",)), "unknown capability 'gpus'"),
        (with_claim(threshold=float("nan")), "threshold is nan"),
        (with_measure(table="request"), "unknown table 'request'"),
        (with_measure(rows="second"), "unknown rows 'second'"),
        (with_measure(reduce="p90"), "unknown reduce 'p90'"),
    ],
)
def test_a_wrong_word_in_a_claim_is_found_before_anything_runs(bad: Experiment, problem: str) -> None:
    assert problem in refused(bad).problem


@pytest.mark.parametrize("name", ["Two", "a b", "", "1st", "a/b", "a_b", "é"])
def test_names_that_cannot_be_folders(name: str) -> None:
    assert "variant name" in refused(small(variants=(Variant(name=name, says=""),))).problem


def test_a_name_twice() -> None:
    variants = small().variants * 2
    assert "repeated variant name 'one'" in refused(small(variants=variants)).problem


class Dreamt(RandomIds):
    """A load of a dataset for which the lab has no program."""

    dataset = "sharegpt"


def test_unknown_dataset_lists_the_known_ones() -> None:
    load = Dreamt(name="load", seed=1, prompts=2, input_tokens=8, output_tokens=2)
    error = refused(small(loads=(load,)))
    assert error.problem == "unknown dataset 'sharegpt'"
    assert "generated-shared-prefix" in error.why


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 0},
        {"concurrency": 10**9},
        {"rate_per_s": 0.0},
        {"rate_per_s": -1.0},
        {"rate_per_s": float("nan")},
        {"rate_per_s": float("inf")},
        {"prompts": -3},
        {"input_tokens": 0},
        {"output_tokens": 10**12},
    ],
)
def test_numbers_that_make_no_sense(changes: dict[str, float]) -> None:
    load: Workload = replace(small().loads[0], **changes)  # type: ignore[arg-type]
    assert next(iter(changes)) in refused(small(loads=(load,))).problem


def test_a_chat_without_questions() -> None:
    chat = Chat(name="load", seed=0, questions=(), system_chars=10, system_tokens=3, output_tokens=2)
    assert "questions" in refused(small(loads=(chat,))).problem


def test_loads_of_a_variant() -> None:
    names = [load.name for load in RADIX.experiment.loads_of("cache-off")]
    assert "pressure" not in names
    assert {"warmup", "chat", "shared"} <= set(names)


# ---- files that cannot be used

GOOD = (places.EXPERIMENTS / "radix.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('question="', 'question=1 and "', None),
        ("repeats=3", "repeats='3'", "repeats is not what it should be"),
        ('name="cache-on"', "name=7", "variants: 7 is not what it should be"),
        ("threshold=0.9", 'threshold="0.9"', "is not what it should be"),
        ("EXPERIMENT = ", "raise OSError('no disk')\nEXPERIMENT = ", "OSError in line"),
        ("EXPERIMENT = ", "import nothing_of_this_name\nEXPERIMENT = ", "ModuleNotFoundError in line"),
        ('name="radix"', 'name="radiks"', "says name='radiks'"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, old: str, new: str, problem: str | None) -> None:
    text = (
        GOOD if old in GOOD else GOOD.replace("EXPERIMENT = Experiment(", f"EXPERIMENT = Experiment({old},")
    )
    (tmp_path / "radix.py").write_text(text.replace(old, new, 1), encoding="utf-8")
    if problem is None:
        load_experiment("radix", folder=tmp_path)
        return
    with pytest.raises(LabError, match=re.escape(problem)):
        load_experiment("radix", folder=tmp_path)
