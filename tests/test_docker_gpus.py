"""GPUs in containers, real up to the device: a real engine with a stand-in for NVIDIA's toolkit, which notes what the
engine passed, and the real nvidia-ml-py in the container on a stand-in library with the first user's seven A100s."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import dockerparts
import privateengine
import pynvml
import pytest
from dockerbench import ENV, Bench, ended
from nvmlstandin import (
    DRIVER_NOT_LOADED,
    PLAN_BOX,
    ContainerStandIn,
    StandIn,
    hardware_of,
    install_container_standin,
    stand_in,
)
from parts import need
from privateengine import PrivateEngine, private_engine

from lab import places
from lab.container import PORT
from lab.experiment import load_experiment
from lab.runtime.base import StartFailed
from lab.runtime.contained import Contained
from lab.runtime.docker import DockerRuntime
from lab.runtime.engine import connect
from lab.seats import seats
from lab.site import Site
from lab.stack import load_stack
from lab.told import gpu_env

# What the container's programs see: GPUs, in the library's order, links between them, and what CUDA is told.
LOOK = """
import json, os, sys
sys.path.insert(0, "/lab")
import pynvml
seen = {"env": {k: os.environ.get(k) for k in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")}}
seen["nodes"] = sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
try:
    pynvml.nvmlInit()
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
except pynvml.NVMLError as error:
    seen["error"] = type(error).__name__
    gpus = []
seen["uuids"] = [pynvml.nvmlDeviceGetUUID(gpu) for gpu in gpus]
seen["names"] = [pynvml.nvmlDeviceGetName(gpu) for gpu in gpus]
buses = [pynvml.nvmlDeviceGetPciInfo(gpu).bus for gpu in gpus]
seen["links"] = []
for a, gpu in enumerate(gpus):
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(gpu, link) == 1:
                bus = pynvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu, link).bus
                seen["links"] += [[a, buses.index(bus)]] if bus in buses else []
        except pynvml.NVMLError:
            pass
seen["cpus"] = sorted(os.sched_getaffinity(0))
print(json.dumps(seen))
"""
CPU = max(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Box:
    """The first user's box as an engine, a toolkit and a management library see it."""

    engine: PrivateEngine
    toolkit: ContainerStandIn
    library: StandIn


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    image = dockerparts.base_image()
    lacks = privateengine.missing()
    need(not lacks, f"an engine of the test's own: {lacks}")
    folder = tmp_path_factory.mktemp("box")
    library = stand_in(folder / "library", PLAN_BOX)
    toolkit = install_container_standin(folder / "toolkit", library)
    runtimes = {"nvidia": {"path": str(toolkit.runtime)}}
    with private_engine(image=image, path=(toolkit.folder,), runtimes=runtimes) as engine:
        yield Box(engine=engine, toolkit=toolkit, library=library)


def cdi_specification(library: StandIn) -> str:
    """What `nvidia-ctk cdi generate` writes, for the stand-in's devices."""
    devices = [
        {
            "name": PLAN_BOX.uuid(gpu),
            "containerEdits": {
                "deviceNodes": [{"path": f"/dev/nvidia{gpu}", "type": "c", "major": 195, "minor": gpu}]
            },
        }
        for gpu in range(7)
    ]
    mounts = [
        {"hostPath": str(source), "containerPath": target, "options": ["ro", "bind"]}
        for source, target in (
            (library.library, "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"),
            (library.folder, "/run/nvml-standin"),
        )
    ]
    return json.dumps(
        {
            "cdiVersion": "0.5.0",
            "kind": "nvidia.com/gpu",
            "devices": devices,
            "containerEdits": {"mounts": mounts},
        }
    )


@pytest.fixture
def bench(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("DOCKER_HOST", box.engine.host)
    made = Bench(tmp_path, connect(), image=dockerparts.base_image(), docker=box.engine.docker)
    made.with_setup(gpu_request="nvidia")
    shutil.copy(pynvml.__file__, tmp_path / "lab")
    yield made
    made.check_nothing_left()


INDEX = {PLAN_BOX.uuid(gpu): gpu for gpu in range(7)}


def uuids(*gpus: int) -> tuple[str, ...]:
    return tuple(PLAN_BOX.uuid(gpu) for gpu in gpus)


def started(rt: DockerRuntime, bench: Bench, *, gpus: tuple[str, ...], name: str = "server") -> Contained:
    """A program that looks and then stays, as a server does; a client where it has no GPU."""
    code = LOOK + "import time; time.sleep(60)"
    indexes = [INDEX[uuid] for uuid in gpus]
    env = (*ENV, *gpu_env(tuple(sorted(indexes).index(index) for index in indexes)))
    port = PORT if name == "server" else 0
    command = bench.python(code, name=name, port=port, gpus=gpus, env=env, cpus=(CPU,), mems=(0,))
    program = rt.start(command)
    ended(lambda: bench.log(name).endswith("\n") or program.exit_code() is not None)
    return program


def seen(bench: Bench, name: str = "server") -> dict[str, object]:
    text = bench.log(name)
    assert text.startswith("{"), text
    found: dict[str, object] = json.loads(text.splitlines()[0])  # a traceback of its end may follow
    return found


def test_ranks_and_their_gpus_as_planned(bench: Bench, box: Box) -> None:
    """From the seats of a plan over the engine's request to what the server sees, and the client does not."""
    radix = load_experiment("radix", folder=places.EXPERIMENTS).experiment
    pair = replace(radix.variants[0], args=("--tp-size", "2"))
    seat = seats(
        replace(radix, variants=(pair,)),
        stack=load_stack("cu125", root=places.ROOT),
        site=Site(name="box", runtime="docker"),
        hardware=hardware_of(PLAN_BOX),
        asked=("3", "2"),
    )[pair.name]
    assert set(seat.gpus) == set(uuids(2, 3))
    before = len(box.toolkit.records("hook"))
    with bench.runtime() as rt:
        started(rt, bench, gpus=seat.gpus)
        started(rt, bench, gpus=(), name="client")
        (passed,) = box.toolkit.records("hook")[before:]
    assert passed["visible"] == ",".join(seat.gpus), "in the order of ranks"
    assert (passed["gpus"], passed["cpus"], passed["mems"]) == ([2, 3], str(CPU), "0")
    server, client = seen(bench), seen(bench, "client")
    assert server["uuids"] == list(uuids(2, 3)), "those and no others, in the order of their buses"
    assert server["nodes"] == ["nvidia2", "nvidia3", "nvidiactl"]
    assert server["cpus"] == client["cpus"] == [CPU]
    assert server["env"] == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, seat.cuda_numbers)),
        "NVIDIA_VISIBLE_DEVICES": ",".join(seat.gpus),
    }
    assert (client["uuids"], client["nodes"]) == ([], [])
    assert client["error"] == "NVMLError_LibraryNotFound"
    assert client["env"] == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }


