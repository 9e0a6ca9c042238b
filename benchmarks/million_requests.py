"""Tables of a run with a million requests, against only reading the same files. Each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fakerun import make_run

MEASURE = """
import resource, sys, time
from pathlib import Path
start = time.perf_counter()
{work}
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
READ = """
import json
trial = Path(sys.argv[1]) / "trials" / sys.argv[2]
rows = 0
for path in [*trial.glob("export/*.log"), trial / "loads" / "shared" / "bench.jsonl"]:
    with path.open() as file:
        for line in file:
            rows += len(json.loads(line))
"""
TABLES = """
from lab.rundir import Run
from lab.tables import tabulate
tables = tabulate(Run(Path(sys.argv[1])))
assert len(tables["requests"]) >= int(sys.argv[3])
"""


def grow(trial: Path, requests: int) -> None:
    """Give the load `shared` of a trial `requests` requests of 1,000 prefix groups."""
    status = json.loads((trial / "loads" / "shared" / "status.json").read_text())
    width = (status["ended"] - status["started"]) / (requests + 1)
    export = next((trial / "export").glob("*.log"))
    with export.open("w") as file:
        for i in range(requests):
            text = f"prefix {i % 1000:04d} ".ljust(90, "x") + f"question {i}"
            row = {
                "request_parameters": json.dumps({"rid": f"r{i}", "text": text}),
                "id": f"r{i}",
                "prompt_tokens": 30,
                "completion_tokens": 4,
                "cached_tokens": 0 if i < 1000 else 20,
                "num_retractions": 0,
                "queue_time": 0.0002,
                "first_token_latency": 0.02,
                "e2e_latency": 0.03,
                "request_received_ts": status["started"] + width * (i + 1),
                "finish_reason": {"type": "length", "length": 4},
            }
            file.write(json.dumps(row) + "\n")
    row = {
        "input_lens": [30] * requests,
        "output_lens": [4] * requests,
        "ttfts": [0.0201 + i % 97 * 1e-5 for i in range(requests)],
        "itls": [[0.003, 0.003, 0.003]] * requests,
        "generated_texts": ["four small words here"] * requests,
        "errors": [""] * requests,
        "cached_tokens": [0 if i < 1000 else 20 for i in range(requests)],
    }
    (trial / "loads" / "shared" / "bench.jsonl").write_text(json.dumps(row) + "\n")


def measure(work: str, *arguments: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(work=work), *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, gib = done.stdout.split()
    return float(seconds), float(gib)


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), repeats=1)
        name = sorted(p.name for p in run.trials.iterdir())[0]
        grow(run.trials / name, requests)
        read_s, read_gib = measure(READ, str(run.path), name)
        tables_s, tables_gib = measure(TABLES, str(run.path), name, str(requests))
    print(
        f"{requests} requests: tables {tables_s:.1f} s and {tables_gib:.2f} GiB; only parsing the JSON {read_s:.1f} s"
    )
    print(f"ratio of time {tables_s / read_s:.2f}, of memory {tables_gib / read_gib:.2f}")


if __name__ == "__main__":
    main()
