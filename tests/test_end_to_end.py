"""The whole path on the real SGLang server: a run that goes well, and every way it can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pandas as pd
import psutil
import pytest
from checkout import (
    Checkout,
    family,
    make_checkout,
    processes_of,
    scratch_folders,
    server_processes,
    shared_memory_files,
    wait_for_server,
    wait_until,
)
from parts import need

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("clone"))


@pytest.fixture(autouse=True)
def nothing_left(checkout: Checkout):
    """Whatever a test does, no process and no scratch folder of the checkout may be left after it."""
    before = scratch_folders()
    yield
    wait_until(lambda: not processes_of(checkout), seconds=5, what="the end of all processes")
    assert scratch_folders() <= before


def status_of(run: Path, trial: str = "000-only-r0") -> dict[str, object]:
    return json.loads((run / "trials" / trial / "status.json").read_text())


def derived(run: Path) -> dict[str, bytes]:
    files = [
        run / "report.md",
        run / "verdicts.json",
        *(run / "tables").glob("*"),
        *(run / "plots").glob("*"),
    ]
    return {str(f.relative_to(run)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def radix(checkout: Checkout) -> tuple[int, str, Path]:
    before = shared_memory_files()
    code, output = checkout.invoke("exp.radix", timeout=1500)
    assert shared_memory_files() <= before
    if code == 2 and "client was not the bottleneck" in output:
        # The lab is right to refuse what it measured while another program took the CPU; a second run tells
        # whether that was all.
        code, output = checkout.invoke("exp.radix", timeout=1500)
    return code, output, checkout.newest_run("radix")


def test_radix_gives_a_verdict_for_every_claim_and_a_report(radix: tuple[int, str, Path]) -> None:
    code, output, run = radix
    assert code == 0, output
    verdicts = json.loads((run / "verdicts.json").read_text())["verdicts"]
    plan = json.loads((run / "plan.json").read_text())
    assert [v["claim"] for v in verdicts] == [c["name"] for c in plan["claims"]]
    assert "untested" not in {v["outcome"] for v in verdicts}
    # What does not depend on how fast the machine is must hold on every machine.
    sure = {"cold-start", "prefix-hit", "hit-share", "eviction", "eviction-order"}
    assert {v["claim"] for v in verdicts if v["outcome"] == "held"} >= sure
    assert f"report: {run.relative_to(run.parents[2])}/report.md" in output
    report = (run / "report.md").read_text()
    for picture in ("ttft.png", "cached-share.png", "eviction.png", "tree.png"):
        assert f"plots/{picture}" in report
        assert (run / "plots" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_radix_trials_are_valid_and_evictions_are_predicted(radix: tuple[int, str, Path]) -> None:
    run = radix[2]
    trials = pd.read_csv(run / "tables" / "trials.csv")
    assert list(trials["validity"].unique()) == ["valid"], trials["reason"].tolist()
    assert trials["unreadable"].isna().all()
    loads = pd.read_csv(run / "tables" / "loads.csv")
    pressure = loads[loads["load"] == "pressure"]
    assert (pressure["evicted_tokens"] > 0).all()
    pressure = pressure[pressure["variant"] == "cache-on"]  # the model is of the usual rule of eviction
    assert ((pressure["hit_rate"] - pressure["lru_hit_rate"]).abs() < 0.03).all()
    requests = pd.read_csv(run / "tables" / "requests.csv")
    assert (requests["joined"] != "no").all()
    assert requests["server_ttft_ms"].notna().all()


def test_the_report_is_rebuilt_byte_for_byte(checkout: Checkout, radix: tuple[int, str, Path]) -> None:
    run = radix[2]
    before = derived(run)
    for name in before:
        (run / name).unlink()
    code, output = checkout.invoke("report", "--run", run.name)
    assert code == 0, output
    assert derived(run) == before


def test_a_changed_raw_file_is_refused(checkout: Checkout, radix: tuple[int, str, Path]) -> None:
    file = radix[2] / "trials" / "000-cache-on-r0" / "status.json"
    if not file.exists():
        file = next((radix[2] / "trials").glob("000-*")) / "status.json"
    text = file.read_text()
    file.chmod(0o644)
    file.write_text(text.replace('"ok"', '"OK"'))
    code, output = checkout.invoke("report", "--run", radix[2].name)
    file.write_text(text)
    assert code == 1
    assert "was changed" in output
    assert "Traceback" not in output


def test_commands_repeat_a_run_without_the_lab(checkout: Checkout, tmp_path: Path) -> None:
    need(shutil.which("curl") is not None, "curl")
    checkout.tiny("plain")
    _, output = checkout.invoke("exp.plain")
    run = checkout.newest_run("plain")
    assert status_of(run)["status"] == "ok", output
    done = subprocess.run(
        ["bash", str(run / "commands.sh")],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "OUT": str(tmp_path / "again")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = (tmp_path / "again" / "000-only-r0" / "loads" / "chat" / "chat.jsonl").read_text().splitlines()
    first = (run / "trials" / "000-only-r0" / "loads" / "chat" / "chat.jsonl").read_text().splitlines()
    keys = ("question", "prompt_tokens", "cached_tokens", "completion_tokens")
    assert [[json.loads(x)[k] for k in keys] for x in again] == [
        [json.loads(x)[k] for k in keys] for x in first
    ]


def test_a_server_that_dies_while_loading_fails_the_trial(checkout: Checkout) -> None:
    checkout.tiny("broken", server=', "--tokenizer-path", "/nowhere"')
    code, output = checkout.invoke("exp.broken")
    assert code == 2, output
    status = status_of(checkout.newest_run("broken"))
    assert (status["status"], status["phase"]) == ("failed", "start")
    assert "ended with exit code" in str(status["reason"]) or "was ended by" in str(status["reason"])
    assert any("nowhere" in line for line in status["last_lines"])
    assert "untested" in output


def test_a_server_that_is_never_ready_fails_the_trial(checkout: Checkout) -> None:
    checkout.tiny("late")
    code, output = checkout.invoke("exp.late", "--site", checkout.site(ready_s=2))
    assert code == 2, output
    status = status_of(checkout.newest_run("late"))
    assert (status["status"], status["phase"]) == ("failed", "start")
    assert "not ready after 2 s" in str(status["reason"])


def test_a_server_killed_under_load_fails_its_trial_and_the_run_can_be_resumed(checkout: Checkout) -> None:
    checkout.tiny("killed", questions=60, output=32)
    lab = checkout.start("exp.killed", "--repeats", "2")
    try:
        begun = "runs/killed/*/trials/000-only-r0/loads/chat/client.log"
        wait_until(lambda: any(checkout.path.glob(begun)), seconds=180, what="the load")
        for process in server_processes(checkout):
            process.kill()
        output, _ = lab.communicate(timeout=300)
    finally:
        lab.kill()
    assert lab.returncode == 2, output
    run = checkout.newest_run("killed")
    status = status_of(run)
    assert (status["status"], status["phase"]) == ("failed", "load chat")
    assert "SIGKILL" in str(status["reason"])
    assert status_of(run, "001-only-r1")["status"] == "ok"  # the rest of the run is kept
    _, output = checkout.invoke("exp.killed", "--repeats", "2", "--resume")
    assert status_of(run)["status"] == "ok", output
    assert (run / "trials" / "000-only-r0.failed-1" / "status.json").exists()


def test_a_client_over_its_deadline_fails_the_trial(checkout: Checkout) -> None:
    checkout.tiny("slow", questions=60, output=64)
    code, output = checkout.invoke("exp.slow", "--site", checkout.site(load_s=1.5))
    assert code == 2, output
    status = status_of(checkout.newest_run("slow"))
    assert (status["status"], status["phase"]) == ("failed", "load chat")
    assert "not done after 1.5 s" in str(status["reason"])


def test_requests_that_fail_make_the_trial_invalid(checkout: Checkout) -> None:
    # As planned (500 + 500 tokens) it fits, so it is not refused; the questions make it longer.
    checkout.tiny("toolong", output=500, server=', "--context-length", "1000"')
    code, output = checkout.invoke("exp.toolong")
    assert code == 2, output
    status = status_of(checkout.newest_run("toolong"))
    assert (status["status"], status["phase"]) == ("failed", "load chat")
    assert "ended with exit code 1" in str(status["reason"])
    assert status["last_lines"], status
    verdicts = json.loads((checkout.newest_run("toolong") / "verdicts.json").read_text())["verdicts"]
    assert [v["outcome"] for v in verdicts] == ["untested"]


def test_what_cannot_fit_is_refused_before_anything_starts(checkout: Checkout) -> None:
    checkout.tiny("huge", output=8000, pool=1024)
    code, output = checkout.invoke("exp.huge")
    assert code == 1, output
    assert "does not fit" in output
    assert "Traceback" not in output
    assert not (checkout.path / "runs" / "huge").exists()


def test_answers_that_were_cut_short_make_the_trial_invalid(checkout: Checkout) -> None:
    # the server gives what fits into the pool, without an error
    checkout.tiny("short", output=524, pool=1024)
    code, output = checkout.invoke("exp.short")
    assert code == 2, output
    assert "2 of 2 answers do not have the 524 tokens asked for" in output
    verdicts = json.loads((checkout.newest_run("short") / "verdicts.json").read_text())["verdicts"]
    assert [v["outcome"] for v in verdicts] == ["untested"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_everything_and_says_how_to_go_on(
    checkout: Checkout, signum: signal.Signals, code: int
) -> None:
    name = f"stopped{signum}"
    checkout.tiny(name)
    lab = checkout.start(f"exp.{name}")
    try:
        started = family([wait_for_server(checkout)])
        lab.send_signal(signum)
        output, _ = lab.communicate(timeout=90)
    finally:
        lab.kill()
    assert lab.returncode == code, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    status = status_of(checkout.newest_run(name))
    assert (status["status"], status["phase"]) == ("failed", "start")
    assert "interrupted" in str(status["reason"])


def test_what_a_killed_lab_left_is_swept_by_the_next_start(checkout: Checkout) -> None:
    checkout.tiny("orphan")
    lab = checkout.start("exp.orphan")
    try:
        server = wait_for_server(checkout)
        wait_until(lambda: len(server.children()) >= 2, seconds=120, what="the scheduler")
        started = family([server])
        scratch = scratch_folders()
    finally:
        lab.kill()
        lab.wait()
    code, output = checkout.invoke("clean")
    assert code == 0, output
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (scratch & scratch_folders()), "the scratch folder of the killed lab"
    run = checkout.newest_run("orphan")
    assert status_of(run)["status"] == "running"
    code, output = checkout.invoke("report", "--run", run.name)
    assert code == 2
    assert "--resume" in output
    assert "the lab was killed during this trial" in (run / "report.md").read_text()
    _, output = checkout.invoke("exp.orphan", "--resume")
    assert status_of(run)["status"] == "ok", output
