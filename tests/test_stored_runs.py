"""Real runs, stored: one that went well, one that was killed, one of SGLang 0.4.6.post5 on a machine that was too busy. What is
derived from them is rebuilt and compared."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from lab.errors import LabError
from lab.report.render import Analysis, analyse
from lab.rundir import Run, verify

DATA = Path(__file__).parent / "data" / "runs"


def unpack(name: str, folder: Path) -> Run:
    with tarfile.open(DATA / f"{name}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    (path,) = folder.iterdir()
    return Run(path)


def derived(run: Run) -> dict[str, str]:
    files = [run.report, run.verdicts, *run.tables.glob("*.csv")]
    return {file.relative_to(run.path).as_posix(): file.read_text() for file in files}


def rebuilt(run: Run) -> tuple[Analysis, dict[str, str], dict[str, str]]:
    before = derived(run)
    for file in (run.report, run.verdicts):
        file.unlink()
    shutil.rmtree(run.tables)
    return analyse(run), before, derived(run)


def test_the_good_run_is_rebuilt_to_the_byte(tmp_path: Path) -> None:
    run = unpack("radix-good", tmp_path)
    verify(run)
    analysis, before, after = rebuilt(run)
    assert after == before
    assert analysis.unusable == ()
    assert {v.outcome for v in analysis.verdicts} == {"held"}
    assert sorted(p.name for p in run.plots.iterdir()) == ["cached-share.png", "eviction.png", "ttft.png"]


def test_the_good_run_shows_what_radix_claims(tmp_path: Path) -> None:
    """The same from the raw files by hand: sums of the client's own lists, without the lab's tables."""
    run = unpack("radix-good", tmp_path)
    loads = pd.read_csv(run.tables / "loads.csv")
    for row in loads[loads["load"].isin(["shared", "pressure"])].itertuples():
        bench = json.loads((run.trials / row.trial / "loads" / row.load / "bench.jsonl").read_text())
        assert sum(bench["cached_tokens"]) == row.cached_tokens
        assert sum(bench["input_lens"]) == row.prompt_tokens
        assert row.hit_rate == pytest.approx(sum(bench["cached_tokens"]) / sum(bench["input_lens"]), abs=1e-6)
    pressure = loads[loads["load"] == "pressure"]
    assert (pressure["evicted_tokens"] > pressure["pool_tokens"]).all()
    assert (pressure["lru_agreement"] == 1).all()


def test_the_crashed_run_says_where_it_stopped(tmp_path: Path) -> None:
    run = unpack("crashed", tmp_path)
    with pytest.raises(LabError, match="no SHA256SUMS"):
        verify(run)
    analysis, before, after = rebuilt(run)
    assert after == before
    reasons = [reason for _, reason in analysis.unusable]
    assert len(reasons) == 2
    assert "load chat: server: was ended by SIGKILL" in reasons[0]
    assert "the lab was killed during this trial" in reasons[1]
    assert {v.outcome for v in analysis.verdicts} == {"untested"}
    assert "cut short" in after["report.md"]


def test_the_run_of_an_older_release_says_what_it_cannot_know(tmp_path: Path) -> None:
    run = unpack("twin046-busy", tmp_path)
    verify(run)
    analysis, before, after = rebuilt(run)
    assert after == before
    checks = pd.read_csv(run.tables / "checks.csv")
    # Two of the loads fail the one check that is about the machine; the server's log was enough for all others.
    assert list(checks.loc[~checks["ok"], "name"].unique()) == ["client was not the bottleneck"]
    reasons = {v.claim: v.reason for v in analysis.verdicts}
    assert reasons["evicts"] == "no evicted_tokens: it counts no evictions"
    assert reasons["lfu"] == "no lfu: SGLang 0.4.6.post5 has no --radix-eviction-policy"
    assert reasons["retracts"].startswith("no valid trial of plain")
    assert "`server_ttft_ms` is empty" in after["report.md"]
    requests = pd.read_csv(run.tables / "requests.csv")
    assert (requests["joined"] != "no").all()


def test_what_the_probe_saw_is_rebuilt_to_the_byte(tmp_path: Path) -> None:
    """One repeat of overlap, with the scheduler's two ways of going on."""
    run = unpack("overlap-probed", tmp_path)
    verify(run)
    analysis, before, after = rebuilt(run)
    assert after == before
    assert analysis.unusable == ()
    checks = pd.read_csv(run.tables / "checks.csv").set_index("name")["detail"]
    assert checks["the probe's events fit the counters"].str.startswith("equal: ").all()
    forwards = pd.read_csv(run.tables / "forwards.csv")
    passes = forwards.groupby(["trial", "load", "mode"]).size()
    loads = pd.read_csv(run.tables / "loads.csv").set_index(["trial", "load"])
    for (trial, load), row in loads.iterrows():
        assert passes[trial, load, "decode"] == row["decode_passes"]
        computed = forwards[
            (forwards["trial"] == trial) & (forwards["load"] == load) & (forwards["mode"] == "prefill")
        ]
        assert computed["new_tokens"].sum() + computed["cached_tokens"].sum() == row["prompt_tokens"]
    late = loads.groupby("variant")["late_share"].mean()
    assert (late["overlap"], late["in-turn"]) == (1, 0)
    pictures = sorted(p.name for p in run.plots.iterdir())
    assert pictures == ["batches.png", "measures.png", "steps.png"]


@pytest.mark.parametrize("name", ["radix-good", "crashed", "twin046-busy", "overlap-probed"])
def test_no_path_of_a_machine_is_stored(name: str, tmp_path: Path) -> None:
    run = unpack(name, tmp_path)
    for file in run.path.rglob("*"):
        if file.is_file():
            assert not re.search(rb"(?<!lab-scratch)/(root|home|work|opt|Users)/", file.read_bytes()), file
