"""The whole path in containers: a real SGLang server in the cpu image, pinned, looked at while it runs, reported; and
nothing left, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import dockerparts
import pytest
from checkout import Checkout, make_checkout, scratch_folders

from lab.container import RUN_LABEL

pytestmark = pytest.mark.usefixtures("nano", "image")


@pytest.fixture(scope="module")
def image() -> str:
    return dockerparts.cpu_image()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("clone"), docker=True)


def ours() -> list[str]:
    """Everything at the engine that carries the lab's label."""
    only = ("--quiet", "--filter", f"label={RUN_LABEL}")
    lists = (("ps", "--all", *only), ("network", "ls", *only), ("volume", "ls", *only))
    return [line for words in lists for line in dockerparts.docker(*words).stdout.split()]


@pytest.fixture(autouse=True)
def nothing_left():
    before = scratch_folders()
    yield
    assert ours() == []
    assert scratch_folders() <= before


def trial(run: Path, name: str = "000-only-r0") -> Path:
    return run / "trials" / name


def status_of(run: Path) -> dict[str, object]:
    return json.loads((trial(run) / "status.json").read_text())


def running_server(lab: subprocess.Popen[str], *, seconds: float = 120) -> dict:
    """`docker inspect` of the server of the lab that was just started."""
    deadline = time.monotonic() + seconds
    words = ("ps", "--quiet", "--filter", f"label={RUN_LABEL}", "--filter", "name=server")
    while not (found := dockerparts.docker(*words).stdout.split()):
        assert lab.poll() is None, lab.communicate()[0]
        assert time.monotonic() < deadline, "no server's container came up"
        time.sleep(0.1)
    return json.loads(dockerparts.docker("inspect", found[0]).stdout)[0]


def test_radix_in_containers_gives_the_verdicts_of_processes(checkout: Checkout) -> None:
    code, output = checkout.invoke("exp.radix", timeout=1500)
    if code == 2 and "client was not the bottleneck" in output:  # as in test_end_to_end: a noisy neighbour
        code, output = checkout.invoke("exp.radix", timeout=1500)
    assert code == 0, output
    run = checkout.newest_run("radix")
    verdicts = json.loads((run / "verdicts.json").read_text())["verdicts"]
    assert "untested" not in {v["outcome"] for v in verdicts}
    # what does not depend on how fast the machine is holds here as it does with processes
    sure = {"cold-start", "prefix-hit", "hit-share", "eviction", "eviction-order"}
    assert {v["claim"] for v in verdicts if v["outcome"] == "held"} >= sure
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["runtime"], plan["containers"]["image"][:7]) == ("docker", "sha256:")
    assert "runtime docker: Docker engine" in output
    assert "Docker engine" in (run / "report.md").read_text()