@pytest.mark.parametrize("gpus", [(6, 0), (4,), (5, 3, 1)])
def test_the_order_of_ranks_reaches_the_toolkit(bench: Bench, box: Box, gpus: tuple[int, ...]) -> None:
    with bench.runtime() as rt:
        started(rt, bench, gpus=uuids(*gpus))
    assert box.toolkit.records("hook")[-1]["visible"] == ",".join(uuids(*gpus))
    assert seen(bench)["uuids"] == list(uuids(*sorted(gpus)))
    numbers = ",".join(str(sorted(gpus).index(gpu)) for gpu in gpus)
    assert seen(bench)["env"]["CUDA_VISIBLE_DEVICES"] == numbers  # type: ignore[index]


def test_all_seven(bench: Bench) -> None:
    """Seven A100s, with the plan's three pairs over NVLink."""
    with bench.runtime() as rt:
        started(rt, bench, gpus=uuids(*range(7)))
    found = seen(bench)
    assert found["uuids"] == list(uuids(*range(7)))
    assert found["names"] == [card["name"] for card in PLAN_BOX.cards]
    assert all("A100" in str(name) for name in found["names"])  # type: ignore[attr-defined]
    links: dict[tuple[int, int], int] = {}
    for a, b in found["links"]:  # type: ignore[attr-defined]
        links[min(a, b), max(a, b)] = links.get((min(a, b), max(a, b)), 0) + 1
    assert {pair: count // 2 for pair, count in links.items()} == PLAN_BOX.links


@pytest.mark.parametrize("unknown", ["GPU-00000000-0000-0000-0000-000000000000", "7"])
def test_a_gpu_that_is_not_there(bench: Bench, unknown: str) -> None:
    with bench.runtime() as rt:
        with pytest.raises(StartFailed, match="toolkit does not know a GPU that the plan names") as caught:
            rt.start(bench.command("true", gpus=(*uuids(0), unknown)))
        assert len(bench.left()) == 3, "the container is gone"
    assert f"{unknown}: unknown device" in caught.value.reason
    assert caught.value.phase == "start"


def test_a_driver_that_is_not_loaded(bench: Bench, box: Box) -> None:
    box.library.write(PLAN_BOX.with_lines(f"init {DRIVER_NOT_LOADED}"))
    try:
        with bench.runtime() as rt, pytest.raises(StartFailed, match="driver not loaded"):
            rt.start(bench.command("true", gpus=uuids(0)))
    finally:
        box.library.write(PLAN_BOX)


def test_where_nvidias_runtime_is_the_default(bench: Bench, box: Box) -> None:
    """With an image that says "all", as CUDA's do, every container has every GPU there; the lab's client none."""
    engine = box.engine
    made = engine.docker("create", bench.setup.image, "true").stdout.strip()
    engine.docker("commit", "--change", "ENV NVIDIA_VISIBLE_DEVICES=all", made, "says-all:1")
    engine.docker("rm", made)
    engine.settings["default-runtime"] = "nvidia"
    engine.restart()
    try:
        look = ("--volume", f"{bench.setup.lab}:/lab:ro", "says-all:1", "python3", "-c", LOOK)
        plain = engine.docker("run", "--rm", "--network", "none", *look).stdout
        assert len(json.loads(plain)["uuids"]) == 7
        bench.with_setup(image="says-all:1")
        with bench.runtime() as rt:
            started(rt, bench, gpus=(), name="client")
        found = seen(bench, "client")
        assert (found["uuids"], found["nodes"]) == ([], [])
    finally:
        engine.settings.pop("default-runtime")
        engine.restart()


def test_gpus_by_cdi(bench: Bench, box: Box) -> None:
    """An engine of 25 or newer finds them in the specification; an older one's refusal can be understood."""
    bench.with_setup(gpu_request="cdi")
    if not dockerd_major() >= 25:
        assert not bench.engine.has_cdi
        with (
            bench.runtime() as rt,
            pytest.raises(StartFailed, match="the engine has no NVIDIA container toolkit"),
        ):
            rt.start(bench.command("true", gpus=uuids(2)))
        return
    folder = box.engine.folder / "cdi"
    folder.mkdir()
    (folder / "nvidia.json").write_text(cdi_specification(box.library))
    box.engine.settings |= {"features": {"cdi": True}, "cdi-spec-dirs": [str(folder)]}
    box.engine.restart()
    bench.engine = connect()
    assert bench.engine.has_cdi
    with bench.runtime() as rt:
        started(rt, bench, gpus=uuids(3, 2))
        with pytest.raises(StartFailed, match="does not know a GPU that the plan names"):
            rt.start(bench.command("true", name="other", gpus=("GPU-none",)))
    assert seen(bench)["uuids"] == list(uuids(2, 3))
    assert seen(bench)["env"]["CUDA_VISIBLE_DEVICES"] == "1,0"  # type: ignore[index]


def dockerd_major() -> int:
    text = subprocess.run(["dockerd", "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"version (\d+)\.", text)[0])
