"""What the in-server probe costs: one server decodes a long batch while the probe's hooks are in use and left out in turns of
a second, so that whatever else the machine does falls on both; prints the ratio, with to without, of the time per decode
step (TPOT; throughput is its inverse) and the CPU share of the thread that writes. `python benchmarks/probe_cost.py [LEVEL
[REQUESTS...]]`.

Step times are taken by a second plugin that is written here; it also switches. Two servers side by side, or calls in turns,
differed by several percent for no reason. Left out, a hook still costs the call of its wrapper, about 0.2 µs."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from probeserver import Served, probe_env, serving

from lab import places
from lab.models import ensure_model, get_model, with_python
from lab.read.events import read_events
from lab.stack import load_stack
from lab.stacks.build import ensure

PROMPT, OUTPUT = 64, 5000
TURN_S = 1.0
# At the start of a turn the writer may still be at what the one before left in the queue.
SETTLE_S = 0.3

SWITCH = """
import json, os, threading, time

TURN_NS = %d
steps = []


def load():
    from labprobe import load as labprobe
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.run_batch
    state = {"on": True, "due": 0}

    def timed(self, batch, *args, **kwargs):
        now = time.perf_counter_ns()
        if now >= state["due"]:
            state["due"], state["on"] = now + TURN_NS, not state["on"]
            for one in labprobe._probe.guards:
                one.on = state["on"]
        steps.append((now, state["on"], len(batch.reqs) if batch.forward_mode.is_decode() else 0))
        return original(self, batch, *args, **kwargs)

    Scheduler.run_batch = timed
    flush = Scheduler.flush_cache

    def dumping(self, *args, **kwargs):
        threads = {one.name: one.native_id for one in threading.enumerate()}
        with open(os.environ["PROBE_STEPS"], "w") as file:
            json.dump({"steps": steps, "threads": threads}, file)
        steps.clear()
        return flush(self, *args, **kwargs)

    Scheduler.flush_cache = dumping
"""


def write_switch(folder: Path) -> Path:
    """A folder for PYTHONPATH with the plugin that switches the probe; its name sorts after the probe's own."""
    (folder / "switch-1.dist-info").mkdir(parents=True)
    (folder / "probe_switch.py").write_text(SWITCH % int(TURN_S * 1e9))
    (folder / "switch-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: switch\nVersion: 1\n"
    )
    entry = "[sglang.srt.plugins]\nswitch = probe_switch:load\n"
    (folder / "switch-1.dist-info" / "entry_points.txt").write_text(entry)
    return folder


def decode(served: Served, *, requests: int, draw: random.Random) -> None:
    """One batch of so many requests, and then the steps are written."""
    body = {
        "input_ids": [[draw.randrange(6, 8000) for _ in range(PROMPT)] for _ in range(requests)],
        "sampling_params": {"temperature": 0, "max_new_tokens": OUTPUT, "ignore_eos": True},
    }
    served.http.post("/generate", json=body, timeout=500).raise_for_status()
    time.sleep(0.5)
    served.http.post("/flush_cache", params={"timeout": 20}).raise_for_status()


def turns(steps: Sequence[tuple[int, bool, int]], *, requests: int) -> list[tuple[bool, list[float]]]:
    """Step times in microseconds of each turn in which all requests decoded, without its first `SETTLE_S`."""
    found: list[tuple[bool, list[float]]] = []
    began, state = 0, None
    for (at, on, size), (following, next_on, _) in pairwise(steps):
        if on != state:
            began, state = at, on
            found.append((on, []))
        if size == requests and next_on == on and at - began > SETTLE_S * 1e9:
            found[-1][1].append((following - at) / 1000)
    return [(on, times) for on, times in found if len(times) >= 20]


def ratios(found: list[tuple[bool, list[float]]]) -> tuple[list[float], list[float]]:
    """With to without, of each two turns that follow each other: of the middle step, and of the mean without the
    slowest hundredth, in which the machine did something else."""
    middle, mean = [], []
    for (on, one), (other_on, other) in pairwise(found):
        if on != other_on:
            with_it, without = (one, other) if on else (other, one)
            middle.append(median(with_it) / median(without))
            mean.append(trimmed(with_it) / trimmed(without))
    return middle, mean


def trimmed(times: list[float]) -> float:
    return fmean(sorted(times)[: max(1, len(times) * 99 // 100)])


def interval(values: list[float]) -> str:
    """The median, and two order statistics that enclose the true one in 95 of 100 cases."""
    ordered, count = sorted(values), len(values)
    reach = round(0.98 * count**0.5)
    low, high = ordered[max(0, count // 2 - reach)], ordered[min(count - 1, count // 2 + reach)]
    return f"{median(values):.4f} [{low:.4f}, {high:.4f}]"


def report(folder: Path, *, level: str, requests: int) -> None:
    written = json.loads((folder / "steps.json").read_text())
    found = turns(written["steps"], requests=requests)
    middle, mean = ratios(found)
    step = median(median(times) for on, times in found if not on)
    print(f"{level}, {requests} at once, {len(found)} turns, step {step:.0f} us without:")
    print(f"  TPOT, middle step {interval(middle)}, mean of 99 % {interval(mean)}", flush=True)


def writer_share(pid: int, folder: Path) -> tuple[float, float]:
    """CPU seconds of the probe's thread and of the scheduler's main one."""
    thread = json.loads((folder / "steps.json").read_text())["threads"]["labprobe"]
    both = (Path(f"/proc/{pid}/task/{task}/schedstat").read_text() for task in (thread, pid))
    writer, main_thread = (int(text.split()[0]) / 1e9 for text in both)
    return writer, main_thread


def main() -> None:
    level, *counts = sys.argv[1:] or ["batches"]
    stack = load_stack("cpu", root=places.ROOT)
    stack_dir = ensure(stack, cache=places.cache(), say=print)
    builder = with_python(stack_dir / "bin" / "python")
    model = ensure_model(get_model("nano"), cache=places.cache(), builder=builder, say=print)
    draw = random.Random(1)  # noqa: S311
    args = ("--max-total-tokens", str((PROMPT + OUTPUT) * 16 + 1024))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        env = probe_env(folder / "events", level=level) | {"PROBE_STEPS": str(folder / "steps.json")}
        env["PYTHONPATH"] += f"{os.pathsep}{write_switch(folder / 'switch')}"
        with serving(stack, stack_dir, model, folder=folder, args=args, env=env) as served:
            for requests in map(int, counts or ("1", "16")):
                decode(served, requests=requests, draw=draw)
                report(folder, level=level, requests=requests)
            time.sleep(1)
            (file,), _ = read_events(folder / "events")
            writer, main_thread = writer_share(file.pid, folder)
    # A probe that lost events or failed would be cheap for the wrong reason.
    assert (file.dropped, file.errors, file.not_hooked) == (0, 0, ()), file
    events = sum(map(len, file.events.values()))
    print(
        f"{events} events; the writer took {1e6 * writer / events:.1f} us each, {writer / main_thread:.4f} of the main thread"
    )


if __name__ == "__main__":
    main()
