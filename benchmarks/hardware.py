"""Discovery of a 16-GPU box beside starting Python; placement among 64 GPUs; the telemetry sampler's share of a core; reading
and drawing an hour of its samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fakerun import START
from gpufiles import gpu_run, steady, write_samples
from nvmlstandin import DETECT, DGX_A100, SIXTEEN, Machine, Node, hardware_of, stand_in

from lab.hardware.detect import detect
from lab.hardware.placement import Request, place
from lab.plan import read_plan
from lab.report.gpuplots import over_time
from lab.rundir import write_json
from lab.telemetry.gpucsv import read_samples

EIGHT_NODES = tuple(Node(cores=16, socket=node // 4) for node in range(8))
NODES = tuple(gpu // 8 for gpu in range(64))
SWITCHED = Machine(name="64-switched", nodes=EIGHT_NODES, gpu_nodes=NODES, fabric=12)
IN_PAIRS = Machine(
    name="64-in-pairs", nodes=EIGHT_NODES, gpu_nodes=NODES, links={(i, i + 1): 12 for i in range(0, 64, 2)}
)


def discovery() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = stand_in(Path(folder), SIXTEEN)
        taken: dict[str, list[float]] = {"python": [], "detect": []}
        for _ in range(7):
            for name, words in (("python", ("-c", "pass")), ("detect", ("-c", DETECT, str(made.root)))):
                start = time.perf_counter()
                subprocess.run([sys.executable, *words], env=made.env, check=True, capture_output=True)
                taken[name].append(time.perf_counter() - start)
    python, detect = median(taken["python"]), median(taken["detect"])
    print(
        f"16 GPUs, 128 CPUs found in {detect:.3f} s with starting Python, "
        f"which alone is {python:.3f} s; promised: 1 s"
    )


def placement() -> None:
    for machine in (SWITCHED, IN_PAIRS):
        hardware = hardware_of(machine)
        for tp in (1, 2, 4, 8):
            busy = frozenset(machine.uuid(gpu) for gpu in range(0, 64, 9))
            taken = []
            for _ in range(9):
                start = time.perf_counter()
                place(hardware, Request(tp=tp), busy=busy)
                taken.append(1000 * (time.perf_counter() - start))
            print(f"{machine.name}: TP={tp} placed in {median(taken):.1f} ms, 8 GPUs busy; promised: 50 ms")


def sampler(gpus: list[str], env: dict[str, str], *, what: str) -> None:
    """CPU time of the sampler, and of a program that only waits in the same rhythm."""
    idle = "import time\nfor _ in range(150): time.sleep(0.1)\nprint(time.process_time())"
    waiting = subprocess.Popen([sys.executable, "-c", idle], stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "lab.telemetry.sampler", "--out", f"{folder}/gpu.csv", "--gpus", ",".join(gpus)]
        running = subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.PIPE, text=True)
        waited = 100 * float(waiting.communicate()[0]) / 15
        running.send_signal(signal.SIGTERM)
        summary = json.loads(running.communicate()[0])
    print(
        f"sampler, {what}: {summary['core_pct']:.2f} % of a core for {summary['rows']} rows in "
        f"{summary['seconds']:.0f} s, {summary['missed']} moments missed; only waiting (with starting Python) "
        f"{waited:.2f} %; promised for 8 GPUs: 1 %"
    )


def telemetry() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = stand_in(Path(folder), DGX_A100)
        sampler([DGX_A100.uuid(gpu) for gpu in range(8)], made.env, what="8 GPUs of the stand-in")
    real = [gpu.uuid for gpu in detect().gpus]
    if real:
        sampler(real, dict(os.environ), what=f"{len(real)} real GPUs")


def an_hour() -> None:
    """One trial of seven GPUs at 10 Hz: what tables and report have to read and draw."""
    with tempfile.TemporaryDirectory() as folder:
        run = gpu_run(Path(folder), indexes=range(7))
        trial = read_plan(run).trials[0]
        files = run.trial(trial.name)
        for at, step in enumerate(trial.loads):
            start = START + 1200 * at
            write_json(files.load(step.name).status, {"exit": 0, "started": start, "ended": start + 1200})
        write_samples(files.gpus, steady(trial.server.gpus, start_s=START, end_s=START + 3600))
        begin = time.perf_counter()
        samples, _ = read_samples(files.gpus)
        read = time.perf_counter()
        figure = over_time(trial, files, names={})
        assert figure is not None
        figure.savefig(Path(folder) / "gpus.png")
        drawn = time.perf_counter()
        print(
            f"an hour of 7 GPUs, {len(samples)} samples: read in {read - begin:.1f} s, drawn in {drawn - read:.1f} s"
        )


def main() -> None:
    discovery()
    placement()
    telemetry()
    an_hour()


if __name__ == "__main__":
    main()
