"""Images in the real engine: a tiny one for what can go wrong and for rebuilding bit by bit, and the cpu image itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import packaging
import psutil
import pytest
from dockerparts import ENV, base_image, cpu_image, docker, engine
from tinystack import Package, make_stack

from lab import places
from lab.errors import LabError
from lab.images.build import BuiltImage, build_argv, build_image, image_tag
from lab.images.check import check_image
from lab.images.context import Options, stage, stage_name
from lab.images.engine import inspect_image, layers, list_images
from lab.stack import Stack, load_stack
from lab.stacks.lock import inputs_hash

TORCH = {"torch/__init__.py": "from torch import version\n", "torch/version.py": "cuda = {cuda!r}\n"}
BUILDER = """
import sys
from pathlib import Path
from lab.images.build import build_image
from lab.images.context import Options
from lab.stack import load_stack
build_image(load_stack("tiny", root=Path(sys.argv[1])), cache=Path(sys.argv[2]), say=print, live=print,
            options=Options(base=sys.argv[3], index_url="file:///tmp/lab/wheels"))
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stack]:
    """Makes a stack of small packages named sglang and torch, which pip finds in a folder of this machine only."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def make(*, cuda: str | None = None, requires: tuple[str, ...] = (), **stated: str) -> Stack:
        torch = {name: text.format(cuda=cuda) for name, text in TORCH.items()}
        packages = (
            Package(
                name="sglang",
                version="0",
                files={"sglang/__init__.py": "", "sglang/slow.py": "import time; time.sleep(60)"},
                requires=requires,
            ),
            Package(name="torch", version="9.9+cpu", files=torch),
            Package(name="packaging", version=packaging.__version__, files=_files_of(packaging)),
        )
        make_stack(tmp_path, *packages, imports=("sglang", "tinyshim"))
        file = tmp_path / "containers" / "tiny" / "stack.toml"
        text = file.read_text().replace("wheelhouse = []", 'wheelhouse = ["torch", "sglang", "packaging"]')
        (tmp_path / "containers" / "tiny" / "requirements.in").touch()
        for key, value in stated.items():
            text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            assert found, key
        file.write_text(text)
        lock = tmp_path / "containers" / "tiny" / "requirements.txt"
        header = f"# inputs sha256:{inputs_hash(load_stack('tiny', root=tmp_path))}\n"
        lock.write_text(header + lock.read_text())
        return load_stack("tiny", root=tmp_path)

    return make


def _files_of(module: ModuleType) -> dict[str, str]:
    folder = Path(str(module.__file__)).parent
    return {file.relative_to(folder.parent).as_posix(): file.read_text() for file in folder.rglob("*.py")}


def build(stack: Stack, tmp_path: Path, **options: object) -> BuiltImage:
    chosen = Options(base=base_image(), index_url="file:///tmp/lab/wheels")
    return build_image(
        stack,
        cache=tmp_path / "cache",
        say=print,
        live=lambda _: None,
        options=replace(chosen, **options),  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def _no_tiny_image_stays() -> object:
    yield
    for name in docker("image", "ls", "--quiet", "--filter", "label=lab.stack=tiny").stdout.split():
        docker("image", "rm", "--force", name, check=False)


def test_a_tiny_image(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    """Wheels that only this machine's pip sees get in, the shim is there, and what was measured is written down."""
    stack = tiny()
    built = build(stack, tmp_path)
    assert built.tag == image_tag(stack)
    found = inspect_image(engine(), built.tag, env=ENV)
    assert found is not None
    assert found["Id"] == built.id
    assert built.size_bytes == found["Size"]
    measured = json.loads(docker("run", "--rm", built.tag, "cat", "/opt/stack/lab-image.json").stdout)
    assert measured["lock"] == stack.lock_hash
    assert (measured["sglang"], measured["torch"], measured["torch_cuda"]) == ("0", "9.9+cpu", "")
    assert measured["python"].startswith("3.11.")
    said = docker("run", "--rm", built.tag, "python", "-c", "import tinyshim; print(tinyshim.WORD)").stdout
    assert said.strip() == "shim"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"torch_cuda": '"12.4"'}, "torch_cuda: stack.toml states 12.4, the image has none"),
        ({"cuda": "11.8"}, "torch_cuda: stack.toml states none, the image has 11.8"),
        ({"nsys": '"2024.2.3"'}, "nsys: stack.toml states 2024.2.3, the image has none"),
        ({"sglang": '"7"'}, "sglang: stack.toml states 7, the image has 0"),
        ({"requires": ("nosuch>=2",)}, "sglang requires nosuch>=2, installed: none"),
        ({"imports": '["sglang.none"]'}, "import sglang.none: ModuleNotFoundError"),
        ({"command": '["sglang.none", "--help"]'}, "python -m sglang.none --help ended with 1"),
        ({"args": '["--device", "cpu"]'}, "sglang does not take these arguments: --device cpu"),
    ],
)
def test_an_image_that_is_not_what_stack_toml_states_is_not_made(
    tiny: Callable[..., Stack], tmp_path: Path, made: dict[str, object], message: str
) -> None:
    stack = tiny(**made)
    if "sglang" in made:  # that is seen before anything is built
        with pytest.raises(LabError, match="does not fit its input"):
            build(stack, tmp_path)
        return
    with pytest.raises(LabError, match=r"not what stack\.toml states") as caught:
        build(stack, tmp_path)
    assert message in caught.value.why
    assert inspect_image(engine(), image_tag(stack), env=ENV) is None


