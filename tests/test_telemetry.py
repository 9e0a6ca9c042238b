"""The telemetry sampler as a process of its own on the stand-in library, and the reader of what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvmlstandin import DRIVER_NOT_LOADED, LOST, NOT_SUPPORTED, PLAN_BOX, Machine, StandIn, stand_in

from lab.errors import LabError
from lab.telemetry.gpucsv import (
    COLUMNS,
    Gap,
    Sample,
    gaps,
    pcie_mib_per_s,
    read_samples,
    strangers,
    throttle_names,
)
from lab.telemetry.sampler import Rota

HEADER = ",".join(COLUMNS)
GPU0, GPU1 = PLAN_BOX.uuid(0), PLAN_BOX.uuid(1)


class Running:
    """A sampler that runs."""

    def __init__(self, made: StandIn, *more: str, gpus: tuple[str, ...] = (GPU0, GPU1)) -> None:
        self.made, self.out = made, made.folder / "gpu.csv"
        words = ("-m", "lab.telemetry.sampler", "--out", str(self.out), "--gpus", ",".join(gpus), *more)
        self.process = subprocess.Popen(
            (sys.executable, *words), env=made.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def samples(self) -> list[Sample]:
        return read_samples(self.out)[0] if self.out.exists() and self.out.stat().st_size else []

    def until(self, good: Callable[[list[Sample]], object]) -> list[Sample]:
        """The samples as soon as `good` is true of them."""
        deadline = time.monotonic() + 30
        while not good(found := self.samples()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, found[-3:]
            time.sleep(0.02)
        return found

    def end(self, number: int = signal.SIGTERM) -> dict[str, float]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        assert (self.process.returncode, err) == (0, "")
        found = json.loads(out)
        assert isinstance(found, dict)
        return found


@contextmanager
def running(
    folder: Path,
    *more: str,
    machine: Machine = PLAN_BOX,
    lacks: tuple[str, ...] = (),
    gpus: tuple[str, ...] = (GPU0, GPU1),
) -> Iterator[Running]:
    started = Running(stand_in(folder, machine, lacks=lacks), *more, gpus=gpus)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


# -- the process -------------------------------------------------------------------------------------------------


def test_rows_follow_the_gpu_while_it_changes(tmp_path: Path) -> None:
    with running(tmp_path) as sampler:
        first = sampler.until(lambda found: len(found) >= 4)[0]
        sampler.made.write(
            PLAN_BOX.with_lines(
                *("gpu 0 util 97", "gpu 0 mem_util 41", "gpu 0 power_mw 399500", "gpu 0 used_mib 70000"),
                *("gpu 0 temp_c 71", "gpu 0 sm_mhz 1155", "gpu 0 reasons 4"),
            )
        )
        last = sampler.until(lambda found: any(s.sm_util_pct == 97 for s in found))
        sampler.end()
        whole = sampler.samples()
    assert (first.sm_util_pct, first.power_w, first.energy_j, first.memory_used_mib) == (
        0,
        62.0,
        123456.789,
        0,
    )
    assert (first.nvlink_tx_kib, first.processes) == (0, ())
    busy = next(s for s in last if s.sm_util_pct == 97)
    assert (busy.gpu, busy.memory_util_pct, busy.power_w, busy.sm_clock_mhz) == (GPU0, 41, 399.5, 1155)
    final = [s for s in whole if s.gpu == GPU0][-1]
    assert (final.memory_used_mib, final.temperature_c, final.memory_clock_mhz) == (70000, 71, 1593)
    assert busy.clock_reasons is not None
    assert throttle_names(busy.clock_reasons) == ("software power cap",)
    assert abs(busy.time_s - time.time()) < 60


def test_only_the_gpus_in_use_are_asked(tmp_path: Path) -> None:
    with running(tmp_path, gpus=(PLAN_BOX.uuid(5),)) as sampler:
        found = sampler.until(lambda found: len(found) >= 3)
    assert {sample.gpu for sample in found} == {PLAN_BOX.uuid(5)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_is_a_whole_row_and_a_summary(tmp_path: Path, number: int) -> None:
    with running(tmp_path) as sampler:
        sampler.until(lambda found: len(found) >= 6)
        summary = sampler.end(number)
        found, problems = read_samples(sampler.out)
    assert problems == []
    assert summary["rows"] == len(found)
    assert summary["cpu_s"] > 0
    for sample in found[-2:]:
        assert (sample.energy_j, sample.pcie_tx_bytes, sample.processes) == (123456.789, 0, ())


def test_a_gpu_that_is_lost_and_returns_leaves_the_others_alone(tmp_path: Path) -> None:
    with running(tmp_path) as sampler:
        sampler.until(lambda found: len(found) >= 4)
        sampler.made.write(PLAN_BOX.with_lines(f"gpu 1 fail {LOST}"))
        lost = sampler.until(lambda found: sum(s.problem == "GPU is lost" for s in found) >= 3)
        sampler.made.write(PLAN_BOX)
        back = sampler.until(lambda found: found[-1].gpu == GPU1 and not found[-1].problem)
        sampler.end()
    assert {s.gpu for s in lost if s.problem} == {GPU1}
    assert not [s for s in back if s.gpu == GPU0 and s.problem]
    assert {s.power_w for s in lost if s.problem} == {None}
    assert back[-1].power_w == 62.0


def test_a_gpu_that_returns_elsewhere_is_found_by_its_uuid(tmp_path: Path) -> None:
    swapped = (f"gpu 1 uuid {PLAN_BOX.uuid(6)}", f"gpu 6 uuid {GPU1}", "gpu 6 power_mw 99000")
    with running(tmp_path, gpus=(GPU1,)) as sampler:
        sampler.until(lambda found: found)
        sampler.made.write(PLAN_BOX.with_lines(f"gpu 1 fail {LOST}"))
        sampler.until(lambda found: found[-1].problem)
        sampler.made.write(PLAN_BOX.with_lines(*swapped))
        assert sampler.until(lambda found: not found[-1].problem)[-1].power_w == 99.0


def test_what_a_gpu_does_not_offer_is_empty(tmp_path: Path) -> None:
    lacks = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTotalEnergyConsumption")
    lines = (f"reply nvmlDeviceGetPowerUsage 0 {NOT_SUPPORTED}", "gpu 4 reasons 8")
    gpus = (GPU0, PLAN_BOX.uuid(4))
    with running(tmp_path, machine=PLAN_BOX.with_lines(*lines), lacks=lacks, gpus=gpus) as sampler:
        one, two = sampler.until(lambda found: len(found) >= 2)[:2]
    assert (one.power_w, one.energy_j, one.sm_util_pct) == (None, None, 0)
    assert one.nvlink_tx_kib == 0
    assert (two.power_w, two.nvlink_tx_kib) == (62.0, None), "GPU 4 has no NVLink"
    assert two.clock_reasons == 8, "by the function's older name"


def test_processes_are_named(tmp_path: Path) -> None:
    machine = PLAN_BOX.with_lines("gpu 0 proc 4242:7000", "gpu 0 proc 17:10")
    with running(tmp_path, machine=machine) as sampler:
        found = sampler.until(lambda found: len(found) >= 4)
    assert found[0].processes == (4242, 17)
    assert found[2].processes is None, "not asked again at once"
    assert [s.pcie_tx_bytes for s in found[:4]] == [0, 0, 0, 0]
    assert pcie_mib_per_s(found, GPU0) == ((found[2].time_s, 0.0, 0.0),)
    assert strangers(found, ours=frozenset({17})) == {GPU0: frozenset({4242})}


def test_a_sampler_that_was_stopped_shows_its_gap(tmp_path: Path) -> None:
    with running(tmp_path) as sampler:
        sampler.until(lambda found: len(found) >= 6)
        sampler.process.send_signal(signal.SIGSTOP)
        before = len(sampler.samples())
        time.sleep(1.2)
        sampler.process.send_signal(signal.SIGCONT)
        sampler.until(lambda found: len(found) >= before + 6)
        summary = sampler.end()
        found = sampler.samples()
    assert summary["missed"] >= 8
    seen = gaps(found, (GPU0, GPU1), start_s=found[0].time_s, end_s=found[-1].time_s, longest_s=1.0)
    assert {gap.gpu for gap in seen} == {GPU0, GPU1}
    assert all(gap.end_s - gap.start_s > 1 for gap in seen)
    after = [s for s in found if s.gpu == GPU0 and s.time_s >= seen[0].end_s]
    assert after[1].monotonic_s - after[0].monotonic_s > 0.01, "missed moments are not made up for"


def test_without_a_driver_it_says_so_and_ends(tmp_path: Path) -> None:
    with running(tmp_path, machine=PLAN_BOX.with_lines(f"init {DRIVER_NOT_LOADED}")) as sampler:
        _, err = sampler.process.communicate(timeout=30)
        assert sampler.process.returncode == 1
        assert "no telemetry: NVIDIA's library is here, its kernel driver is not loaded" in err
        assert sampler.out.read_text() == HEADER + "\n"


def test_it_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX)
    out = tmp_path / "gpu.csv"
    words = [sys.executable, "-m", "lab.telemetry.sampler", "--out", str(out), "--gpus", GPU0]
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    parent = subprocess.Popen(
        (sys.executable, "-c", code, *words),
        env=made.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 30
    while not out.exists() or len(out.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    try:
        while _alive(child):
            assert time.monotonic() < deadline, "the sampler outlived its parent"
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_it_runs_on_its_own_cpu(tmp_path: Path) -> None:
    cpu = str(max(os.sched_getaffinity(0)))
    with running(tmp_path, "--cpus", cpu) as sampler:
        sampler.until(lambda found: found)
        status = Path(f"/proc/{sampler.process.pid}/status").read_text(encoding="utf-8")
    assert f"Cpus_allowed_list:\t{cpu}\n" in status


def test_a_cpu_that_is_not_there_costs_the_pinning_not_the_numbers(tmp_path: Path) -> None:
    with running(tmp_path, "--cpus", "4000") as sampler:
        sampler.until(lambda found: found)
        sampler.process.terminate()
        _, err = sampler.process.communicate(timeout=20)
    assert "not pinned to CPUs 4000" in err
    assert sampler.process.returncode == 0


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "gpu.csv").write_text("precious")
    with running(tmp_path) as sampler:
        sampler.process.communicate(timeout=30)
        assert sampler.process.returncode != 0
        assert sampler.out.read_text() == "precious"


def test_what_is_slow_to_ask_is_asked_rarely() -> None:
    rota = Rota()
    asked = [rota.due(moment / 10) for moment in range(601)]
    assert [m for m, w in enumerate(asked) if w.energy] == [0, 600]
    assert sum(w.often for w in asked) == 61
    pcie = [m for m, w in enumerate(asked) if w.pcie]
    assert pcie[:3] == [0, 100, 200]


# -- the reader --------------------------------------------------------------------------------------------------


def row(time_s: float, gpu: str = "A", **cells: object) -> str:
    values: dict[str, object] = {"time_s": time_s, "monotonic_s": time_s - 1000, "gpu": gpu, **cells}
    return ",".join(str(values.get(column, "")) for column in COLUMNS)


def written(tmp_path: Path, *lines: str, end: str = "\n") -> Path:
    path = tmp_path / "gpu.csv"
    path.write_text("\n".join((HEADER, *lines)) + end)
    return path


def test_a_line_that_was_cut_is_left_out_and_named(tmp_path: Path) -> None:
    samples, problems = read_samples(written(tmp_path, row(1000, power_w=61.5), row(1001)[:12], end=""))
    assert [sample.power_w for sample in samples] == [61.5]
    assert problems == ["line 3 is left out: 7 cells, 18 columns"]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    path.write_text("timestamp,power\n1,2\n")
    with pytest.raises(LabError, match="other columns"):
        read_samples(path)
    with pytest.raises(LabError, match="cannot read"):
        read_samples(tmp_path / "nothere.csv")


@given(st.text())
def test_no_text_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "gpu.csv"
    path.write_text(HEADER + "\n" + text, encoding="utf-8", errors="replace")
    with suppress(LabError):
        read_samples(path)


def test_gaps_at_the_edges_and_in_the_middle(tmp_path: Path) -> None:
    times = [1004.0, 1005, 1006, 1010, 1011]
    lines = [*(row(t) for t in times), *(row(t, "B", problem="GPU is lost") for t in range(1000, 1016))]
    samples, _ = read_samples(written(tmp_path, *lines))
    found = gaps(samples, ("A", "B", "C"), start_s=1000, end_s=1015)
    assert found == (
        Gap(gpu="A", start_s=1000, end_s=1004),
        Gap(gpu="C", start_s=1000, end_s=1015),
        Gap(gpu="A", start_s=1006, end_s=1010),
        Gap(gpu="A", start_s=1011, end_s=1015),
    )
    assert gaps(samples, ("A",), start_s=1004, end_s=1006) == ()


def test_a_clock_that_was_set_back_makes_no_gap() -> None:
    samples = [
        Sample(time_s=1000 + t + (5 if t > 2 else 0), monotonic_s=t, gpu="A") for t in (0.0, 1.0, 2.0, 3.0)
    ]
    assert gaps(samples, ("A",), start_s=1000, end_s=1008) == ()


def test_pcie_counters_that_wrap() -> None:
    def at(moment: float, sent: int | None, received: int | None) -> Sample:
        return Sample(time_s=moment, monotonic_s=moment, gpu="A", pcie_tx_bytes=sent, pcie_rx_bytes=received)

    samples = [at(0.0, 2**32 - 2**20, 0), at(2**-5, 2**20, 2**20), at(0.06, None, None), at(2.0, 5, 5)]
    samples += [at(2.1, 2**30, 5)]
    assert pcie_mib_per_s(samples, "A") == ((2**-5, 64.0, 32.0),), "a tenth of a second apart is too far"
    assert pcie_mib_per_s(samples, "B") == ()


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0x0, ()),
        (0x1, ()),
        (0x2, ()),
        (0x104, ("software power cap",)),
        (0x60, ("software thermal slowdown", "hardware thermal slowdown")),
        (0x88, ("hardware slowdown", "hardware power brake")),
    ],
)
def test_reasons_for_slow_clocks(bits: int, names: tuple[str, ...]) -> None:
    assert throttle_names(bits) == names
