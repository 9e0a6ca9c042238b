"""One container and its two spellings: what the SDK is given and the words of `docker run` make the same container on
a real engine. And the script of a run in containers: golden, and in order for bash and shellcheck."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import dockerparts
import fakerun
import pytest
from nvmlstandin import PLAN_BOX, hardware_of
from parts import need

from lab import boxes, commands, dockerscript, places
from lab.boxes import Folders, Names
from lab.container import (
    LAB,
    PORT,
    PROFILER_CAPABILITIES,
    RUN_LABEL,
    Container,
    Mount,
    Setup,
    run_words,
    sdk_arguments,
)
from lab.experiment import load_experiment
from lab.models import get_model
from lab.plan import Plan, Process
from lab.planning import make_plan
from lab.runtime.engine import Engine, connect
from lab.seats import seats
from lab.site import Site

GPUS = tuple(PLAN_BOX.uuid(gpu) for gpu in (3, 2))
PLAIN = Container(
    name="",
    image="",
    argv=("true",),
    env=(("PATH", os.defpath),),
    labels=((RUN_LABEL, "test-words"),),
    user="1000:1000",
    network="none",
    mounts=(Mount(kind="bind", source="/usr/share", target=LAB, read_only=True),),
    log="/dev/null",
)
SHAPES: dict[str, Container] = {
    "plain": PLAIN,
    "a server, any port": replace(
        PLAIN,
        network="bridge",
        publish=0,
        cpus="0",
        mems="0",
        memory_bytes=500_000_000,
        shm_bytes=128_000_000,
    ),
    "a server, this port": replace(PLAIN, network="bridge", publish=31_234, user="0:0"),
    "a server on the run's network": replace(PLAIN, network="NETWORK", publish=0),
    "a client in the server's network": replace(PLAIN, network="container:SERVER"),
    "limits": replace(PLAIN, ulimits=(("memlock", -1), ("nofile", 1024), ("stack", 67_108_864))),
    "mounts": replace(
        PLAIN,
        mounts=(
            Mount(kind="bind", source="/usr/share", target="/trial"),
            Mount(kind="bind", source="/usr/lib", target="/with space", read_only=True),
            Mount(kind="volume", source="VOLUME", target="/model", read_only=True),
            Mount(kind="volume", source="VOLUME", target="/jit"),
        ),
    ),
    "profiled": replace(PLAIN, capabilities=PROFILER_CAPABILITIES["ncu"]),
    "GPUs by UUID": replace(PLAIN, gpus=GPUS, gpu_request="nvidia"),
    "GPUs by CDI": replace(PLAIN, gpus=GPUS, gpu_request="cdi"),
    "words that a shell would read": replace(
        PLAIN,
        argv=("sh", "-c", "echo \"$0\" '$HOME' `id` \\ ; *", "", "a b", "--name", "\n"),
        env=(("A", ""), ("B", "x=y, z"), ("C", "$HOME 'q' \"d\""), ("D", "é\ttab")),
    ),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    dockerparts.base_image()
    return connect()


@pytest.fixture(scope="module")
def around(engine: Engine) -> Iterator[dict[str, str]]:
    """What the shapes' capital words stand for: a network, a volume, a container."""
    mark = f"lab-words-{os.getpid()}"
    dockerparts.docker("network", "create", mark)
    dockerparts.docker("volume", "create", mark)
    words = ("--detach", "--network", "none", dockerparts.base_image(), "sleep", "600")
    server = dockerparts.docker("run", "--name", mark, *words).stdout.strip()
    try:
        yield {"NETWORK": mark, "VOLUME": mark, "SERVER": server}
    finally:
        dockerparts.docker("rm", "--force", mark)
        dockerparts.docker("volume", "rm", mark)
        dockerparts.docker("network", "rm", mark)


def inspected(container_id: str) -> dict[str, object]:
    """What the engine knows of a container, without what is different for any two; nothing is nothing, in
    whatever way it is written."""
    found: dict[str, dict[str, object]] = json.loads(dockerparts.docker("inspect", container_id).stdout)[0]
    config, host = found["Config"], found["HostConfig"]
    for key in ("Hostname", "AttachStdout", "AttachStderr"):  # the last two: who looks at the output
        config.pop(key)
    host["RestartPolicy"] = {**host["RestartPolicy"], "Name": host["RestartPolicy"]["Name"] or "no"}  # type: ignore
    config["Env"] = sorted(config["Env"])  # type: ignore[call-overload]
    mounts = sorted(found["Mounts"], key=lambda mount: mount["Destination"])  # type: ignore[call-overload]
    kept = {"Mounts": mounts, "Path": found["Path"], "Args": found["Args"]}
    for part in ("Config", "HostConfig"):
        kept |= {f"{part}.{key}": value or None for key, value in found[part].items()}
    return kept


