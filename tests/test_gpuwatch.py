"""The watch over a trial's GPUs on the stand-in library: free before and after, a sampler beside it, who uses them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from nvmlstandin import DRIVER_NOT_LOADED, LOST, PLAN_BOX, Machine, StandIn, hardware_of, stand_in

from lab.gpurows import read_gpus
from lab.plan import Process, Trial
from lab.rundir import TrialFiles
from lab.telemetry.gpucsv import Sample, read_samples
from lab.validity import Check

GPU = PLAN_BOX.uuid(4)
HELD = "gpu 4 used_mib 60000"
SERVER = "gpu 4 proc 4711:60000"

# The watch in a process that loads the stand-in: one command a line, one answer a line.
DRIVER = """
import json, sys
from pathlib import Path
from lab.gpuwatch import GpuWatch
from lab.runtime.base import StartFailed
folder, gpus, free_s = Path(sys.argv[1]), [g for g in sys.argv[2].split(",") if g], float(sys.argv[3])
watch = GpuWatch(gpus, out=folder / "gpu.csv", log=folder / "sampler.log", cpus=(), free_s=free_s)
for line in sys.stdin:
    try:
        print(json.dumps(getattr(watch, line.strip())()), flush=True)
    except StartFailed as fault:
        print(json.dumps(f"StartFailed {fault.name}, {fault.phase}: {fault.reason}"), flush=True)
