"""Each row of `invoke doctor`, good and bad: on made-up /proc, /sys and /etc, and on the stand-in library for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from socket import socket

import pytest
from commandline import NO_ENGINE
from nvmlstandin import (
    DRIVER_NOT_LOADED,
    LOST,
    NO_GPU,
    PLAN_BOX,
    WORKSTATION,
    Machine,
    hardware_of,
    limit_v2,
    put,
    stand_in,
)

from lab import places
from lab.doctor import engine, gpus, limits
from lab.doctor.finding import Finding
from lab.doctor.show import findings
from lab.hardware.detect import detect
from lab.models import CATALOGUE
from lab.stack import list_stacks, load_stack

BOX = hardware_of(PLAN_BOX)
DRIVER = "555.42.06"
STACKS = [load_stack(name, root=places.ROOT) for name in list_stacks(places.ROOT)]
CU125 = load_stack("cu125", root=places.ROOT)
CPU = load_stack("cpu", root=places.ROOT)
ROWS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from lab.doctor.show import findings
print(json.dumps([asdict(row) for row in findings(Path(sys.argv[1]))]))
"""


def one(rows: Iterable[Finding]) -> Finding:
    (row,) = rows
    return row


def rows_on(folder: Path, machine: Machine, files: Mapping[str, str] | None = None) -> dict[str, Finding]:
    """Every row that doctor has on a machine, by the check's name; `files` are put under its root."""
    made = stand_in(folder, machine)
    for name, text in (files or {}).items():
        put(made.root / name, text)
    done = subprocess.run(
        (sys.executable, "-c", ROWS, str(made.root)),
        env={**made.env, "DOCKER_HOST": NO_ENGINE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {row["check"]: Finding(**row) for row in json.loads(done.stdout)}


# -- whole tables


GPU_ROWS = {
    "driver against stacks",
    "GPUs in use",
    "free GPU memory",
    "clocks and power limits",
    "persistence mode",
    "GPU counters for profilers",
    "DCGM",
}
QUIET = {"proc/driver/nvidia/params": "RmProfilingAdminOnly: 0"}


def test_a_machine_without_gpus_has_no_rows_about_them(tmp_path: Path) -> None:
    rows = rows_on(tmp_path, NO_GPU)
    assert not GPU_ROWS & set(rows)
    assert rows["NVIDIA GPUs"].good
    assert rows["NVIDIA GPUs"].state == "none"
    assert rows["stack that fits"].state == "cpu"
    assert not any(check.startswith(("cgroup", "port", "container toolkit")) for check in rows)


def test_a_box_in_order(tmp_path: Path) -> None:
    rows = rows_on(tmp_path, replace(PLAN_BOX, cards=(), driver="580.65.06"), QUIET)
    assert set(rows) >= GPU_ROWS
    bad = {check: rows[check].state for check in (*GPU_ROWS, "NVIDIA GPUs") if not rows[check].good}
    assert bad == {}
    assert rows["NVIDIA GPUs"].state == "7, driver 580.65.06"
    assert rows["driver against stacks"].state == "580.65.06 runs cu125, cu130"
    assert rows["GPUs in use"].state == "none of 7"
    assert rows["free GPU memory"].state == "79 GiB on each"
    assert rows["clocks and power limits"].state == "NVIDIA A100-SXM4-80GB: 1410 of 1410 MHz, 400 W"
    assert all(not row.fix for row in rows.values() if row.check in GPU_ROWS)


TROUBLE = {
    "a GPU is used": (
        ("gpu 1 proc 99:40000", "gpu 1 used_mib 40000"),
        {
            "GPUs in use": "GPU 1: 1 process, 40000 MiB",
            "free GPU memory": "79 GiB on GPU 0, 2, 3, 4, 5, 6; 40 GiB on GPU 1",
        },
    ),
    "memory without a process": (
        ("gpu 2 used_mib 9000",),
        {"GPUs in use": "GPU 2: 9000 MiB", "free GPU memory": "79 GiB on GPU 0, 1, 3"},
    ),
    "a GPU is lost": ((f"gpu 6 fail {LOST}",), {"GPU 6": "the driver says 'GPU is lost'"}),
    "persistence is off": (("gpu 3 persistence 0",), {"persistence mode": "off on GPU 3"}),
    "a lower power limit": (
        ("gpu 2 limit_mw 250000",),
        {"clocks and power limits": "GPU 2 is limited to 250 of 400 W"},
    ),
    "another clock": (
        ("gpu 0 app_sm_mhz 1005",),
        {"clocks and power limits": "is set to 1005 MHz on GPU 0 and 1410 MHz on GPU 1, 2, 3"},
    ),
    "hot now": (
        ("gpu 5 reasons 0x40",),
        {"clocks and power limits": "GPU 5 is slowed now: hardware thermal slowdown"},
    ),
    "an old driver": (
        ("driver 535.183.01",),
        {"driver against stacks": "535.183.01 too old for cu125 (needs 550), cu130 (needs 580)"},
    ),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_shows_in_its_row_and_in_no_other(what: str, tmp_path: Path) -> None:
    lines, wanted = TROUBLE[what]
    rows = rows_on(tmp_path, replace(PLAN_BOX, cards=()).with_lines(*lines), QUIET)
    bad = {c for c, row in rows.items() if not row.good and (c in GPU_ROWS or "GPU" in c)}
    assert bad == set(wanted)
    for check, words in wanted.items():
        assert words in rows[check].state
        assert rows[check].fix
        assert not rows[check].blocks, "experiments can still run elsewhere"


NVIDIA_CARD = {
    "sys/bus/pci/devices/0000:07:00.0/vendor": "0x10de",
    "sys/bus/pci/devices/0000:07:00.0/class": "0x030200",
}


def test_gpus_that_do_not_answer_are_said(tmp_path: Path) -> None:
    rows = rows_on(tmp_path, NO_GPU.with_lines(f"init {DRIVER_NOT_LOADED}"), NVIDIA_CARD)
    row = rows["NVIDIA GPUs"]
    assert not row.good
    assert row.state.startswith("1 in the machine, none answers: NVIDIA's library is here, its kernel driver")
    assert "dmesg" in row.fix
    assert not row.blocks


def test_an_audio_device_of_nvidia_is_no_gpu(tmp_path: Path) -> None:
    audio = {**NVIDIA_CARD, "sys/bus/pci/devices/0000:07:00.0/class": "0x040300"}
    assert rows_on(tmp_path, NO_GPU, audio)["NVIDIA GPUs"].good


def test_this_machine() -> None:
    """Whatever it is: rows have states, and what is not good and can be helped says what to type."""
    rows = findings()
    assert len({row.check for row in rows}) == len(rows)
    assert all(row.state and row.matters for row in rows)
    assert [row.check for row in rows if row.blocks and not row.good and not row.fix] == []


# -- counters, sampling, DCGM, locked memory


def root_with(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        put(folder / name, text)
    return folder


ADMIN_ONLY = {"proc/driver/nvidia/params": "ResmanDebugLevel: 4294967295\nRmProfilingAdminOnly: 1"}
NO_CAPS = {"proc/self/status": "Name:\tx\nCapEff:\t00000000a80425fb"}
ALL_CAPS = {"proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff"}


@pytest.mark.parametrize(
    ("files", "in_containers", "good", "words"),
    [
        (QUIET | NO_CAPS, False, True, "open to every user"),
        (ADMIN_ONLY | NO_CAPS, False, False, "closed to users (RmProfilingAdminOnly 1)"),
        (ADMIN_ONLY | ALL_CAPS, False, True, "this process has CAP_SYS_ADMIN"),
        (ADMIN_ONLY | NO_CAPS, True, True, "containers of profiled trials get CAP_SYS_ADMIN"),
        (NO_CAPS, False, False, "not known"),
        (ADMIN_ONLY | {"proc/self/status": "CapEff:\tnonsense"}, False, False, "closed"),
    ],
)
def test_gpu_counters(
    files: dict[str, str], in_containers: bool, good: bool, words: str, tmp_path: Path
) -> None:
    row = limits.counters(root=root_with(tmp_path, files), in_containers=in_containers)
    assert (row.good, bool(row.fix)) == (good, not good)
    assert words in row.state


@pytest.mark.parametrize(
    ("level", "caps", "good"),
    [("-1", NO_CAPS, True), ("2", NO_CAPS, True), ("3", NO_CAPS, False), ("4", ALL_CAPS, True)],
)
def test_cpu_sampling(level: str, caps: dict[str, str], good: bool, tmp_path: Path) -> None:
    root = root_with(tmp_path, {**caps, "proc/sys/kernel/perf_event_paranoid": level})
    row = one(limits.perf_events(root=root))
    assert row.good is good
    assert row.state.startswith(f"perf_event_paranoid {level}")


def test_cpu_sampling_is_left_out_where_the_kernel_does_not_say(tmp_path: Path) -> None:
    assert list(limits.perf_events(root=tmp_path)) == []


def test_dcgm(tmp_path: Path) -> None:
    root = root_with(tmp_path, {"proc/1/comm": "systemd", "proc/70/comm": "nv-hostengine-x"})
    assert limits.dcgm(root=root).good
    row = limits.dcgm(root=root_with(tmp_path, {"proc/812/comm": "nv-hostengine"}))
    assert (row.good, row.state) == (False, "nv-hostengine runs (pid 812)")
    assert "dcgmi profile --pause" in row.fix


@pytest.mark.parametrize(
    ("soft", "good", "state"),
    [
        ("unlimited", True, "unlimited"),
        ("8388608", False, "8 MiB"),
        ("65536", False, "0.0625 MiB"),
        (str(2**36), True, "65536 MiB"),
    ],
)
def test_locked_memory(soft: str, good: bool, state: str, tmp_path: Path) -> None:
    line = f"Max locked memory         {soft:<20} {soft:<20} bytes"
    root = root_with(tmp_path, {"proc/self/limits": f"Max processes  1 1 processes\n{line}"})
    row = one(limits.memlock(root=root))
    assert (row.good, row.state) == (good, state)


def test_locked_memory_is_left_out_where_the_kernel_does_not_say(tmp_path: Path) -> None:
    assert list(limits.memlock(root=tmp_path)) == []


# -- cgroup, port, models


def test_no_limits_no_row() -> None:
    assert list(limits.cpuset(BOX)) == []


def test_a_cpuset_that_holds_the_gpus_is_fine(tmp_path: Path) -> None:
    made = stand_in(tmp_path, WORKSTATION)
    limit_v2(made.root, cpus="0-3", mems="0")
    hardware = replace(detect(made.root), gpus=hardware_of(WORKSTATION).gpus)
    row = one(limits.cpuset(hardware))
    assert (row.good, row.state) == (True, "CPUs 0-3 of 16, memory nodes 0")


def test_a_cpuset_away_from_gpus_names_them(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX)
    limit_v2(made.root, cpus="0-15", mems="0")
    hardware = replace(detect(made.root), gpus=BOX.gpus)
    row = one(limits.cpuset(hardware))
    assert not row.good
    assert "GPUs 4-6 sit on node 1" in row.state
    assert "--cpuset-mems" in row.fix


@pytest.mark.parametrize(("quota", "good"), [(4.0, False), (128.0, True)])
def test_a_cpu_quota(quota: float, good: bool) -> None:
    row = one(limits.cpuset(replace(BOX, cpu_quota=quota)))
    assert row.good is good
    assert f"the time of {quota:g} CPUs only" in row.state


def test_a_port() -> None:
    assert list(limits.port(0, site="local")) == []
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = int(taken.getsockname()[1])
        row = one(limits.port(number, site="box"))
        assert (row.good, row.blocks) == (False, True)
        assert "pid" in row.state
        assert row.check == f"port {number}"
    assert one(limits.port(number, site="box")).good


PRIVATE = "hf_thisIsNoRealToken123"


@pytest.mark.parametrize("where", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file", "HF_TOKEN_PATH", ""])
def test_a_token_is_said_and_never_printed(where: str, tmp_path: Path) -> None:
    env = {where: PRIVATE} if where.endswith("TOKEN") else {}
    if where == "file":
        put(tmp_path / ".cache/huggingface/token", PRIVATE)
    if where == "HF_TOKEN_PATH":
        put(tmp_path / "mine", PRIVATE)
        env = {where: str(tmp_path / "mine")}
    row = limits.model_access(tuple(CATALOGUE.values()), stacks=STACKS, env=env, home=tmp_path)
    assert row.good
    assert ("a hub token is set" in row.state) is bool(where)
    assert PRIVATE not in repr(row)
    assert "nano is made here, not gated" in row.state
    assert "offline" in row.state


def test_models_that_are_here_and_a_stack_that_asks(tmp_path: Path) -> None:
    models = tuple(CATALOGUE.values())
    row = limits.model_access(models, stacks=[replace(CPU, env=())], env={}, home=tmp_path)
    assert not row.good
    assert "stacks cpu may ask a hub" in row.state
    assert "not on this machine: llama-3.1-8b, llama-3.1-70b, qwen2.5-7b, mistral-7b" in row.state
    put(tmp_path / ".cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/abc/config.json", "{}")
    row = limits.model_access(models, stacks=STACKS, env={}, home=tmp_path)
    assert row.good
    assert "in the Hugging Face cache: qwen2.5-7b;" in row.state


# -- the engine


RUNTIME: dict[str, object] = {"Runtimes": {"runc": {}, "nvidia": {}}, "CgroupDriver": "cgroupfs"}
PLAIN: dict[str, object] = {"Runtimes": {"runc": {}}, "CgroupDriver": "systemd"}
CDI: dict[str, object] = {**PLAIN, "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"]}


def spec(*names: str, version: str = DRIVER) -> str:
    devices = "\n".join(f'  - name: "{name}"' for name in names)
    library = f"/usr/lib/x86_64-linux-gnu/libcuda.so.{version}"
    return f"cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n{devices}\nmounts:\n  - hostPath: {library}"


def test_the_toolkit_by_runtime_or_hook(tmp_path: Path) -> None:
    assert engine.toolkit(RUNTIME, BOX, root=tmp_path, path="").state == "runtime nvidia"
    row = engine.toolkit(PLAIN, BOX, root=tmp_path, path="")
    assert not row.good
    assert "nvidia-ctk runtime configure" in row.fix
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    assert engine.toolkit(PLAIN, BOX, root=tmp_path, path=str(tmp_path)).good


UUIDS = tuple(gpu.uuid for gpu in BOX.gpus)


@pytest.mark.parametrize(
    ("text", "good", "words"),
    [
        (spec(*UUIDS, "all"), True, "CDI, with a specification"),
        (spec(*UUIDS, version="550.54.15"), False, "is for driver 550.54.15, not 555.42.06"),
        (spec("0", "1", "all"), False, "has no UUID of GPU 0, 1, 2, 3, 4, 5, 6"),
        (spec(*UUIDS[:6]), False, "has no UUID of GPU 6"),
        ("kind: vendor.com/net", False, "no specification names NVIDIA's GPUs"),
        (None, False, "no specification names NVIDIA's GPUs"),
    ],
)
def test_the_toolkit_by_cdi(text: str | None, good: bool, words: str, tmp_path: Path) -> None:
    if text is not None:
        put(tmp_path / "var/run/cdi/nvidia.yaml", text)
    row = engine.toolkit(CDI, BOX, root=tmp_path, path="")
    assert row.good is good
    assert words in row.state
    assert good or "nvidia-ctk cdi generate" in row.fix


def test_devices_that_the_engine_lists_itself_are_enough(tmp_path: Path) -> None:
    devices = [{"Source": "cdi", "ID": f"nvidia.com/gpu={uuid}"} for uuid in UUIDS]
    assert engine.toolkit({**CDI, "DiscoveredDevices": devices}, BOX, root=tmp_path, path="").good


def test_gpus_that_a_daemon_reload_takes_away(tmp_path: Path) -> None:
    row = engine.reload_loss(PLAIN, root=tmp_path)
    assert not row.good
    assert "create-dev-char-symlinks" in row.fix
    assert engine.reload_loss(RUNTIME, root=tmp_path).state == "cgroup driver cgroupfs, not systemd"
    assert engine.reload_loss(CDI, root=tmp_path).good
    (tmp_path / "dev/char").mkdir(parents=True)
    (tmp_path / "dev/char/195:0").symlink_to("../nvidia0")
    assert engine.reload_loss(PLAIN, root=tmp_path).good


def test_profilers_by_the_labels_of_the_image() -> None:
    labels = {"lab.nsys": CU125.image.nsys, "lab.ncu": CU125.image.ncu}
    assert one(engine.profilers(CU125, labels)).good
    row = one(engine.profilers(CU125, {**labels, "lab.nsys": "2025.3.2", "lab.ncu": ""}))
    assert (row.good, row.state) == (False, "nsys 2025.3.2, ncu missing")
    assert row.fix == "invoke image.build --stack cu125"
    assert list(engine.profilers(CPU, {})) == []


def test_room_for_images(tmp_path: Path) -> None:
    (tmp_path / "var/lib/docker").mkdir(parents=True)
    info: dict[str, object] = {"DockerRootDir": "/var/lib/docker"}
    huge = replace(CU125, image=replace(CU125.image, build_gb=1e9))
    row = one(engine.room(info, huge, built=False, root=tmp_path))
    assert not row.good
    assert "docker builder prune" in row.fix
    assert one(engine.room(info, huge, built=True, root=tmp_path)).good
    assert one(
        engine.room(info, replace(huge, image=replace(huge.image, build_gb=0)), built=False, root=tmp_path)
    ).good
    assert list(engine.room({"DockerRootDir": "/elsewhere"}, huge, built=False, root=tmp_path)) == []


def test_which_stacks_a_machine_could_use() -> None:
    assert [s.name for s in STACKS if engine.usable(s, hardware_of(NO_GPU))] == ["cpu", "cpu046"]
    assert [s.name for s in STACKS if engine.usable(s, BOX)] == ["cpu", "cpu046", "cu125"]


def test_memory_that_the_driver_does_not_tell_is_not_called_free() -> None:
    from lab.hardware.nvml import Use

    card = replace(BOX.gpus[0], memory_mib=None)
    use = Use(uuid=card.uuid, used_mib=None, free_mib=None, pids=())
    rows = list(gpus.in_use(replace(BOX, gpus=(card,)), [use]))
    assert rows[1].state == "not known on each"


# -- the exit code


def test_what_stops_experiments_makes_the_exit_code(tmp_path: Path) -> None:
    model = CATALOGUE["nano"]
    put(tmp_path / f"sglang-lab/models/{model.name}-{model.sha256[:12]}/config.json", "{}")
    done = subprocess.run(
        (sys.executable, "-m", "invoke", "doctor"),
        cwd=places.ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "DOCKER_HOST": NO_ENGINE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.rstrip().endswith("Cannot run experiments: model nano.")
