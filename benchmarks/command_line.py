"""`invoke --list` against starting Python; the report of a 20-trial run against importing pandas and matplotlib."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fakerun import make_run

REBUILD = """
import sys
from pathlib import Path
from lab.report.render import analyse
from lab.rundir import Run
analyse(Run(Path(sys.argv[1])))
"""


def seconds(*words: str, times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> None:
    python = seconds("-c", "pass", times=9)
    listing = seconds("-m", "invoke", "--list", times=9)
    print(f"invoke --list {listing:.3f} s, python alone {python:.3f} s, ratio {listing / python:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), repeats=10)
        imports = seconds("-c", "import pandas, matplotlib.pyplot, jinja2, scipy.special", times=3)
        report = seconds("-c", REBUILD, str(run.path), times=3)
    print(
        f"report of 20 trials {report:.2f} s, its libraries alone {imports:.2f} s, ratio {report / imports:.1f}"
    )


if __name__ == "__main__":
    main()
