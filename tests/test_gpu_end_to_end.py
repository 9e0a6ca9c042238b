"""One run with a GPU seat from the command line to the report: the real server on the CPU, the real sampler on the
stand-in box, whose GPU slows down while the second trial's load runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from checkout import Checkout, make_checkout, processes_of, wait_until
from nvmlstandin import PLAN_BOX, StandIn, stand_in

from lab.rundir import Run, verify
from lab.telemetry.gpucsv import read_samples

pytestmark = pytest.mark.usefixtures("nano")
GOOD, SLOW = "000-only-r0", "001-only-r1"
HEAT = "GPUs were not slowed: hardware thermal slowdown in"


def run_once(checkout: Checkout, box: StandIn) -> tuple[int, str, Run]:
    """Two trials on GPU 4, which grows hot as soon as the second one's load begins."""
    box.write(PLAN_BOX)
    before = set(checkout.path.glob("runs/hot/*"))
    words = ("exp.hot", "--stack", "cpu", "--gpus", "4", "--runtime", "process", "--repeats", "2")
    process = checkout.start(*words)

    def second_load() -> bool:
        new = set(checkout.path.glob("runs/hot/*")) - before
        return process.poll() is not None or any((run / f"trials/{SLOW}/loads/chat").exists() for run in new)

    try:
        wait_until(second_load, seconds=300, what="the second trial's load")
        box.write(PLAN_BOX.with_lines("gpu 4 reasons 0x40"))
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            process.kill()
    wait_until(lambda: not processes_of(checkout), seconds=10, what="the end of all processes")
    return process.returncode, output, Run(checkout.newest_run("hot"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str, Run]]:
    folder = tmp_path_factory.mktemp("box")
    made = stand_in(folder / "nvml", PLAN_BOX)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LD_LIBRARY_PATH", "NVML_STANDIN_STATE"):
            patch.setenv(name, made.env[name])
        checkout = make_checkout(folder)
        checkout.tiny("hot", questions=4, output=32)
        yield run_once(checkout, made)


def test_the_good_trial_is_used_and_the_slowed_one_is_not(result: tuple[int, str, Run]) -> None:
    code, output, run = result
    assert code == 2, output
    verify(run)
    trials = pd.read_csv(run.tables / "trials.csv").set_index("trial")
    assert trials.loc[GOOD, "status"] == "ok"
    # On a busy machine the lab may rightly refuse the client's times; of the GPU it must have nothing to say.
    reason = trials.loc[[GOOD], "reason"].fillna("").iloc[0]
    assert not reason or reason.startswith("chat: client was not the bottleneck")
    assert "GPU" not in reason
    checks = pd.read_csv(run.tables / "checks.csv").query("trial == @GOOD and name.str.contains('GPU')")
    assert len(checks) == 5
    assert checks["ok"].all()
    assert (trials.loc[SLOW, "status"], trials.loc[SLOW, "validity"]) == ("ok", "invalid")
    assert HEAT in str(trials.loc[SLOW, "reason"])
    assert HEAT in output


def test_the_samples_are_those_of_the_seat_and_rows_come_of_them(result: tuple[int, str, Run]) -> None:
    _, _, run = result
    samples, problems = read_samples(run.trial(GOOD).gpus)
    assert problems == []
    assert {sample.gpu for sample in samples} == {PLAN_BOX.uuid(4)}
    rows = pd.read_csv(run.tables / "gpus.csv").set_index("trial")
    load = json.loads(run.trial(GOOD).load("chat").status.read_text())
    seconds = load["ended"] - load["started"]
    assert rows.loc[GOOD, "power_w"] == pytest.approx(62)
    assert 62 * (seconds - 0.5) < rows.loc[GOOD, "energy_j"] <= 62 * seconds
    assert rows.loc[GOOD, "output_tokens"] == 4 * 32
    assert rows.loc[GOOD, "j_per_output_token"] == pytest.approx(rows.loc[GOOD, "energy_j"] / 128, abs=1e-5)
    status = json.loads(run.trial(GOOD).status.read_text())
    assert (status["gpu_pids"], status["gpus_left"]) == ([], "")


def test_the_report_shows_the_machine_the_seat_and_the_reason(result: tuple[int, str, Run]) -> None:
    _, _, run = result
    text = run.report.read_text()
    (seat,) = (line for line in text.splitlines() if line.startswith("| 4 | NVIDIA A100 80GB PCIe |"))
    assert "| SYS | SYS | SYS | SYS | X | PXB | PXB |" in seat
    assert seat.endswith("| only |")
    assert f"| {SLOW} | invalid |" in text
    assert HEAT in text
    used = f"| {GOOD} | valid |" in text
    assert ("| chat | only | j_per_output_token |" in text) is used
    assert Path(run.plots / f"gpus-{GOOD}.png").is_file() is used
    assert Path(run.plots / f"gpus-{SLOW}.png").is_file()
    assert f'trial {SLOW}, which failed the check "GPUs were not slowed"' in text
