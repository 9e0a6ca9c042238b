"""What the in-server probe costs: calls to one server, with its hooks' bodies in use and left out in turns, so that
whatever else the machine does falls on both; prints the ratios, with to without, of throughput and of time per output
token, with 95 % intervals: by the clock, and by the CPU time of the scheduler's main thread, which is the same on a quiet
machine and does not see others on a busy one. `python benchmarks/probe_cost.py [ROUNDS [LEVEL [REQUESTS...]]]`.

A rid that begins with "off-" or "on-" switches the bodies, through a second plugin that is written here. Left out, a hook
still costs the call of its wrapper, about 0.2 µs; two servers side by side differed by 10 % for no reason at all."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from probeserver import Served, probe_env, serving

from lab import places
from lab.models import ensure_model, get_model, with_python
from lab.read.events import read_events
from lab.stack import load_stack
from lab.stacks.build import ensure

PROMPT, OUTPUT = 128, 128
# The writer's thread wakes five times a second: what it still writes of one call must not fall into the next.
PAUSE_S = 0.3

SWITCH = """
def load():
    from labprobe import load as labprobe
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.handle_generate_request

    def switching(self, recv_req, *args, **kwargs):
        word, _, rest = recv_req.rid.partition("-")
        if rest and word in ("on", "off") and labprobe._probe is not None:
            for one in labprobe._probe.guards:
                one.on = word == "on"
        return original(self, recv_req, *args, **kwargs)

    Scheduler.handle_generate_request = switching
"""


def write_switch(folder: Path) -> Path:
    """A folder for PYTHONPATH with the plugin that switches the probe."""
    (folder / "switch-1.dist-info").mkdir(parents=True)
    (folder / "probe_switch.py").write_text(SWITCH)
    (folder / "switch-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: switch\nVersion: 1\n"
    )
    entry = "[sglang.srt.plugins]\nswitch = probe_switch:load\n"
    (folder / "switch-1.dist-info" / "entry_points.txt").write_text(entry)
    return folder


class Caller:
    """Calls with new prompts, the probe on or off."""

    def __init__(self, served: Served, *, scheduler: int) -> None:
        self._served = served
        self._schedstat = Path(f"/proc/{scheduler}/task/{scheduler}/schedstat")
        self._draw = random.Random(1)  # noqa: S311
        self._calls = 0

    def _now_s(self) -> tuple[float, float]:
        """The clock, and the time that the scheduler's main thread has had a CPU."""
        return time.perf_counter(), int(self._schedstat.read_text().split()[0]) / 1e9

    def took_s(self, word: str, *, requests: int, output: int) -> tuple[float, float]:
        """Seconds of one call, by the clock and on the CPU."""
        time.sleep(PAUSE_S)
        self._calls += 1
        body = {
            "rid": [f"{word}-{self._calls}-{n}" for n in range(requests)],
            "input_ids": [[self._draw.randrange(6, 8000) for _ in range(PROMPT)] for _ in range(requests)],
            "sampling_params": {"temperature": 0, "max_new_tokens": output, "ignore_eos": True},
        }
        start, start_cpu = self._now_s()
        self._served.http.post("/generate", json=body).raise_for_status()
        end, end_cpu = self._now_s()
        return end - start, end_cpu - start_cpu

    def one_round(self, *, requests: int, on_first: bool) -> dict[str, float]:
        """Ratios, with the probe to without."""
        took: dict[tuple[str, int], tuple[float, float]] = {}
        for output in (1, OUTPUT):
            for word in ("on", "off") if on_first else ("off", "on"):
                took[word, output] = self.took_s(word, requests=requests, output=output)
        found: dict[str, float] = {}
        for by, name in enumerate(("by the clock", "on the CPU")):
            tpot = {word: took[word, OUTPUT][by] - took[word, 1][by] for word in ("on", "off")}
            found[f"throughput {name}"] = took["off", OUTPUT][by] / took["on", OUTPUT][by]
            found[f"TPOT {name}"] = tpot["on"] / tpot["off"]
        return found


def interval(values: list[float]) -> str:
    """The median, and two order statistics that enclose the true one in 95 of 100 cases."""
    ordered, count = sorted(values), len(values)
    reach = round(0.98 * count**0.5)
    low, high = ordered[max(0, count // 2 - reach)], ordered[min(count - 1, count // 2 + reach)]
    return f"{median(values):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    given = sys.argv[1:]
    rounds, level = (*given[:2], *("40", "batches")[len(given) :])
    counts = given[2:] or ["1", "16"]
    stack = load_stack(os.environ.get("STACK", "cpu"), root=places.ROOT)
    stack_dir = ensure(stack, cache=places.cache(), say=print)
    builder = with_python(stack_dir / "bin" / "python")
    model = ensure_model(get_model("nano"), cache=places.cache(), builder=builder, say=print)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        env = probe_env(folder / "events", level=level)
        env["PYTHONPATH"] += f"{os.pathsep}{write_switch(folder / 'switch')}"
        with serving(
            stack, stack_dir, model, folder=folder, args=("--max-total-tokens", "8192"), env=env
        ) as served:
            (file,), _ = read_events(folder / "events")
            caller = Caller(served, scheduler=file.pid)
            for requests in map(int, counts):
                caller.one_round(requests=requests, on_first=True)
                pairs = [caller.one_round(requests=requests, on_first=n % 2 == 0) for n in range(int(rounds))]
                for name in pairs[0]:
                    ratio = interval([pair[name] for pair in pairs])
                    print(f"{level}, {requests} at once, {rounds} pairs: {name} {ratio}", flush=True)
            time.sleep(1)
        (file,), _ = read_events(folder / "events")
    # A probe that lost events or failed would be cheap for the wrong reason; one that was never off, dear for no reason.
    assert (file.dropped, file.errors, file.not_hooked) == (0, 0, ()), file
    batches = file.events["batch"]
    passes = max(int(str(row["forward"])) for row in batches)
    print(f"{len(batches)} of {passes} passes were noted, {sum(map(len, file.events.values()))} events")
    assert 0.4 < len(batches) / passes < 0.6


if __name__ == "__main__":
    main()
