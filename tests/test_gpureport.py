"""The report's section on GPUs: the matrix with seats, the numbers with units, and pictures that a long trial does not slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakerun import make_run
from gpufiles import gpu_run
from hypothesis import given
from hypothesis import strategies as st
from nvmlstandin import DGX_A100, PLAN_BOX, WORKSTATION, hardware_of

from lab.plan import read_plan
from lab.report.gpuplots import shown, thin
from lab.report.gpusection import by_trial, matrix
from lab.report.render import analyse
from lab.rundir import Run
from lab.tables import tabulate
from lab.telemetry.gpucsv import Sample

FIRST = "000-cache-on-r0"


def hot(sample: Sample) -> Sample:
    return replace(sample, clock_reasons=0x40)


def section(run: Run) -> str:
    text = run.report.read_text()
    _, _, rest = text.partition("\n### GPUs\n")
    return rest.partition("\n## ")[0]


def pictures(run: Run) -> list[str]:
    return sorted(path.name for path in run.plots.glob("gpus-*.png"))


def test_a_run_without_gpus_has_no_such_section(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    analyse(run)
    assert section(run) == ""
    assert "GPUs" not in run.report.read_text().replace("| variant | GPUs |", "")
    assert pictures(run) == []


def test_the_section_of_a_good_run(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    analyse(run)
    text = section(run)
    assert "| 0 | NVIDIA A100-SXM4-80GB | X | **NV12** | PXB |" in text
    assert "| cache-off (rank 0), cache-on (rank 0) |" in text
    assert "| shared | cache-on | power_w | 600.0 | 600.0 to 600.0 | W | 2 | 0.0% |" in text
    assert (
        "| shared | cache-on | j_per_output_token | 375.000 | 375.000 to 375.000 | J/token | 2 | 0.0% |"
        in text
    )
    assert "warmup" not in text, "loads that are not measured have no numbers"
    assert "2 GPUs (NVIDIA A100-SXM4-80GB)" in run.report.read_text()
    assert pictures(run) == ["gpus-000-cache-on-r0.png", "gpus-001-cache-off-r0.png"]
    for name in pictures(run):
        assert f"(plots/{name})" in text
        assert (run.plots / name).stat().st_size > 10_000


def test_the_report_comes_out_the_same_twice(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    analyse(run)
    before = {path: path.read_bytes() for path in (run.report, *run.plots.iterdir())}
    analyse(run)
    assert {path: path.read_bytes() for path in (run.report, *run.plots.iterdir())} == before


def test_an_unusable_trial_is_drawn_with_the_reason_and_counts_in_no_number(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, changes={FIRST: lambda s: replace(hot(s), power_w=900.0)})
    analyse(run)
    text = section(run)
    assert f'trial {FIRST}, which failed the check "GPUs were not slowed"' in text
    assert "| shared | cache-on | power_w | 600.0 | one repeat, none | W | 1 |" in text
    assert len(pictures(run)) == 3


def test_an_untested_check_is_not_called_passed(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, changes={FIRST: lambda s: replace(s, clock_reasons=None)})
    analyse(run)
    text = run.report.read_text()
    assert f"| {FIRST} | valid | 27 of 28, 1 untested |" in text
    assert "| all | GPUs were not slowed | untested | untested: the driver gives no reasons" in text


def test_without_the_machine_the_rest_is_shown(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    run.hardware.unlink()
    analyse(run)
    text = section(run)
    assert "The machine" not in text
    assert "| shared | cache-on | power_w |" in text
    assert len(pictures(run)) == 2


def test_a_trial_without_samples_costs_its_picture_only(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    run.trial(FIRST).gpus.unlink()
    cut = run.trial("001-cache-off-r0").gpus
    cut.write_text(cut.read_text()[:-40])
    analyse(run)
    assert pictures(run) == ["gpus-001-cache-off-r0.png", "gpus-003-cache-on-r1.png"]


def test_a_sum_with_a_missing_part_is_missing(tmp_path: Path) -> None:
    """Energy of two GPUs of which one gave none would be half the truth."""
    silent = PLAN_BOX.uuid(1)
    run = gpu_run(tmp_path, changes={FIRST: lambda s: replace(s, power_w=None) if s.gpu == silent else s})
    found = by_trial(tabulate(run)).set_index(["trial", "load"])
    assert pd.isna(found.loc[(FIRST, "chat"), "energy_j"])
    assert pd.isna(found.loc[(FIRST, "chat"), "j_per_output_token"])
    assert found.loc[("001-cache-off-r0", "chat"), "energy_j"] == pytest.approx(9000, rel=0.02)


def test_which_trials_are_drawn(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, changes={FIRST: hot, "002-cache-off-r1": hot})
    names = [name for name, _ in shown(tabulate(run))]
    assert names == [FIRST, "001-cache-off-r0", "002-cache-off-r1", "003-cache-on-r1"]


@pytest.mark.parametrize(
    ("machine", "kinds"),
    [(PLAN_BOX, ("NV#", "PXB", "SYS")), (DGX_A100, ("NV#",)), (WORKSTATION, ("PHB",))],
)
def test_the_matrix_is_square_symmetric_and_explained(machine: object, kinds: tuple[str, ...]) -> None:
    hardware = hardware_of(machine)  # type: ignore[arg-type]
    found = matrix(hardware, ())
    size = len(hardware.gpus)
    cells = [row[2 : 2 + size] for row in found.rows[1:]]
    assert [row[i] for i, row in enumerate(cells)] == ["X"] * size
    assert all(cells[i][j] == cells[j][i] for i in range(size) for j in range(size))
    assert tuple(line.split()[0] for line in found.legend) == kinds
    assert {row[-1] for row in found.rows[1:]} == {"nobody"}


def test_only_ways_inside_a_group_are_in_bold(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, indexes=(2, 3, 4))
    found = matrix(hardware_of(PLAN_BOX), read_plan(run).trials)
    bold = {(row[0], i) for row in found.rows[1:] for i, cell in enumerate(row[2:9]) if "**" in cell}
    assert bold == {(str(a), b) for a in (2, 3, 4) for b in (2, 3, 4) if a != b}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=400), st.integers(1, 50))
def test_thinning_keeps_range_and_time_and_is_short(values: list[float], points: int) -> None:
    times = np.arange(len(values)) / 10
    line = thin(times, values, points=points)
    assert len(line.mean) <= max(points, 1) if len(values) > points else len(line.mean) == len(values)
    assert (line.low.min(), line.high.max()) == (min(values), max(values))
    assert (np.diff(line.time_s) > 0).all()
    assert times[0] <= line.time_s[0]
    assert line.time_s[-1] <= times[-1]
    assert ((line.low <= line.mean * (1 + 1e-9)) & (line.mean <= line.high * (1 + 1e-9))).all()
