"""gpu.csv as rows and checks: power, energy, and everything that makes a trial's numbers useless."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakerun import START
from gpufiles import PID, Change, gpu_run, steady, write_samples
from hypothesis import given
from hypothesis import strategies as st
from nvmlstandin import PLAN_BOX, hardware_of

from lab.gpurows import UNTESTED, Row, energy_j, machine_of, read_gpus
from lab.hardware.model import Gpu, Hardware
from lab.plan import Process, Trial
from lab.rundir import TrialFiles
from lab.tables import load_table, tabulate
from lab.telemetry.gpucsv import Sample
from lab.validity import Check

GPU0, GPU1 = PLAN_BOX.uuid(0), PLAN_BOX.uuid(1)
MACHINE = hardware_of(PLAN_BOX)
WATCHED, ANSWERED, SLOWED, ALONE = (
    "GPUs were watched",
    "GPUs answered",
    "GPUs were not slowed",
    "nobody else used the GPUs",
)
CLOCK = "clock of GPU 0 was near what is set"


def read(
    folder: Path,
    samples: list[Sample] | None,
    *,
    gpus: tuple[str, ...] = (GPU0,),
    pids: object = (PID,),
    machine: Hardware | None = MACHINE,
    windows: dict[str, tuple[float, float]] | None = None,
) -> tuple[list[Row], dict[str, Check], list[str]]:
    """Rows, checks by name and problems of a trial whose loads lie between second 10 and 20."""
    process = Process(argv=(), env=(), cpus=(), gpus=gpus)
    trial = Trial(
        index=0,
        name="000-a-r0",
        variant="a",
        repeat=0,
        server=process,
        client=replace(process, gpus=()),
        loads=(),
    )
    if samples is not None:
        write_samples(folder / "gpu.csv", samples)
    status: dict[str, object] = {"gpu_pids": list(pids)} if isinstance(pids, tuple) else {}
    rows, checks, problems = read_gpus(
        trial,
        TrialFiles(folder),
        status,
        windows=windows or {"load": (10.0, 20.0)},
        tokens=dict.fromkeys(windows or ("load",), 500.0),
        machine=machine,
    )
    return rows, {check.name: check for check in checks}, problems


def good(gpus: tuple[str, ...] = (GPU0,)) -> list[Sample]:
    return steady(gpus, start_s=5, end_s=25)


def bad(checks: dict[str, Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks.values() if not check.ok}


# -- rows


def test_a_row_a_load_and_gpu(tmp_path: Path) -> None:
    samples = good((GPU0, GPU1))
    rows, checks, problems = read(
        tmp_path, samples, gpus=(GPU0, GPU1), windows={"warm": (10, 12), "load": (12, 20)}
    )
    assert [(row["load"], row["gpu"]) for row in rows] == [
        ("warm", GPU0),
        ("warm", GPU1),
        ("load", GPU0),
        ("load", GPU1),
    ]
    assert bad(checks) == {}
    assert problems == []
    row = rows[2]
    assert row["samples"] == pytest.approx(81, abs=1)
    assert row["power_w"] == pytest.approx(300)
    assert row["energy_j"] == pytest.approx(300 * 8, rel=0.02)
    assert row["j_per_output_token"] == pytest.approx(300 * 8 / 500, rel=0.02)
    assert (row["sm_util_pct"], row["memory_used_mib"], row["temperature_c"], row["sm_clock_mhz"]) == (
        97,
        70_000,
        60,
        1410,
    )


def test_only_samples_within_the_load_count(tmp_path: Path) -> None:
    samples = [replace(s, power_w=900.0) if not 10 <= s.time_s <= 20 else s for s in good()]
    rows, _, _ = read(tmp_path, samples)
    assert rows[0]["power_w"] == pytest.approx(300)


def test_what_the_gpu_does_not_offer_is_empty_and_no_zero(tmp_path: Path) -> None:
    samples = [
        replace(s, power_w=None, sm_clock_mhz=None, memory_used_mib=None, sm_util_pct=None) for s in good()
    ]
    (row,), _, _ = read(tmp_path, samples)
    assert [row[k] for k in ("power_w", "energy_j", "j_per_output_token", "memory_used_mib")] == [None] * 4


def test_a_load_without_answers_has_no_energy_per_token(tmp_path: Path) -> None:
    write_samples(tmp_path / "gpu.csv", good())
    process = Process(argv=(), env=(), cpus=(), gpus=(GPU0,))
    trial = Trial(index=0, name="t", variant="a", repeat=0, server=process, client=process, loads=())
    (row,), _, _ = read_gpus(
        *(trial, TrialFiles(tmp_path), {}), windows={"load": (10, 20)}, tokens={"load": 0.0}, machine=None
    )
    assert row["energy_j"] == pytest.approx(3000, rel=0.02)
    assert row["j_per_output_token"] is None


def test_nothing_for_a_trial_without_gpus(tmp_path: Path) -> None:
    assert read(tmp_path, None, gpus=()) == ([], {}, [])


def at(second: float, power_w: float | None) -> Sample:
    return Sample(time_s=second, monotonic_s=second, gpu=GPU0, power_w=power_w)


def test_energy_by_trapezoids() -> None:
    assert energy_j([at(0, 100), at(1, 300), at(3, 100)]) == 200 + 400
    assert energy_j([at(0, 100), at(1, None), at(2, 300)]) == 400, "a missing number is bridged"
    assert energy_j([at(0, 100)]) is None
    assert energy_j([]) is None


@given(
    st.lists(st.floats(0.01, 2), min_size=2, max_size=30),
    st.floats(0, 50),
    st.floats(-5, 5),
)
def test_energy_of_a_straight_line_is_exact(steps: list[float], base: float, slope: float) -> None:
    """Trapezoids are exact where power changes evenly, however uneven the moments are."""
    times = [sum(steps[:i]) for i in range(len(steps))]
    found = energy_j([at(t, base + slope * t) for t in times])
    end = times[-1]
    assert found == pytest.approx(base * end + slope * end * end / 2, abs=1e-6)


# -- checks: each is made to fail alone


def slowed(bit: int, share: int = 1) -> Callable[[list[Sample]], list[Sample]]:
    return lambda samples: [
        replace(s, clock_reasons=bit) if i % share == 0 else s for i, s in enumerate(samples)
    ]


SPOILT: dict[str, tuple[Callable[[list[Sample]], list[Sample]], str, str]] = {
    "the sampler is killed": (
        lambda samples: [s for s in samples if s.time_s < 14],
        WATCHED,
        "1 gaps, the longest of 6.",
    ),
    "a hole": (
        lambda samples: [s for s in samples if not 12 < s.time_s < 16],
        WATCHED,
        f"of 4.0 s on {GPU0}",
    ),
    "hardware slowdown": (slowed(0x8, share=50), SLOWED, "hardware slowdown in 3 of 101 samples"),
    "thermal slowdown": (slowed(0x20), SLOWED, "software thermal slowdown in 101 of 101"),
    "power brake": (slowed(0x80), SLOWED, "hardware power brake"),
    "cap and heat": (slowed(0x44), SLOWED, "hardware thermal slowdown in 101 of 101 samples, software power"),
    "the GPU is lost": (
        lambda samples: [
            s if s.time_s < 14 else replace(s, power_w=None, processes=None, problem="GPU is lost")
            for s in samples
        ],
        ANSWERED,
        f"{GPU0}: GPU is lost",
    ),
    "a stranger": (
        lambda samples: [replace(s, processes=(PID, 999)) if s.processes else s for s in samples],
        ALONE,
        f"{GPU0}: pid 999",
    ),
    "low clocks": (
        lambda samples: [replace(s, sm_clock_mhz=1005) for s in samples],
        CLOCK,
        "median 1005 MHz, 1410 MHz set; 101 of 101 samples of a busy GPU were more than 10% below",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_fault_fails_its_check_and_no_other(what: str, tmp_path: Path) -> None:
    spoil, name, words = SPOILT[what]
    _, checks, _ = read(tmp_path, spoil(good()))
    assert set(bad(checks)) == {name}
    assert words in checks[name].detail


def test_the_same_outside_the_loads_does_not_matter(tmp_path: Path) -> None:
    for spoil in (slowed(0x8), SPOILT["the GPU is lost"][0], SPOILT["a stranger"][0]):
        both = zip(good(), spoil(good()), strict=True)
        samples = [fine if 10 <= fine.time_s <= 20 else spoilt for fine, spoilt in both]
        _, checks, _ = read(tmp_path, samples)
        assert bad(checks) == {}


def test_the_power_cap_alone_is_said_and_does_not_invalidate(tmp_path: Path) -> None:
    """An H100 under a large matrix product runs at 1,500 of 1,980 MHz for this reason."""
    samples = [replace(s, clock_reasons=0x4, sm_clock_mhz=1070) for s in good()]
    _, checks, _ = read(tmp_path, samples)
    assert bad(checks) == {}
    assert checks[SLOWED].detail == "software power cap in 101 of 101 samples"
    assert checks[CLOCK].detail.startswith(UNTESTED)


@pytest.mark.parametrize("reasons", [0x1, 0x2, 0x100, 0x103])
def test_idle_and_clocks_as_somebody_set_them_are_no_slowdown(reasons: int, tmp_path: Path) -> None:
    _, checks, _ = read(tmp_path, slowed(reasons)(good()))
    assert bad(checks) == {}
    assert checks[SLOWED].detail == "no reason for lower clocks was seen"


def test_a_load_shorter_than_a_gap_does_not_go_unwatched(tmp_path: Path) -> None:
    samples = [s for s in good() if s.time_s < 10]
    _, checks, _ = read(tmp_path, samples, windows={"short": (15, 15.5)})
    assert bad(checks) == {WATCHED: f"no sample during the loads of {GPU0}"}


def test_no_file_at_all(tmp_path: Path) -> None:
    rows, checks, _ = read(tmp_path, None)
    assert rows == []
    assert bad(checks) == {WATCHED: "there is no gpu.csv"}


def test_one_of_two_gpus_is_enough(tmp_path: Path) -> None:
    samples = [replace(s, problem="GPU is lost") if s.gpu == GPU1 else s for s in good((GPU0, GPU1))]
    _, checks, _ = read(tmp_path, samples, gpus=(GPU0, GPU1))
    assert bad(checks) == {ANSWERED: f"{GPU1}: GPU is lost"}


# -- what cannot be tested is said


def with_clock(clock_mhz: int | None) -> Hardware:
    def changed(gpu: Gpu) -> Gpu:
        return replace(gpu, sm_clock_set_mhz=clock_mhz)

    return replace(MACHINE, gpus=tuple(changed(gpu) for gpu in MACHINE.gpus))


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        (with_clock(None), CLOCK, "the driver does not say which clock is set"),
        (None, f"clock of {GPU0} was near what is set", "no hardware.json"),
    ],
)
def test_a_clock_that_is_not_known_is_untested(
    machine: Hardware | None, name: str, words: str, tmp_path: Path
) -> None:
    _, checks, _ = read(tmp_path, good(), machine=machine)
    assert checks[name] == Check(name=name, ok=True, detail=UNTESTED + words)


def test_an_idle_gpu_says_nothing_about_its_clock(tmp_path: Path) -> None:
    samples = [replace(s, sm_util_pct=3, sm_clock_mhz=210) for s in good()]
    _, checks, _ = read(tmp_path, samples)
    assert checks[CLOCK].ok
    assert checks[CLOCK].detail.startswith(f"{UNTESTED}no sample of a busy GPU")


@pytest.mark.parametrize(("until_s", "ok"), [(10.9, True), (12, False)])
def test_a_clock_that_rises_as_the_load_begins_is_no_fault(until_s: float, ok: bool, tmp_path: Path) -> None:
    samples = [replace(s, sm_clock_mhz=210) if s.time_s < until_s else s for s in good()]
    _, checks, _ = read(tmp_path, samples)
    assert checks[CLOCK].ok is ok


def test_a_clock_above_the_set_one_is_no_fault(tmp_path: Path) -> None:
    _, checks, _ = read(tmp_path, good(), machine=with_clock(1275))
    assert checks[CLOCK].ok
    assert checks[CLOCK].detail.startswith("median 1410 MHz")


def test_processes_that_the_driver_does_not_list_are_untested(tmp_path: Path) -> None:
    _, checks, _ = read(tmp_path, [replace(s, processes=None) for s in good()], pids=())
    assert checks[ALONE].detail == f"{UNTESTED}the driver does not list processes"
    (tmp_path / "gpu.csv").unlink()
    samples = [replace(s, processes=() if s.processes else None) for s in good()]
    _, checks, _ = read(tmp_path, samples, pids=())
    assert checks[ALONE].ok
    assert "no process is listed: it lies in another PID namespace" in checks[ALONE].detail


def test_no_reasons_from_the_driver_are_untested(tmp_path: Path) -> None:
    _, checks, _ = read(tmp_path, [replace(s, clock_reasons=None) for s in good()])
    assert checks[SLOWED].ok
    assert checks[SLOWED].detail.startswith(UNTESTED)


# -- in a whole run


def throttled(sample: Sample) -> Sample:
    return replace(sample, clock_reasons=0x40, sm_clock_mhz=600)


def cut(sample: Sample) -> Sample | None:
    return sample if sample.time_s < START + 30 else None


@pytest.mark.parametrize(
    ("change", "reason"),
    [(throttled, "GPUs were not slowed: hardware thermal slowdown in"), (cut, "GPUs were watched: 2 gaps")],
)
def test_a_trial_whose_gpus_failed_is_invalid_and_the_others_are_not(
    change: Change, reason: str, tmp_path: Path
) -> None:
    tables = tabulate(gpu_run(tmp_path, changes={"000-cache-on-r0": change}))
    trials = tables["trials"].set_index("trial")
    assert trials.loc["000-cache-on-r0", "validity"] == "invalid"
    assert reason in str(trials.loc["000-cache-on-r0", "reason"])
    assert list(trials["validity"]).count("valid") == 3


def test_the_table_of_gpus_is_written_and_read_back(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    tabulate(run)
    table = load_table(run, "gpus")
    assert len(table) == 4 * 3 * 2, "four trials, three loads, two GPUs"
    chat = table.query("load == 'chat'")
    assert set(chat["output_tokens"]) == {12}
    assert chat["energy_j"].between(300 * 14.8, 300 * 15.01).all()
    first = (run.tables / "gpus.csv").read_bytes()
    tabulate(run)
    assert (run.tables / "gpus.csv").read_bytes() == first


def test_a_cut_line_costs_the_line_and_a_file_of_others_its_trial(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    first, second = (run.trial(name).gpus for name in ("000-cache-on-r0", "001-cache-off-r0"))
    first.write_text(first.read_text()[:-20])
    second.write_text("time,power\n1,2\n")
    trials = tabulate(run)["trials"].set_index("trial")
    assert trials.loc["000-cache-on-r0", "validity"] == "valid"
    assert "is left out" in str(trials.loc["000-cache-on-r0", "unreadable"])
    assert trials.loc["001-cache-off-r0", "validity"] == "invalid"
    assert "gpu.csv has other columns" in str(trials.loc["001-cache-off-r0", "reason"])


def test_a_machine_that_cannot_be_read_costs_no_report(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    run.hardware.chmod(0o644)
    run.hardware.write_text(json.dumps({"schema": 1}))
    assert machine_of(run) is None
    assert list(tabulate(run)["trials"]["validity"]) == ["valid"] * 4