"""


class Watch:
    """A watch that runs; `told` sends it a command."""

    def __init__(self, made: StandIn, *, gpus: tuple[str, ...], free_s: float) -> None:
        self.made = made
        self.files = TrialFiles(made.folder)
        words = (sys.executable, "-c", DRIVER, str(made.folder), ",".join(gpus), str(free_s))
        self.process = subprocess.Popen(
            words, env=made.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def told(self, command: str) -> object:
        self.ask(command)
        return self.answer()

    def samplers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def until(self, good: Callable[[list[Sample]], object]) -> list[Sample]:
        """The samples as soon as `good` is true of them."""
        deadline = time.monotonic() + 30
        while True:
            path = self.files.gpus
            found = read_samples(path)[0] if path.exists() and path.stat().st_size else []
            if good(found):
                return found
            assert time.monotonic() < deadline, found[-3:]
            time.sleep(0.05)

    def checks(self, *, end_s: float, pids: object) -> dict[str, Check]:
        """The checks of a trial whose one load began with the first sample."""
        process = Process(argv=(), env=(), cpus=(), gpus=(GPU,))
        trial = Trial(index=0, name="t", variant="a", repeat=0, server=process, client=process, loads=())
        start = read_samples(self.files.gpus)[0][0].time_s
        _, found, _ = read_gpus(
            *(trial, self.files, {"gpu_pids": pids}),
            windows={"load": (start, end_s)},
            tokens={"load": 10.0},
            machine=hardware_of(PLAN_BOX),
        )
        return {check.name: check for check in found}


@contextmanager
def watching(
    folder: Path, machine: Machine = PLAN_BOX, *, gpus: tuple[str, ...] = (GPU,), free_s: float = 0.0
) -> Iterator[Watch]:
    watch = Watch(stand_in(folder, machine), gpus=gpus, free_s=free_s)
    try:
        yield watch
    finally:
        for process in (*watch.samplers(), watch.process):
            process.kill()
        watch.process.communicate()


def failed(checks: dict[str, Check]) -> set[str]:
    return {check.name for check in checks.values() if not check.ok}


def test_a_trial_from_free_gpus_to_free_gpus(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        assert watch.told("start") is None
        watch.made.write(
            PLAN_BOX.with_lines(HELD, SERVER, "gpu 4 util 90", "gpu 4 sm_mhz 1410", "gpu 4 reasons 0")
        )
        watch.until(lambda found: any(s.processes == (4711,) for s in found))
        pids = watch.told("pids")
        assert pids == [4711]
        watch.made.write(PLAN_BOX)
        assert watch.told("stop") == ""
        assert watch.samplers() == []
        assert failed(watch.checks(end_s=time.time(), pids=pids)) == set()
        summary = json.loads(watch.files.sampler_log.read_text())
    assert summary["rows"] == len(read_samples(watch.files.gpus)[0])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((SERVER, HELD), "1 process, 60000 MiB"),
        ((HELD,), "60000 MiB"),  # held by a process that this namespace does not show
        ((f"gpu 4 fail {LOST}",), "GPU is lost"),
    ],
)
def test_a_gpu_in_use_fails_the_trial_with_the_reason(
    lines: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with watching(tmp_path, PLAN_BOX.with_lines(*lines)) as watch:
        assert watch.told("start") == (
            f"StartFailed gpu, start: a GPU of this trial is not free: {GPU}: {words}"
        )
        assert watch.samplers() == []
        assert watch.told("stop") == "", "what was never taken is not waited for"
        assert not watch.files.gpus.exists()


def test_no_driver_fails_the_trial_with_the_reason(tmp_path: Path) -> None:
    with watching(tmp_path, PLAN_BOX.with_lines(f"init {DRIVER_NOT_LOADED}")) as watch:
        assert "its kernel driver is not loaded" in str(watch.told("start"))


def test_gpus_of_others_do_not_matter(tmp_path: Path) -> None:
    others = ("gpu 0 proc 99:70000", "gpu 0 used_mib 70000", f"gpu 1 fail {LOST}")
    with watching(tmp_path, PLAN_BOX.with_lines(*others)) as watch:
        assert watch.told("start") is None
        assert watch.told("stop") == ""


def test_it_waits_until_the_gpu_is_free(tmp_path: Path) -> None:
    with watching(tmp_path, PLAN_BOX.with_lines(HELD), free_s=60) as watch:
        watch.ask("start")
        time.sleep(0.3)
        assert watch.samplers() == []
        watch.made.write(PLAN_BOX)
        assert watch.answer() is None
        assert len(watch.samplers()) == 1
        assert watch.told("stop") == ""


def test_memory_that_is_not_given_back_is_said_after_the_trial(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        watch.told("start")
        watch.made.write(PLAN_BOX.with_lines(HELD))
        watch.until(lambda found: any(s.memory_used_mib == 60000 for s in found))
        assert watch.told("stop") == f"{GPU}: 60000 MiB"


def test_a_killed_sampler_leaves_a_gap(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        watch.told("start")
        last = watch.until(lambda found: len(found) > 5)[-1].time_s
        watch.samplers()[0].send_signal(signal.SIGKILL)
        assert watch.told("stop") == "", "the trial goes on to its end"
        short = watch.checks(end_s=last + 2, pids=[])
        assert failed(short) == set()
        late = watch.checks(end_s=last + 60, pids=[])
    assert failed(late) == {"GPUs were watched"}
    assert "1 gaps, the longest of" in late["GPUs were watched"].detail


def test_a_gpu_that_is_lost_is_seen_and_not_waited_for(tmp_path: Path) -> None:
    with watching(tmp_path, free_s=60) as watch:
        watch.told("start")
        watch.until(len)
        watch.made.write(PLAN_BOX.with_lines(f"gpu 4 fail {LOST}"))
        watch.until(lambda found: any(s.problem for s in found))
        assert watch.told("stop") == f"{GPU}: GPU is lost"
        checks = watch.checks(end_s=time.time(), pids=[])
    assert failed(checks) == {"GPUs answered"}
    assert checks["GPUs answered"].detail == f"{GPU}: GPU is lost"


def test_a_stranger_who_comes_later_is_seen(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        watch.told("start")
        watch.made.write(PLAN_BOX.with_lines(HELD, SERVER))
        watch.until(lambda found: any(s.processes == (4711,) for s in found))
        pids = watch.told("pids")
        watch.made.write(PLAN_BOX.with_lines(HELD, SERVER, "gpu 4 proc 99:5000"))
        watch.until(lambda found: any(99 in (s.processes or ()) for s in found))
        watch.made.write(PLAN_BOX)
        watch.told("stop")
        checks = watch.checks(end_s=time.time(), pids=pids)
    assert failed(checks) == {"nobody else used the GPUs"}
    assert checks["nobody else used the GPUs"].detail == f"{GPU}: pid 99"


def test_slowdown_is_seen(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        watch.told("start")
        watch.until(len)
        watch.made.write(PLAN_BOX.with_lines("gpu 4 reasons 0x48"))
        watch.until(lambda found: any(s.clock_reasons == 0x48 for s in found))
        watch.told("stop")
        checks = watch.checks(end_s=time.time(), pids=[])
    assert failed(checks) == {"GPUs were not slowed"}
    assert "hardware slowdown in" in checks["GPUs were not slowed"].detail


def test_a_trial_without_gpus_is_not_watched(tmp_path: Path) -> None:
    with watching(tmp_path, PLAN_BOX.with_lines("init 9"), gpus=()) as watch:
        assert watch.told("start") is None
        assert watch.told("pids") == []
        assert watch.told("stop") == ""
    assert not watch.files.gpus.exists()