@pytest.mark.parametrize("shape", SHAPES)
def test_both_spellings_make_the_same_container(shape: str, engine: Engine, around: dict[str, str]) -> None:
    """Field by field of `docker inspect`; also of what this engine could not start, such as GPUs."""
    box = SHAPES[shape]
    network = box.network
    for word, meant in around.items():
        network = network.replace(word, meant)
    mounts = tuple(replace(m, source=around.get(m.source, m.source)) for m in box.mounts)
    box = replace(box, image=dockerparts.base_image(), network=network, mounts=mounts)
    names = [f"lab-words-{os.getpid()}-{kind}" for kind in ("sdk", "cli")]
    try:
        by_sdk = inspected(engine.create(replace(box, name=names[0])))
        words = [word for option in run_words(replace(box, name=names[1])) for word in option]
        made = dockerparts.docker("create", *words, check=False)
        if shape == "GPUs by CDI" and "is not an absolute path" in made.stderr:
            # A client of before CDI; what the engine was asked for is compared with the page of the API instead.
            wanted = {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={gpu}" for gpu in GPUS]}
            (request,) = by_sdk["HostConfig.DeviceRequests"]  # type: ignore[misc]
            assert {key: value for key, value in request.items() if value} == wanted
            return
        assert made.returncode == 0, made.stderr
        by_cli = inspected(made.stdout.strip())
        assert {key: (by_sdk[key], by_cli[key]) for key in by_sdk if by_sdk[key] != by_cli.get(key)} == {}
        assert by_sdk.keys() == by_cli.keys()
        if box.gpus:
            (request,) = by_sdk["HostConfig.DeviceRequests"]  # type: ignore[misc]
            assert [gpu.removeprefix("nvidia.com/gpu=") for gpu in request["DeviceIDs"]] == list(GPUS)
    finally:
        for name in names:
            dockerparts.docker("rm", "--force", "--volumes", name, check=False)


def test_the_shapes_use_every_field() -> None:
    """A field that is added to `Container` needs a shape that sets it."""
    always = {"name", "image", "log", "workdir", "labels"}
    values = {
        name: {repr(getattr(box, name)) for box in SHAPES.values()} for name in PLAIN.__dataclass_fields__
    }
    assert {name for name, seen in values.items() if len(seen) == 1} == always


def test_a_client_sees_no_gpu_and_a_server_those_asked_for() -> None:
    environment = sdk_arguments(SHAPES["plain"])["environment"]
    assert environment == {"PATH": os.defpath, "NVIDIA_VISIBLE_DEVICES": "void"}
    with_gpus = sdk_arguments(SHAPES["GPUs by UUID"])
    assert with_gpus["environment"] == {"PATH": os.defpath}, "the engine sets it from the request"
    assert with_gpus["device_requests"] == [{"device_ids": list(GPUS), "capabilities": [["gpu"]]}]


def test_a_process_of_the_plan_becomes_a_container() -> None:
    setup = Setup(
        image="sha256:1", image_name="x:1", model="/m", lab="/l", jit="/j", gpu_request="cdi",
        shm_gb=2.5, memory_gb=8, ulimits={"stack": 2, "memlock": 1},
    )  # fmt: skip
    names = Names(run_id="r1", owner="o")
    process = Process(argv=("a",), env=(("K", "v"),), cpus=(3, 1, 2, 9), mems=(1,), gpus=GPUS, profiler="ncu")
    folders = Folders(trial="/t", scratch="/s")

    def box(**changes: object) -> Container:
        publish = changes.pop("publish", None)
        made = replace(process, **changes)  # type: ignore[arg-type]
        return boxes.container(
            "000-server", made, setup=setup, names=names, folders=folders, network="n", user="1:2",
            log="server.log", publish=publish,  # type: ignore[arg-type]
        )  # fmt: skip

    server = box(publish=0)
    assert (server.name, server.image) == ("sglang-lab-r1-000-server", "sha256:1")
    assert server.labels == (("sglang-lab.owner", "o"), ("sglang-lab.run", "r1"))
    assert (server.cpus, server.mems, server.gpus) == ("1-3,9", "1", GPUS)
    assert (server.shm_bytes, server.memory_bytes) == (2_500_000_000, 8_000_000_000)
    assert server.ulimits == (("memlock", 1), ("stack", 2))
    assert (server.capabilities, server.gpu_request) == (("SYS_ADMIN",), "cdi")
    assert server.command == ("-c", 'exec "$@" >> "$0" 2>&1', "/trial/server.log", "a")
    client = box(gpus=(), profiler="")
    assert (client.memory_bytes, client.publish, client.gpu_request, client.capabilities) == (
        None,
        None,
        "none",
        (),
    )


# ---- the script


def docker_plan(*, variants: int, repeats: int = 1) -> Plan:
    """Radix with two ranks on the first user's box, in containers, cut to its first trials."""
    source = load_experiment("radix", folder=places.EXPERIMENTS)
    experiment = replace(
        source.experiment,
        variants=tuple(replace(v, args=("--tp-size", "2", *v.args)) for v in source.experiment.variants),
    )
    stack = replace(fakerun.stack(), device="cuda", env=(), server_args=("--device", "cuda"))
    site = Site(name="box", runtime="docker", memory_gb=64, shm_gb=16)
    model = get_model("nano")
    setup = Setup(
        image=f"sha256:{'0' * 64}",
        image_name="sglang-lab/fake:000000000000",
        model="/lab-test/my models/nano",
        lab="/lab-test/lab",
        jit="/lab-test/jit",
        gpu_request="nvidia",
        shm_gb=16,
        memory_gb=64,
        ulimits={"memlock": -1, "stack": 67_108_864},
    )
    plan = make_plan(
        replace(source, experiment=experiment, sha256="0" * 64),
        stack=stack,
        model=model,
        model_sha256=model.sha256,
        site=site,
        places=dict(boxes.PLACES),
        containers=setup,
        seats=seats(experiment, stack=stack, site=site, hardware=hardware_of(PLAN_BOX)),
        repeats=repeats,
    )
    return replace(plan, trials=plan.trials[:variants])


def test_golden_docker_script(golden: Callable[[str, str], None]) -> None:
    golden("commands-docker.sh", commands.script(docker_plan(variants=1)))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "commands.sh"
    path.write_text(commands.script(docker_plan(variants=2, repeats=2)))
    return path


def test_bash_can_read_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    need(shutil.which("shellcheck") is not None, "shellcheck")
    done = subprocess.run(["shellcheck", "--shell=bash", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_scripts_lines_are_the_containers(script: Path) -> None:
    """A stand-in for the docker client notes its words; they are those of the trial's containers."""
    plan = docker_plan(variants=1)
    folder = script.parent
    tools = folder / "bin"
    tools.mkdir()
    noted = folder / "noted"
    fake = f"""#!/bin/bash
if [ "$1" = run ]; then printf '%s\\0' "$@" >> {noted}; printf '\\n\\0' >> {noted}; fi
case $1 in inspect) echo true;; port) echo 127.0.0.1:1;; esac
"""
    for name, text in (("docker", fake), ("curl", "#!/bin/bash\n"), ("sleep", "#!/bin/bash\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    one = folder / "one.sh"
    one.write_text(commands.script(plan))
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(folder / "out"), "JIT": str(folder / "jit")}
    done = subprocess.run(["bash", str(one)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    runs = [text.split("\0")[:-1] for text in noted.read_text().split("\n\0")[:-1]]

    trial = plan.trials[0]
    assert plan.containers is not None
    server = dockerscript.server_container(trial, setup=plan.containers, publish=plan.port)
    clients = [dockerscript.client_container(trial, step, setup=plan.containers) for step in trial.loads]
    assert [words[1] for words in runs] == ["--detach", *("--rm" for _ in clients)]
    for words, box in zip(runs, (server, *clients), strict=True):
        expected = [word for option in run_words(box) for word in option]
        assert len(words[2:]) == len(expected)
        for said, wanted in zip(words[2:], expected, strict=True):
            assert matches(said, wanted), (said, wanted)
    joined = " ".join(runs[0])
    assert f"127.0.0.1::{PORT}" in joined
    assert "CUDA_VISIBLE_DEVICES=" + ",".join(trial.server.gpus) in joined
    assert f'--gpus "device={",".join(trial.server.gpus)}"' in joined


def matches(said: str, wanted: str) -> bool:
    """Whether a word is what the container says, with anything in the place of a shell variable."""
    rest, at = said, 0
    for i, part in enumerate(between_names(wanted)):
        at = rest.find(part)
        if at < 0 or (i == 0 and at != 0):
            return False
        rest = rest[at + len(part) :]
    return True


def between_names(text: str) -> list[str]:
    """The parts of a text between `${NAME}`s."""
    parts = [text]
    for name in dockerscript.VARIABLES:
        parts = [piece for part in parts for piece in part.split(f"${{{name}}}")]
    return parts
