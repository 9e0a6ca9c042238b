"""The command line with bad input: exit code 1, what is wrong, why, what to type; no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import Copy, Done, assert_refused, make_copy, snapshot
from fakerun import NAME, make_run
from parts import need

from lab.rundir import SCHEMA, Run, seal

SITES = {
    "key": 'name = "x"\nprot = 31000\n',
    "type": 'name = "x"\nport = "31000"\n',
    "cpus": 'name = "x"\nserver_cpus = [4095]\n',
    "port": 'name = "x"\nport = 70000\n',
    "node": 'name = "x"\nserver_mems = [7]\n',
    "cut": 'name = "x"\nport = ',
}

# name -> words after `invoke`, what the error says, what it lists besides
REFUSED: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "experiment": (
        ("exp.radicks",),
        "unknown experiment 'radicks'",
        ("radix", "small", "did you mean 'radix'"),
    ),
    "stack": (("exp.radix", "--stack", "gpu"), "unknown stack 'gpu'", ("cpu",)),
    "model": (("exp.radix", "--model", "llama"), "unknown model 'llama'", ("nano",)),
    "site": (("exp.radix", "--site", "locl"), "unknown site 'locl'", ("did you mean 'local'",)),
    "run": (("report", "--run", "yesterday"), "unknown run 'yesterday'", (NAME,)),
    "resumed run": (("exp.small", "--resume", "yesterday"), "unknown run 'yesterday'", (NAME,)),
    "no run": (("exp.radix", "--resume"), "there is no run yet", ("invoke exp.radix",)),
    "repeats 0": (("exp.radix", "--repeats", "0"), "--repeats 0 makes no sense", ("use 1 to 100",)),
    "repeats -3": (("exp.radix", "--repeats=-3"), "--repeats -3 makes no sense", ()),
    "repeats - 3": (("exp.radix", "--repeats", "-3"), "--repeats -3 makes no sense", ()),
    "repeats 101": (("exp.radix", "--repeats", "101"), "--repeats 101 makes no sense", ()),
    "repeats abc": (
        ("exp.radix", "--repeats", "abc"),
        "--repeats abc is not a whole number",
        ("--repeats 3",),
    ),
    "repeats 1e9": (("exp.radix", "--repeats", "1e9"), "--repeats 1e9 is not a whole number", ()),
    "site key": (
        ("exp.radix", "--site", "key.toml"),
        "unknown key in key.toml: 'prot'",
        ("did you mean 'port'",),
    ),
    "site type": (("exp.radix", "--site", "type.toml"), "type.toml: port = '31000'", ("a port number",)),
    "site cpus": (("exp.radix", "--site", "cpus.toml"), "asks for CPUs [4095]", ("may use only",)),
    "site port": (("exp.radix", "--site", "port.toml"), "port.toml: port = 70000", ()),
    "site node": (("exp.radix", "--site", "node.toml"), "asks for NUMA nodes [7]", ("the machine has",)),
    "site file": (("exp.radix", "--site", "none.toml"), "there is no site file none.toml", ()),
    "gpu": (("exp.radix", "--gpus", "6"), "GPU '6' is not there", ("no GPU",)),
    "driver": (
        ("exp.radix", "--stack", "cu125", "--runtime", "process"),
        "stack 'cu125' needs an NVIDIA driver",
        ("--stack cpu",),
    ),
    "runtime": (("exp.radix", "--runtime", "podman"), "unknown runtime 'podman'", ("docker", "process")),
    "engine": (
        ("exp.radix", "--runtime", "docker"),
        "no Docker engine answers",
        ("--runtime process",),
    ),
    "hardware": (("exp.radix", "--hardware", "box.json"), "--hardware plans for a machine", ("--dry-run",)),
    "site cut": (("exp.radix", "--site", "cut.toml"), "cut.toml is not valid TOML", ()),
    "variant": (("exp.bad-variant",), "unknown variant 'cache-onn'", ("cache-on", "cache-off")),
    "load": (("exp.bad-load", "--dry-run"), "unknown load 'chatt'", ("chat, shared, warmup",)),
    "dataset": (("exp.bad-dataset", "--explain"), "unknown dataset 'sharegpt'", ("generated-shared-prefix",)),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """What the command line says to each of REFUSED, all in one copy that holds one run; asked two at a time."""
    copy = make_copy(tmp_path_factory.mktemp("copy"))
    run = make_run(copy.root)
    seal(run)
    for name, text in SITES.items():
        (copy.root / f"{name}.toml").write_text(text)
    experiments, text = copy.small.parent, copy.small.read_text()
    (experiments / "bad_variant.py").write_text(text.replace('variant="cache-on"', 'variant="cache-onn"', 1))
    (experiments / "bad_load.py").write_text(text.replace('load="chat"', 'load="chatt"'))
    dreamt = "\nclass Dreamt(RandomIds):\n    dataset = 'sharegpt'\n\nEXPERIMENT = "
    bad = text.replace("\nEXPERIMENT = ", dreamt).replace("        RandomIds(", "        Dreamt(")
    (experiments / "bad_dataset.py").write_text(bad)
    before = snapshot(copy.root)
    with ThreadPoolExecutor(2) as pool:
        found = dict(
            zip(REFUSED, pool.map(lambda case: copy.invoke(*case[0]), REFUSED.values()), strict=True)
        )
    assert snapshot(copy.root) == before, "bad input must leave every file as it was, and none behind"
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(answers: dict[str, Done], name: str) -> None:
    _, problem, also = REFUSED[name]
    assert_refused(answers[name], problem, *also)


# ---- the machine


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return make_copy(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "new", "problem"),
    [
        ("memory_gb = .*", "memory_gb = 900000", "not enough memory for stack 'cpu'"),
        ("disk_gb = .*", "disk_gb = 900000", "not enough disk for stack 'cpu'"),
        ('system = "Linux"', 'system = "Darwin"', "stack 'cpu' does not run on Linux"),
        ('machine = "x86_64"', 'machine = "riscv64"', "stack 'cpu' does not run on a "),
        ('glibc = ".*"', 'glibc = "9.99"', "stack 'cpu' needs glibc 9.99 or newer"),
    ],
)
def test_a_machine_that_will_not_do(copy: Copy, pattern: str, new: str, problem: str) -> None:
    copy.edit("containers/cpu/stack.toml", pattern, new)
    assert_refused(copy.invoke("exp.small"), problem)
    assert not list((copy.root / "runs").glob("*/*"))


def test_a_lock_that_does_not_fit_its_input(copy: Copy) -> None:
    copy.edit("containers/cpu/requirements.in", "sglang==.*", "sglang==0.5.20")
    assert_refused(copy.invoke("exp.small"), "the lock of stack 'cpu' does not fit its input")


def test_a_stack_with_a_key_missing(copy: Copy) -> None:
    copy.edit("containers/cpu/stack.toml", "dialect = .*", "")
    assert_refused(copy.invoke("exp.small"), "key 'dialect' is missing")


def test_a_port_in_use(copy: Copy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (copy.root / "mine.toml").write_text(f'name = "mine"\nport = {port}\n')
        done = copy.invoke("exp.small", "--site", "mine.toml")
    assert_refused(done, f"port {port} cannot be used", f"pid {os.getpid()}", "choose another port")
    assert not list((copy.root / "runs").glob("*/*"))


def test_the_folder_for_runs_is_a_file(copy: Copy) -> None:
    (copy.root / "runs").write_text("mine\n")
    assert_refused(copy.invoke("exp.small"), "the folder for runs cannot be written", "runs")
    assert (copy.root / "runs").read_text() == "mine\n"


@pytest.fixture(scope="session")
def unprivileged() -> tuple[str, ...]:
    """What to put before a command so that permissions count: nothing for a user, for root a dropped capability."""
    if os.geteuid() != 0:
        return ()
    words = (shutil.which("setpriv") or "setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    works = (
        bool(shutil.which("setpriv"))
        and subprocess.run((*words, "true"), capture_output=True).returncode == 0
    )
    need(works, "setpriv, to be bound by permissions as root")
    return words


def test_a_read_only_folder_for_runs(copy: Copy, unprivileged: tuple[str, ...]) -> None:
    (copy.root / "runs").mkdir(mode=0o555)
    done = copy.invoke("exp.small", before=unprivileged)
    assert_refused(done, "the folder for runs cannot be written", "Permission denied")


def test_a_read_only_run_cannot_be_reported(copy: Copy, unprivileged: tuple[str, ...]) -> None:
    run = make_run(copy.root)
    seal(run)
    before = snapshot(run.path)
    run.path.chmod(0o555)
    done = copy.invoke("report", before=unprivileged)
    run.path.chmod(0o755)
    assert_refused(done, f"the report of run {NAME} cannot be written", "Permission denied")
    assert snapshot(run.path) == before


# ---- a run that is not what it was


def damage_changed(run: Run) -> None:
    path = run.trial("000-cache-on-r0").load("chat").chat
    path.chmod(0o644)
    path.write_text(path.read_text().replace("0.0", "0.9", 1))


def damage_removed(run: Run) -> None:
    run.trial("001-cache-off-r0").server_log.unlink()


def damage_added(run: Run) -> None:
    (run.trials / "new.txt").write_text("")


def damage_newer(run: Run) -> None:
    reseal(run, run.plan, json.dumps({**json.loads(run.plan.read_text()), "schema": SCHEMA + 1}))


def damage_half_written(run: Run) -> None:
    reseal(run, run.plan, run.plan.read_text()[:3000])


def damage_cut_status(run: Run) -> None:
    reseal(run, run.trial("000-cache-on-r0").status, '{"schema": 1, "sta')


def reseal(run: Run, path: Path, text: str) -> None:
    """Change a raw file as something that also knows the sums would."""
    path.chmod(0o644)
    path.write_text(text)
    seal(run)


@pytest.mark.parametrize(
    ("damage", "problem", "also"),
    [
        (damage_changed, "is not what was measured", "loads/chat/chat.jsonl was changed"),
        (damage_removed, "is not what was measured", "001-cache-off-r0/server.log is missing"),
        (damage_added, "is not what was measured", "trials/new.txt was added"),
        (damage_newer, f"plan.json has schema {SCHEMA + 1}", "update the lab"),
        (damage_half_written, "plan.json is not a plan of this lab", "cut short"),
        (damage_cut_status, "status.json is not readable JSON", "cut short"),
    ],
)
def test_no_report_from_a_run_that_is_not_what_it_was(
    copy: Copy, damage: Callable[[Run], None], problem: str, also: str
) -> None:
    run = make_run(copy.root)
    seal(run)
    damage(run)
    before = snapshot(run.path)
    assert_refused(copy.invoke("report"), problem, also)
    assert {k: v for k, v in snapshot(run.path).items() if k in before} == before
    assert not run.report.exists()
    assert not run.verdicts.exists()


def test_a_run_that_was_cut_short_is_reported_as_such(copy: Copy) -> None:
    run = make_run(copy.root)
    last = sorted(run.trials.iterdir())[-1]
    run.trial(last.name).status.write_text('{"schema": 1, "status": "running", "phase": "load chat"}')
    done = copy.invoke("report")
    assert done.code == 2
    assert "cut short" in done.text
    assert "--resume" in done.text
    assert "the lab was killed during this trial" in run.report.read_text()
    assert "cut short before its raw files were sealed" in run.report.read_text()


def test_resume_of_a_run_whose_experiment_changed(copy: Copy) -> None:
    run = make_run(copy.root)
    before = snapshot(run.path)
    copy.small.write_text(copy.small.read_text() + "\n# a new thought\n")
    assert_refused(
        copy.invoke("exp.small", "--resume"), "lab/experiments/small.py has changed since", "experiment.py"
    )
    assert snapshot(run.path) == before


def test_resume_with_other_repeats(copy: Copy) -> None:
    make_run(copy.root)
    done = copy.invoke("exp.small", "--resume", "--repeats", "5")
    assert_refused(done, "was planned with 2 repeats, not 5", "leave --repeats out")


def test_resume_with_another_stack(copy: Copy) -> None:
    make_run(copy.root)
    done = copy.invoke("exp.small", "--resume", NAME)
    assert_refused(done, "it used another runtime, stack, model or scale", "/lab-test/stack")


def test_resume_of_a_run_with_a_changed_raw_file(copy: Copy) -> None:
    run = make_run(copy.root)
    seal(run)
    damage_changed(run)
    assert_refused(copy.invoke("exp.small", "--resume"), "is not what was measured", "was changed")


# ---- and when all is well


def test_a_report_of_a_good_run_twice_gives_the_same_bytes(copy: Copy) -> None:
    run = make_run(copy.root)
    seal(run)
    raw = snapshot(run.path)
    done = copy.invoke("report")
    assert done.code == 0, done.text
    assert "hits    held" in done.out
    assert "faster  held" in done.out
    assert f"report: runs/small/{NAME}/report.md" in done.out
    first = snapshot(run.path)
    assert {k: v for k, v in first.items() if k in raw} == raw
    assert {"report.md", "verdicts.json", "tables/trials.csv", "tables/requests.csv"} <= first.keys()
    shutil.rmtree(run.tables)
    run.verdicts.unlink()
    assert copy.invoke("report", "--run", NAME).code == 0
    assert snapshot(run.path) == first


def test_an_invalid_trial_is_said_and_exits_with_2(copy: Copy) -> None:
    run = make_run(copy.root)
    path = run.trial("000-cache-on-r0").load("shared").bench
    path.write_bytes(path.read_bytes()[:100])
    no_info = run.trial("001-cache-off-r0").server_info
    no_info.write_text("{")
    seal(run)
    done = copy.invoke("report")
    assert done.code == 2, done.text
    assert "not used: 000-cache-on-r0: invalid: shared: every request succeeded: 0 of 6" in done.out
    assert "not used: 001-cache-off-r0: invalid: " in done.out
    assert "Traceback" not in done.text
    assert "Warning" not in done.text
    report = run.report.read_text()
    assert "0 of 6 requests succeeded" in report
    assert "server_info.json is not readable JSON" in report
    assert str(copy.root) not in report


def test_a_dry_run_prints_the_script_and_does_nothing(copy: Copy) -> None:
    before = snapshot(copy.root)
    done = copy.invoke("exp.radix", "--dry-run", "--repeats", "2")
    assert done.code == 0, done.text
    assert subprocess.run(("bash", "-n"), input=done.out, text=True).returncode == 0
    assert done.out.count("sglang.launch_server") == 6
    assert done.out == copy.invoke("exp.radix", "--dry-run", "--repeats", "2").out
    assert snapshot(copy.root) == before


def test_explain_says_question_variants_loads_and_claims(copy: Copy) -> None:
    done = copy.invoke("exp.small", "--explain")
    assert done.code == 0, done.text
    for part in (
        "Does it work?",
        "cache-off: without --disable-radix-cache",
        "shared: 6 requests",
        "hits: Later",
    ):
        assert part in done.out
    assert not (copy.root / "runs").exists()


def test_runs_lists_every_run_also_one_that_cannot_be_read(copy: Copy) -> None:
    assert copy.invoke("runs").code == 0
    good = make_run(copy.root)
    seal(good)
    shutil.copytree(good.path, good.path.with_name("20260103T030405Z-0000"))
    broken = Run(good.path.with_name("20260103T030405Z-0000"))
    broken.plan.chmod(0o644)
    broken.plan.write_text("{")
    done = copy.invoke("runs")
    assert done.code == 0, done.text
    first, second = done.out.splitlines()
    assert first == f"small/{NAME}  4 of 4 trials ok"
    assert second.startswith("small/20260103T030405Z-0000  unreadable: plan.json is not a plan of this lab")


def test_doctor_and_clean_end_without_a_traceback(copy: Copy) -> None:
    done = copy.invoke("doctor")
    assert done.code in (0, 1)
    assert "Traceback" not in done.text
    assert "not built yet" in done.out
    done = copy.invoke("clean")
    assert done.code == 0, done.text
    listed = copy.invoke("--list").out
    experiments = [path.stem.replace("_", "-") for path in copy.small.parent.glob("*.py")]
    assert listed.count("exp.") == len(experiments) + 1
    assert all(f"exp.{name}" in listed for name in (*experiments, "all"))