def test_what_inspect_shows_is_what_the_plan_says(checkout: Checkout) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    site = checkout.path / "pinned.toml"
    site.write_text(
        f'name = "pinned"\nserver_cpus = [{cpus[0]}]\nclient_cpus = [{cpus[-1]}]\n'
        "server_mems = [0]\nclient_mems = [0]\nmemory_gb = 6\nshm_gb = 1\n"
    )
    checkout.tiny("pinned")
    lab = checkout.start("exp.pinned", "--site", str(site))
    try:
        seen = running_server(lab)
        output, _ = lab.communicate(timeout=300)
    finally:
        lab.kill()
    run = checkout.newest_run("pinned")
    assert status_of(run)["status"] == "ok", output  # valid or not: one CPU is little for a server
    plan = json.loads((run / "plan.json").read_text())
    host = seen["HostConfig"]
    assert host["CpusetCpus"] == str(cpus[0])
    assert host["CpusetMems"] == "0"
    assert (host["Memory"], host["ShmSize"]) == (6_000_000_000, 1_000_000_000)
    assert (host["Privileged"], host["CapAdd"], host["CapDrop"]) == (False, None, ["ALL"])
    assert seen["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
    assert seen["Image"] == plan["containers"]["image"]
    assert seen["Config"]["Labels"][RUN_LABEL] == run.name
    assert host["PortBindings"]["30000/tcp"][0]["HostIp"] == "127.0.0.1"
    mounts = {m["Destination"]: (m.get("Source", ""), m["RW"]) for m in seen["Mounts"]}
    assert mounts["/trial"] == (str(trial(run)), True)
    assert mounts["/lab"] == (str(checkout.path / "lab"), False)
    assert mounts["/model"][1] is False
    assert not any("docker.sock" in source for source, _ in mounts.values())
    owners = {(file.stat().st_uid, file.stat().st_gid) for file in trial(run).rglob("*")}
    assert owners == {(os.getuid(), os.getgid())}


def test_commands_repeat_a_run_without_the_lab(checkout: Checkout, tmp_path: Path) -> None:
    checkout.tiny("plain")
    _, output = checkout.invoke("exp.plain")
    run = checkout.newest_run("plain")
    assert status_of(run)["status"] == "ok", output
    docker = Path(dockerparts.engine().path).parent
    done = subprocess.run(
        ["bash", str(run / "commands.sh")],
        cwd=tmp_path,
        env={"PATH": f"{docker}:{os.environ['PATH']}", "OUT": str(tmp_path / "again")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    keys = ("question", "prompt_tokens", "cached_tokens", "completion_tokens")
    chat = Path("loads", "chat", "chat.jsonl")
    both = [
        [[json.loads(line)[k] for k in keys] for line in (folder / chat).read_text().splitlines()]
        for folder in (trial(run), tmp_path / "again" / "000-only-r0")
    ]
    assert both[0] == both[1]


def test_a_server_out_of_memory_fails_its_trial_with_that_reason(checkout: Checkout) -> None:
    site = checkout.path / "small.toml"
    site.write_text('name = "small"\nmemory_gb = 0.4\n')
    checkout.tiny("small")
    code, output = checkout.invoke("exp.small", "--site", str(site))
    assert code == 2, output
    status = status_of(checkout.newest_run("small"))
    assert (status["status"], status["phase"]) == ("failed", "start")
    assert "want of memory" in str(status["reason"])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_removes_everything(checkout: Checkout, signum: signal.Signals, code: int) -> None:
    name = f"stopped{signum}"
    checkout.tiny(name)
    lab = checkout.start(f"exp.{name}")
    try:
        running_server(lab)
        lab.send_signal(signum)
        output, _ = lab.communicate(timeout=90)
    finally:
        lab.kill()
    assert lab.returncode == code, output
    assert "--resume" in output
    assert "Traceback" not in output
    status = status_of(checkout.newest_run(name))
    assert (status["status"], status["phase"]) == ("failed", "start")


def test_what_a_killed_lab_left_is_removed_by_clean_and_the_run_goes_on(checkout: Checkout) -> None:
    checkout.tiny("orphan")
    lab = checkout.start("exp.orphan")
    try:
        running_server(lab)
    finally:
        lab.kill()
        lab.wait()
    assert ours()
    code, output = checkout.invoke("clean")
    assert code == 0, output
    assert ours() == []
    run = checkout.newest_run("orphan")
    assert status_of(run)["status"] == "running"
    _, output = checkout.invoke("exp.orphan", "--resume")
    assert status_of(run)["status"] == "ok", output


def test_a_run_goes_on_with_its_own_runtime_only(checkout: Checkout) -> None:
    checkout.tiny("kept")
    _, output = checkout.invoke("exp.kept", "--runtime", "process")
    assert status_of(checkout.newest_run("kept"))["status"] == "ok", output
    assert json.loads((checkout.newest_run("kept") / "plan.json").read_text())["runtime"] == "process"
    code, output = checkout.invoke("exp.kept", "--resume", "--runtime", "docker")
    assert code == 1
    assert "it used another runtime" in output


def test_without_an_image_to_be_had_processes_are_used_and_the_reason_is_said(
    tmp_path: Path,
) -> None:
    bare = make_checkout(tmp_path, docker=True)
    stack = bare.path / "containers" / "cpu" / "stack.toml"
    text = re.sub(r'(?m)^base = ".*"', 'base = "sglang-lab-test/no-such-base:1"', stack.read_text())
    stack.write_text(re.sub(r'(?m)^digest = "[^"]*"', 'digest = ""', text))
    # another lock hash, for which there is no image; and too much to ask of the disk for a stack as a folder
    (bare.path / "containers" / "cpu" / "shims" / "note.txt").write_text("another stack\n")
    stack.write_text(re.sub(r"(?m)^disk_gb = .*", "disk_gb = 900000", stack.read_text()))
    bare.tiny("nobase")
    code, output = bare.invoke("exp.nobase", "--runtime", "docker")
    assert code == 1
    assert "the base image sglang-lab-test/no-such-base:1 cannot be obtained" in output
    code, output = bare.invoke("exp.nobase")
    assert "runtime process: a Docker engine answers, but the base image" in output
    assert code == 1  # and here the build as a folder ends, at once
    assert "not enough disk for stack 'cpu'" in output
