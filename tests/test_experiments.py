"""Experiments on real servers: adding one is copying a file, and what the probe tells comes through to verdicts on every release
and with several ranks."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from checkout import Checkout, make_checkout
from realstack import real_stack

from lab.probed import FITS, IN_USE
from lab.rundir import Run

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("clone"))


def copy(checkout: Checkout, name: str, *, of: str) -> None:
    """What the README tells a user to do."""
    folder = checkout.path / "lab" / "experiments"
    text = (folder / f"{of}.py").read_text(encoding="utf-8")
    (folder / f"{name}.py").write_text(text.replace(f'name="{of}"', f'name="{name}"', 1), encoding="utf-8")


def measured(checkout: Checkout, name: str, *words: str) -> tuple[Run, dict[str, pd.DataFrame]]:
    """One repeat; its run, and its tables. What a busy machine does to a client is no matter here."""
    code, output = checkout.invoke(f"exp.{name}", "--repeats", "1", "--runtime", "process", *words)
    run = Run(checkout.newest_run(name))
    checks = pd.read_csv(run.tables / "checks.csv")
    failed = set(checks.loc[~checks["ok"], "name"])
    assert failed <= {"client was not the bottleneck", "client kept its rate"}, checks[~checks["ok"]].to_dict(
        "records"
    )
    assert code == (2 if failed else 0), output
    assert run.report.is_file()
    return run, {
        table: pd.read_csv(run.tables / f"{table}.csv")
        for table in ("loads", "requests", "forwards", "checks")
    }


def verdicts(run: Run) -> dict[str, dict[str, object]]:
    return {v["claim"]: v for v in json.loads(run.verdicts.read_text())["verdicts"]}


@pytest.mark.parametrize("stack", ["cpu", "cpu046"])
def test_a_copied_file_is_an_experiment(checkout: Checkout, stack: str) -> None:
    real_stack(stack)
    copy(checkout, "copied", of="overlap")
    run, tables = measured(checkout, "copied", "--stack", stack)
    checks = tables["checks"]
    assert not checks[checks["name"].isin([FITS, IN_USE])]["detail"].str.startswith("untested").any()
    assert checks.loc[checks["name"] == FITS, "detail"].str.contains("prompt_tokens").all()
    late = tables["loads"][tables["loads"]["role"] == "measure"].groupby("variant")["late_share"].mean()
    assert late["overlap"] > 0.9
    assert late["in-turn"] == 0
    same = tables["requests"].groupby("variant")["same_answer"].mean()
    assert same["in-turn"] == 1, "greedy in float32: the scheduler changes no answer"
    assert pd.isna(same["overlap"]), "the reference is compared with nothing"
    untested = {name for name, v in verdicts(run).items() if v["outcome"] == "untested"}
    assert untested == {"throughput", "time-per-token", "gpu-waits-less"}
    assert all("gpu" in str(verdicts(run)[name]["reason"]) for name in untested)


def test_two_ranks_give_the_answers_of_one(checkout: Checkout) -> None:
    run, tables = measured(checkout, "tp")
    two = next(run.trials.glob("*-tp2-*"))
    assert len(list((two / "events").glob("events-*.jsonl"))) == 2
    details = tables["checks"][tables["checks"]["trial"] == two.name].set_index("name")["detail"]
    assert "2 ranks" in details[IN_USE]
    same = tables["requests"].groupby(["variant", "load"])["same_answer"].mean()
    assert same["tp2", "single"] == 1
    assert verdicts(run)["same-answers"]["value"] == 1
    plan = json.loads(run.plan.read_text())
    assert set(plan["left_out"]) == {"tp2-nccl", "tp2-pxb", "tp2-sys", "tp4"}
    assert all(reason.startswith("this machine has no gpu") for reason in plan["left_out"].values())


def test_pressure_shows_in_the_pools_and_nobody_loses_a_token(checkout: Checkout) -> None:
    """Retraction on the release without a counter for it: the probe's events, its log lines, and the clients agree."""
    real_stack("cpu046")
    _, tables = measured(checkout, "batching", "--stack", "cpu046")
    tight = tables["loads"][
        (tables["loads"]["variant"] == "tight") & (tables["loads"]["load"] == "surge")
    ].iloc[0]
    assert tight["retracted_requests"] >= 1
    assert tight["retraction_passes"] >= 1
    assert tight["kv_used_share_max"] > 0.9
    requests = tables["requests"]
    surge = requests[(requests["variant"] == "tight") & (requests["load"] == "surge")]
    assert surge["retractions"].sum() == tight["retracted_requests"]
    assert surge["completion_tokens"].nunique() == 1
    assert surge["wait_ms"].notna().all()