def test_building_again_gives_the_same_layers(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    """Everything done anew, and every file with the same content, owner, mode and date."""
    stack = tiny()
    wheels = sorted((tmp_path / "wheels").glob("*.whl"))
    context = stage(
        stack,
        folder=tmp_path / "context",
        wheels=wheels,
        options=Options(base=base_image(), index_url="file:///tmp/lab/wheels"),
    )
    made = []
    for number in range(2):
        argv = build_argv(
            context,
            client=engine(),
            target=stage_name(stack),
            tag=f"sglang-lab-test/tiny:{number}",
        )
        subprocess.run((*argv[:-1], "--no-cache", argv[-1]), env=ENV, check=True, capture_output=True)
        found = inspect_image(engine(), f"sglang-lab-test/tiny:{number}", env=ENV)
        assert found is not None
        made.append(found["RootFS"])
        time.sleep(1.1)  # so that a date of the second build would differ
    assert made[0] == made[1]


def test_a_python_without_bytecode_gets_it(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    """As in the images that Python's makers publish: else every start by a user who is not root compiles what it imports."""
    base = "sglang-lab-test/no-bytecode:1"
    text = f"FROM {base_image()}\nRUN find /usr/lib/python3.11 -name __pycache__ -prune -exec rm -r {{}} +\n"
    argv = (str(engine().path), "build", "--tag", base, "-")
    subprocess.run(argv, env=ENV, input=text, text=True, check=True, capture_output=True)
    try:
        built = build(tiny(), tmp_path, base=base)
    finally:
        docker("image", "rm", "--force", base)
    done = docker("run", "--rm", "--user", "4321", built.tag, "python", "-v", "-c", "import json")
    assert "json/__pycache__/__init__.cpython-311.pyc matches" in done.stderr


def test_two_labs_at_once_end_with_one_image(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    stack = tiny()
    argv = (sys.executable, "-c", BUILDER, str(tmp_path), str(tmp_path / "cache"), base_image())
    labs = [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [lab.wait(timeout=120) for lab in labs] == [0, 0]
    assert inspect_image(engine(), image_tag(stack), env=ENV) is not None


def test_a_base_image_that_cannot_be_had(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    engine()
    with pytest.raises(LabError, match=r"base image nosuch\.invalid/none:1 cannot be obtained") as caught:
        build(tiny(), tmp_path, base="nosuch.invalid/none:1")
    assert "--base" in caught.value.fix
    assert "--runtime process" in caught.value.fix
    assert not (tmp_path / "cache" / "images").exists()


def test_too_little_disk_is_said_before_anything_starts(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    engine()
    with pytest.raises(
        LabError, match=r"not enough disk for the image of stack 'tiny': .* 900000\.0 GB needed"
    ):
        build(tiny(build_gb="900000"), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_build_ends_with_the_lab(tiny: Callable[..., Stack], tmp_path: Path) -> None:
    """kill -9 of the lab ends the build in the engine, and no image comes of it."""
    mark = f"mark-{uuid.uuid4().hex}"  # by which the program in the container is known
    stack = tiny(command=f'["sglang.slow", "{mark}"]')
    base = base_image()
    argv = (sys.executable, "-c", BUILDER, str(tmp_path), str(tmp_path / "cache"), base)
    lab = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        _wait(lambda: mark in " ".join(_commands()), seconds=60)
        client = [p for p in psutil.Process(lab.pid).children(recursive=True) if "build" in p.cmdline()]
        assert client
        os.kill(lab.pid, signal.SIGKILL)
        lab.wait()
        _wait(
            lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in client), seconds=20
        )
        _wait(lambda: mark not in " ".join(_commands()), seconds=30)
    finally:
        if lab.poll() is None:
            os.killpg(lab.pid, signal.SIGKILL)
            lab.wait()
    assert inspect_image(engine(), image_tag(stack), env=ENV) is None


def _commands() -> list[str]:
    return [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]


def _wait(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def cpu() -> Stack:
    return load_stack("cpu", root=places.ROOT)


def test_the_cpu_image_says_what_it_is() -> None:
    found = inspect_image(engine(), cpu_image(), env=ENV)
    assert found is not None
    config = found["Config"]
    assert isinstance(config, dict)
    labels = config["Labels"]
    assert labels["lab.stack"] == "cpu"
    assert labels["lab.stack.lock"] == cpu().lock_hash
    assert (labels["lab.sglang"], labels["lab.torch"], labels["lab.base"]) == (
        cpu().sglang,
        cpu().torch,
        base_image(),
    )
    assert labels["org.opencontainers.image.created"] == "2026-11-20T00:00:00Z"
    assert config["User"] == "10001:10001"
    assert cpu_image() in {tag for image in list_images(engine(), env=ENV) for tag in image.tags}
    assert sum("steps.sh wheels" in origin for _, origin in layers(engine(), cpu_image(), env=ENV)) == 2
    # nothing of this machine's set-up of pip, and no secret, is in the image's history
    assert not re.search("://|wheels/|PIP_", docker("history", "--no-trunc", cpu_image()).stdout)


def test_building_the_cpu_image_again_does_nothing() -> None:
    before = inspect_image(engine(), cpu_image(), env=ENV)
    assert before is not None
    said: list[str] = []
    built = build_image(
        cpu(), cache=places.cache(), say=said.append, live=said.append, options=Options(base=base_image())
    )
    assert built.id == before["Id"]
    logs = sorted(
        (places.cache() / "logs").glob("image-cpu-*/build.log"), key=lambda file: file.stat().st_mtime
    )
    text = logs[-1].read_text()
    steps = set(re.findall(r"(?m)^#(\d+) \[.*?\] RUN ", text))
    assert len(steps) == 4
    assert steps == set(re.findall(r"(?m)^#(\d+) CACHED", text)) & steps


def test_the_cpu_image_serves_an_unknown_user_without_network() -> None:
    """The lab runs containers as its caller, whom the image does not know."""
    program = (
        "import getpass, os, pathlib, sglang.srt.entrypoints.http_server, torch;"
        "pathlib.Path.home().joinpath('x').touch(); print(os.getuid(), getpass.getuser(), torch.__version__)"
    )
    env = [word for key, value in cpu().env for word in ("--env", f"{key}={value}")]
    done = docker(
        "run", "--rm", "--network", "none", "--user", "4321:4321", *env, cpu_image(), "python", "-c", program
    )
    assert done.stdout.split() == ["4321", "lab", cpu().torch]


def test_nobody_but_root_can_change_what_is_installed() -> None:
    """Also, there is nothing that an unknown user cannot read."""
    writable = docker(
        "run", "--rm", cpu_image(), "find", "/opt", "-perm", "-o+w", "-not", "-type", "l"
    ).stdout
    assert writable == ""
    unreadable = docker(
        "run", "--rm", "--user", "0", cpu_image(), "find", "/opt", "-not", "-perm", "-o+r"
    ).stdout
    assert unreadable == ""


def test_image_check_measures_in_the_built_image() -> None:
    cpu_image()
    said: list[str] = []
    check_image(cpu(), say=said.append)
    assert said[-1] == f"{image_tag(cpu())}: as stack.toml states"
    other = replace(cpu(), image=replace(cpu().image, ncu="2024.2.1"))
    with pytest.raises(LabError, match=r"is not what stack\.toml states") as caught:
        check_image(other, say=said.append)
    assert "ncu: stack.toml states 2024.2.1, the image has none" in caught.value.why
    with pytest.raises(LabError, match="there is no image sglang-lab/cpu:0000"):
        check_image(replace(cpu(), lock_hash="0" * 64), say=said.append)
