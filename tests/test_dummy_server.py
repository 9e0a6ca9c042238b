"""Dummy weights on the real servers of both releases, through the lab: an entry with the architectures of the catalogue, made
small enough for a CPU, is added to a copy of the repository and served there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from checkout import Checkout, make_checkout
from realstack import real_stack

from lab.rundir import Run, read_json

# Two layers, the vocabulary and all else as in the catalogue.
ENTRIES = """
import dataclasses

CATALOGUE = {**CATALOGUE} | {
    f"small-{name}": dataclasses.replace(
        CATALOGUE[name], name=f"small-{name}", hidden=256, intermediate=512, layers=2, heads=8, kv_heads=4, head_dim=32
    )
    for name in ("llama-3.1-8b", "qwen2.5-7b", "mistral-7b")
}
"""
EXPERIMENT = '''\
"""A load of random ids on dummy weights, one rank, and as many as cannot be."""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import Chat, RandomIds, SharedPrefix

EXPERIMENT = Experiment(
    name="dummy",
    question="Do dummy weights serve?",
    mechanism="They do.",
    sources=(),
    server=("--max-total-tokens", "8192"),
    variants=(
        Variant(name="one", says="one rank"),
        Variant(name="three", says="heads that cannot be shared", args=("--tp-size", "3")),
    ),
    loads=(
        RandomIds(name="random", seed=1, prompts=6, input_tokens=256, output_tokens=24, concurrency=2),
        SharedPrefix(
            name="shared", seed=3, groups=2, prompts_per_group=3, prefix_tokens=256, question_tokens=16, output_tokens=8
        ),
        Chat(name="chat", seed=0, questions=("What?", "And?"), system_chars=2000, system_tokens=500, output_tokens=8),
    ),
    claims=(
        Claim(
            name="hits", says="Prefixes are found.", measure=Measure(table="loads", load="shared", column="hit_rate"),
            variant="one", op=">", threshold=0.5,
        ),
    ),
    try_next=(),
    repeats=1,
)
'''
BUSY = "client was not the bottleneck"  # what else runs on this machine decides that


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> Checkout:
    made = make_checkout(tmp_path_factory.mktemp("clone"))
    catalogue = made.path / "lab/models.py"
    catalogue.write_text(catalogue.read_text() + ENTRIES)
    (made.path / "lab/experiments/dummy.py").write_text(EXPERIMENT)
    return made


@pytest.mark.parametrize(
    ("stack", "model"),
    [("cpu", "llama-3.1-8b"), ("cpu046", "qwen2.5-7b"), ("cpu", "qwen2.5-7b"), ("cpu046", "mistral-7b")],
)
def test_a_dummy_is_served_measured_and_named_as_one(checkout: Checkout, stack: str, model: str) -> None:
    real_stack(stack)
    code, output = checkout.invoke(
        *("exp.dummy", "--stack", stack, "--runtime", "process"),
        *("--model", f"small-{model}", "--weights", "dummy"),
    )
    assert code in (0, 2), output  # 2 where the machine was too busy
    assert "Traceback" not in output
    run = Run(checkout.newest_run("dummy"))
    assert read_json(run.trial("000-one-r0").status)["status"] == "ok", output
    checks = pd.read_csv(run.tables / "checks.csv")
    assert set(checks.loc[~checks["ok"], "name"]) <= {BUSY}, checks[~checks["ok"]].to_string()
    requests = pd.read_csv(run.tables / "requests.csv").set_index("load")
    assert set(requests.loc["random", "completion_tokens"]) == {24}
    assert requests.loc["random", "prompt_tokens"].between(245, 267).all()
    # The first token is sent at once: every request has a gap for each of the others.
    bench = json.loads(run.trial("000-one-r0").load("random").bench.read_text().splitlines()[-1])
    assert [len(gaps) for gaps in bench["itls"]] == [23] * 6
    assert all(0 < ttft < 60 for ttft in bench["ttfts"])
    assert all(text.isascii() and text.isprintable() for text in bench["generated_texts"])
    _says_what_it_is(run, model=model)


def _says_what_it_is(run: Run, *, model: str) -> None:
    plan = read_json(run.plan)
    assert (plan["model"], plan["weights"]) == (f"small-{model}", "dummy")
    argv = plan["trials"][0]["server"]["argv"]  # type: ignore[index]
    assert argv[argv.index("--load-format") + 1] == "dummy"
    why = plan["left_out"]["three"]  # type: ignore[index]
    assert ("which 3 tensor-parallel ranks cannot share equally" in why) is (plan["stack"] == "cpu")
    assert ("SGLang 0.4.6.post5 has no --tp-size 3" in why) is (plan["stack"] == "cpu046")
    report = run.report.read_text()
    first_screen = report[: report.index("| claim |")]
    assert "**The weights are dummies" in first_screen
    assert re.search(r"\| model \| small-\S+, weights: dummy, SHA-256", report)
    environment = read_json(run.environment)
    assert environment["model"]["weights"] == "dummy"  # type: ignore[index]
    reasons = environment["choices"]["reasons"]  # type: ignore[index]
    assert any(reason.startswith(f"fit: small-{model}: ") for reason in reasons)
    assert any("8,192 asked for" in reason for reason in reasons)
