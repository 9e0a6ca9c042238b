"""What the in-server probe costs: two servers that differ in nothing else stand side by side, and calls go to one and the
other in turns; prints the ratios, with the probe to without, of throughput and of time per output token. What else the
machine does falls on both. `python benchmarks/probe_cost.py [PAIRS [LEVEL [ROUNDS]]]`; level "none" compares a server
with itself, which shows how far off a ratio can be by chance."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from probeserver import Served, probe_env, serving

from lab import places
from lab.models import ensure_model, get_model, with_python
from lab.read.events import read_events
from lab.stack import load_stack
from lab.stacks.build import ensure

PROMPT, OUTPUT = 128, 128
AT_ONCE = (1, 16)
# An idle scheduler would spin and take the other one's CPU.
ARGS = ("--max-total-tokens", "8192", "--sleep-on-idle")


def elapsed_s(served: Served, *, requests: int, output: int, draw: random.Random) -> float:
    """Seconds that one call with so many new prompts takes."""
    prompts = [[draw.randrange(6, 8000) for _ in range(PROMPT)] for _ in range(requests)]
    sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    start = time.perf_counter()
    served.http.post("/generate", json={"input_ids": prompts, "sampling_params": sampling}).raise_for_status()
    return time.perf_counter() - start


def compare(probed: Served, plain: Served, *, rounds: int, draw: random.Random) -> dict[str, float]:
    """Medians over rounds of the ratios, probed to plain; in each round both get the same calls, close together."""
    ratios: dict[str, list[float]] = {}
    for round_number in range(rounds):
        for requests in AT_ONCE:
            seconds: dict[str, dict[int, float]] = {"probed": {}, "plain": {}}
            order = [("probed", probed), ("plain", plain)]
            for output in (1, OUTPUT):
                for name, served in order if round_number % 2 else reversed(order):
                    seconds[name][output] = elapsed_s(served, requests=requests, output=output, draw=draw)
            with_it, without = seconds["probed"], seconds["plain"]
            tpot = (with_it[OUTPUT] - with_it[1]) / (without[OUTPUT] - without[1])
            ratios.setdefault(f"throughput, {requests} at once", []).append(without[OUTPUT] / with_it[OUTPUT])
            ratios.setdefault(f"TPOT, {requests} at once", []).append(tpot)
    return {name: median(values) for name, values in ratios.items()}


@contextlib.contextmanager
def two_servers(folder: Path, *, level: str) -> Iterator[tuple[Served, Served]]:
    """One with the probe, one without; which of them is started first is drawn by the folder's name."""
    stack = load_stack(os.environ.get("STACK", "cpu"), root=places.ROOT)
    stack_dir = ensure(stack, cache=places.cache(), say=print)
    builder = with_python(stack_dir / "bin" / "python")
    model = ensure_model(get_model("nano"), cache=places.cache(), builder=builder, say=print)
    with contextlib.ExitStack() as opened:
        both = {}
        for probed in (True, False) if folder.name.endswith("0") else (False, True):
            own = folder / str(probed)
            env = probe_env(own / "events", level=level) if probed and level != "none" else {}
            server = serving(stack, stack_dir, model, folder=own, args=ARGS, env=env)
            both[probed] = opened.enter_context(server)
        yield both[True], both[False]


def check_events(folder: Path) -> None:
    """A probe that lost events or failed would be cheap for the wrong reason."""
    for file in read_events(folder)[0]:
        assert (file.dropped, file.errors, file.not_hooked) == (0, 0, ()), file.path
        batches = len(file.events["batch"])
        print(f"  {batches} batches, {file.path.stat().st_size / batches:.0f} bytes each", flush=True)


def main() -> None:
    pairs, level, rounds = (*sys.argv[1:], *("2", "batches", "30")[len(sys.argv) - 1 :])
    draw = random.Random(1)  # noqa: S311
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for pair in range(int(pairs)):
            folder = Path(temporary) / f"pair-{pair % 2}-{pair // 2}-{pair % 2}"
            with two_servers(folder, level=level) as (probed, plain):
                compare(probed, plain, rounds=2, draw=draw)
                found = compare(probed, plain, rounds=int(rounds), draw=draw)
                time.sleep(1)
            check_events(folder / "True" / "events")
            for name, ratio in found.items():
                results.setdefault(name, []).append(ratio)
                print(f"pair {pair}: {name}: {ratio:.3f} of the server without", flush=True)
    for name, values in results.items():
        print(f"level {level}: {name}: {geometric_mean(values):.3f} ({pairs} pairs of {rounds} rounds)")


if __name__ == "__main__":
    main()
