"""The index of 1,000 runs, beside reading the same files and doing nothing with them."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fakerun import make_run

from lab.report.index import write_index
from lab.report.render import analyse
from lab.rundir import Run, list_runs, seal

RUNS = 1000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = many(Path(folder))
        start = time.perf_counter()
        size = sum(len(path.read_bytes()) for run in list_runs(root) for path in small_files(run))
        reading = time.perf_counter() - start
        start = time.perf_counter()
        page = write_index(root, experiments=("small",))
        index = time.perf_counter() - start
        assert page.read_text().count("/report.md") >= RUNS
    print(
        f"index of {RUNS} runs {index:.2f} s, reading their {size / 1e6:.0f} MB {reading:.2f} s, "
        f"ratio {index / reading:.1f}"
    )


def many(folder: Path) -> Path:
    """A folder of RUNS runs, each with the small files of a real one."""
    run = make_run(folder / "one")
    seal(run)
    analyse(run)
    root = folder / "runs"
    for number in range(RUNS):
        copy = Run(
            root / "small" / f"20260102T{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}Z-0000"
        )
        for path in (*small_files(run), run.sums, run.report):
            target = copy.path / path.relative_to(run.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return root


def small_files(run: Run) -> tuple[Path, ...]:
    return (run.plan, run.verdicts, run.environment, run.tables / "trials.csv")


if __name__ == "__main__":
    main()
