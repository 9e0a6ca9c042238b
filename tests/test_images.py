"""Images without an engine: what is staged for a build, what stack.toml states, who may build, the Dockerfile's text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from parts import need

from lab.errors import LabError
from lab.images.build import build_argv, image_tag, make_context
from lab.images.check import lint
from lab.images.context import Context, Options, split_lock, stage, stage_name
from lab.images.engine import Client, check_engine, docker_env, find_client
from lab.stack import Stack, check_driver, list_stacks, load_stack
from lab.stacks.lock import read_lock, read_names

ROOT = Path(__file__).parents[1]
STACKS = ("cpu", "cu125", "cu130")
TEXTS = ("Dockerfile", "containers/image/steps.sh", "containers/image/smoke.py")


def stack_of(name: str) -> Stack:
    return load_stack(name, root=ROOT)


def staged(name: str, folder: Path, **options: object) -> Context:
    return stage(stack_of(name), folder=folder, options=Options(**options))  # type: ignore[arg-type]


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", STACKS)
def test_what_a_build_is_told(name: str, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    """The command, the arguments and labels, the files sent, and which packages lie in which layer."""
    context = staged(name, tmp_path)
    client = Client(path=Path("docker"), argv=("docker", "build"))
    stack = stack_of(name)
    argv = build_argv(context, client=client, target=stage_name(stack), tag=image_tag(stack))
    words = " ".join(repr(word) if re.search(r"\s", word) else word for word in argv).replace(
        str(tmp_path), "CONTEXT"
    )
    parts = "".join(
        f"\n{part}: {' '.join(f'{pin.name}=={pin.version}' for pin in pins)}\n"
        for part, pins in split_lock(stack).items()
    )
    stated = json.loads((tmp_path / "stack.json").read_text())
    assert stated.pop("packages") == {pin.name: pin.version for pin in read_lock(stack.lock)}
    shown = words.replace(" --", " \\\n  --").replace(" CONTEXT", " \\\n  CONTEXT")
    golden(
        f"image-{name}.txt",
        f"{shown}\n\n{chr(10).join(files(tmp_path))}\n{parts}\n{json.dumps(stated, indent=1)}\n",
    )


@pytest.mark.parametrize("name", STACKS)
def test_every_locked_package_is_in_one_part(name: str) -> None:
    parts = split_lock(stack_of(name))
    pins = [pin for part in parts.values() for pin in part]
    assert sorted(pin.text for pin in pins) == sorted(pin.text for pin in read_lock(stack_of(name).lock))
    assert "torch" in {pin.name for pin in parts["torch.txt"]}
    assert not {pin.name for pin in parts["packages.txt"] if pin.name.startswith("nvidia-")}
    assert "sglang" in {pin.name for pin in parts["packages.txt"]}


def test_staging_again_changes_nothing_and_removes_what_does_not_belong(tmp_path: Path) -> None:
    staged("cpu", tmp_path)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    (tmp_path / "shims" / "stranger.py").touch()
    staged("cpu", tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == before
    staged("cu125", tmp_path)
    assert not [name for name in files(tmp_path) if name.startswith("shims/")]


def test_the_context_carries_the_stacks_shims_and_the_labs_uv(tmp_path: Path) -> None:
    staged("cpu", tmp_path)
    for file in ("lab_cpu_shims.pth", "sgl_kernel/__init__.py"):
        assert (tmp_path / "shims" / file).read_bytes() == (ROOT / "containers/cpu/shims" / file).read_bytes()
    assert not [name for name in files(tmp_path) if "__pycache__" in name]
    shown = subprocess.run([tmp_path / "uv", "--version"], capture_output=True, text=True, check=True).stdout
    assert re.search(r'"uv==(\S+)"', (ROOT / "pyproject.toml").read_text()).group(1) in shown  # type: ignore[union-attr]


def test_a_wheel_that_is_there_is_not_looked_for(tmp_path: Path) -> None:
    """Only without it uv is sent to PyTorch's own index of the device."""
    wheel = tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"
    wheel.touch()
    stack = stack_of("cpu")
    assert dict(stage(stack, folder=tmp_path / "with", wheels=[wheel]).args).get("TORCH_BACKEND") is None
    assert (tmp_path / "with" / "wheels" / wheel.name).exists()
    assert dict(stage(stack, folder=tmp_path / "without").args)["TORCH_BACKEND"] == "cpu"


def test_a_context_for_a_build_by_other_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a torch that pip sees, uv is told where to look; args.txt and labels.txt are what a workflow reads."""
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said: list[str] = []
    folder = tmp_path / "out"
    context = make_context(
        stack_of("cpu"), folder=folder, cache=tmp_path / "cache", say=said.append, live=lambda _: None
    )
    assert any("uv asks its own inside the build" in line for line in said)
    arguments = dict(line.split("=", 1) for line in (folder / "args.txt").read_text().splitlines())
    assert arguments == dict(context.args)
    assert arguments["TORCH_BACKEND"] == "cpu"
    assert arguments["BASE"] == stack_of("cpu").image.pinned_base
    labels = dict(line.split("=", 1) for line in (folder / "labels.txt").read_text().splitlines())
    assert labels == dict(context.labels)
    assert not list((tmp_path / "cache" / "wheels").glob("*/*.whl"))


def test_a_mirror_and_another_base_are_arguments(tmp_path: Path) -> None:
    context = staged("cu125", tmp_path, base="mine:1", base_digest="sha256:ab", index_url="file:///mirror")
    assert dict(context.args)["BASE"] == "mine:1"
    assert dict(context.args)["INDEX_URL"] == "file:///mirror"
    assert dict(context.labels)["lab.base"] == "mine:1"
    assert dict(context.labels)["org.opencontainers.image.base.digest"] == "sha256:ab"


def test_a_bare_image_says_so(tmp_path: Path) -> None:
    """Without CUDA toolkit and profilers: not asked for, not stated, and under another name."""
    context = staged("cu125", tmp_path, base="mine:1", bare=True)
    stated = json.loads((tmp_path / "stack.json").read_text())
    assert "PACKAGES" not in dict(context.args)
    assert (stated["cuda_toolkit"], stated["nsys"], stated["ncu"]) == ("", "", "")
    assert stated["torch_cuda"] == "12.4"
    assert {dict(context.labels)[name] for name in ("lab.nsys", "lab.ncu", "lab.cuda.toolkit")} == {""}
    assert image_tag(stack_of("cu125"), bare=True) != image_tag(stack_of("cu125"))


def test_a_lock_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "containers", tmp_path / "containers")
    file = tmp_path / "containers" / "cu125" / "requirements.in"
    file.write_text(file.read_text().replace("0.4.6.post5", "0.4.6.post4"))
    with pytest.raises(LabError, match="lock of stack 'cu125' does not fit") as caught:
        stage(load_stack("cu125", root=tmp_path), folder=tmp_path / "context")
    assert "sglang==0.4.6.post4 is asked for, the lock has 0.4.6.post5" in caught.value.why
    assert "invoke image.lock --stack cu125" in caught.value.fix
    assert not (tmp_path / "context").exists()


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_states_what_its_image_must_measure(name: str) -> None:
    stack = stack_of(name)
    cuda = (stack.image.torch_cuda, stack.image.cuda_toolkit, stack.image.nsys, stack.image.ncu)
    if stack.device == "cpu":
        assert not any(cuda)
        assert not stack.needs.driver
    else:
        assert all(cuda)
        assert stack.needs.driver
        assert stack.image.nsys in " ".join(stack.image.packages)
        assert stack.image.cuda_toolkit in stack.image.base
    assert stack.image.python.startswith(f"{stack.python}.")
    assert f"files published before {stack.image.date}" in stack.lock.read_text()


def test_only_cu125_builds_from_source_and_that_is_locked() -> None:
    assert [stack_of(name).image.source for name in STACKS] == [(), ("flashinfer-python",), ()]
    parts = split_lock(stack_of("cu125"))
    assert [pin.name for pin in parts["source.txt"]] == ["flashinfer-python"]
    # what it is built with is locked and installed before it
    assert {"setuptools", "wheel", "packaging"} <= {pin.name for pin in parts["packages.txt"]}


def test_the_observing_arguments_are_those_of_the_release() -> None:
    """0.4.6.post5 has no export file; what it does have is asked for."""
    assert "--export-metrics-to-file" in stack_of("cpu").observe_args
    assert stack_of("cpu").observe_args == stack_of("cu130").observe_args
    assert not [word for word in stack_of("cu125").observe_args if "export" in word]
    assert "--enable-metrics" in stack_of("cu125").observe_args


@pytest.mark.parametrize(
    ("name", "driver", "fits"),
    [
        ("cu125", "555.42.06", True),
        ("cu125", "550.54.15", True),
        ("cu125", "535.183.01", False),
        ("cu130", "580.65.06", True),
        ("cu130", "555.42.06", False),
        ("cu130", "", False),
        ("cpu", "", True),
    ],
)
def test_the_driver_a_stack_needs(name: str, driver: str, fits: bool) -> None:
    stacks = [stack_of(other) for other in STACKS]
    if fits:
        check_driver(stack_of(name), driver=driver, stacks=stacks)
        return
    with pytest.raises(LabError, match=f"stack '{name}'"):
        check_driver(stack_of(name), driver=driver, stacks=stacks)


def test_a_driver_too_old_names_the_stack_that_would_do() -> None:
    stacks = [stack_of(other) for other in STACKS]
    with pytest.raises(
        LabError, match=r"555\.42\.06 is too old for stack 'cu130', which needs 580"
    ) as caught:
        check_driver(stack_of("cu130"), driver="555.42.06", stacks=stacks)
    assert caught.value.fix.startswith("--stack cu125 fits")
    with pytest.raises(LabError) as caught:
        check_driver(stack_of("cu125"), driver="470.57.02", stacks=stacks)
    assert caught.value.fix.startswith("--stack cpu fits")


def program(folder: Path, *, version: str, buildx: bool) -> Path:
    """A docker that answers what is asked before a build."""
    file = folder / "docker"
    folder.mkdir()
    file.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo "Docker version {version}, build 0" ;;\n'
        f"buildx) exit {0 if buildx else 1} ;;\nesac\n"
    )
    file.chmod(0o755)
    return file


def test_the_first_client_that_can_build_is_taken(tmp_path: Path) -> None:
    new = program(tmp_path / "new", version="28.2.2", buildx=False)
    old = program(tmp_path / "old", version="20.10.24+dfsg1", buildx=False)
    full = program(tmp_path / "full", version="28.2.2", buildx=True)

    def found(*programs: Path) -> tuple[str, ...]:
        path = os.pathsep.join([*(str(file.parent) for file in programs), "/usr/bin"])
        return find_client(env={"PATH": path}).argv

    assert found(new, old, full) == (str(old), "build")
    assert found(full, old) == (str(full), "buildx", "build", "--load")
    assert docker_env({})["DOCKER_BUILDKIT"] == "1"
    with pytest.raises(LabError, match="no docker on PATH can build") as caught:
        find_client(env={"PATH": f"{new.parent}"})
    assert f"{new} 28 has no buildx" in caught.value.why
    assert "--runtime process" in caught.value.fix
    with pytest.raises(LabError, match="there is no docker on PATH"):
        find_client(env={"PATH": str(tmp_path)})


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    found = shutil.which("docker")
    need(found is not None, "docker")
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    with pytest.raises(LabError, match="no Docker engine answers") as caught:
        check_engine(Client(path=Path(str(found)), argv=()), env=env)
    assert "none.sock" in caught.value.why
    assert "--runtime process" in caught.value.fix


@pytest.mark.parametrize("name", TEXTS)
def test_no_address_of_an_index_a_mirror_or_a_registry(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"(?m)^#\s*syntax\s*=", text), "fetched from a registry, which may not be there"


def test_the_dockerfile_builds_every_stack() -> None:
    text = (ROOT / "Dockerfile").read_text()
    named = re.findall(r"(?m)^FROM \S+ AS (\S+)$", text)
    assert [name for name in named if name in STACKS] == list(STACKS)
    assert {stage_name(stack_of(name)) for name in list_stacks(ROOT)} <= set(named)
    assert re.search(r"(?m)^USER (\d+):\1$", text), "images do not run as root by default"
    assert "<<" not in text, "older engines know no heredocs"


def test_hadolint_and_shellcheck_have_nothing_to_say() -> None:
    tools = {name: Path(sys.executable).with_name(name) for name in ("hadolint", "shellcheck")}
    for name, path in tools.items():
        need(path.exists(), f"{name} beside {sys.executable}")
    said: list[str] = []
    lint(say=said.append)
    assert said == ["Dockerfile: hadolint has nothing to say"]
    argv = (tools["shellcheck"], ROOT / "containers/image/steps.sh")
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", STACKS)
def test_the_lock_names_no_index_and_allows_only_wheels_but_for_what_is_said(name: str) -> None:
    text = stack_of(name).lock.read_text()
    assert "://" not in text
    assert "--index" not in text
    assert all(pin.text.count("--hash=sha256:") for pin in read_lock(stack_of(name).lock))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["cu125", "cu130"])
def test_every_locked_file_is_published(name: str, tmp_path: Path) -> None:
    """The index has every package of the lock in this very version, for this platform, under one of these hashes."""
    stack = stack_of(name)
    source = (word for package in stack.image.source for word in ("--no-binary", package))
    argv = (
        *(sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--require-hashes", "--no-deps"),
        *("--only-binary", ":all:", *source, "--python-version", stack.python, "--target", str(tmp_path)),
        *("--python-platform", f"x86_64-manylinux_{stack.needs.glibc.replace('.', '_')}"),
        *("--requirement", str(stack.lock)),
    )
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = set(re.findall(r"(?m)^ \+ (\S+)==", done.stderr))
    assert len(found) == len(read_lock(stack.lock)), done.stderr[-2000:]


def test_what_is_left_out_of_cu130_is_what_its_file_says() -> None:
    left_out = read_names(stack_of("cu130").excludes)
    assert left_out == ("cuda-tile",)
    assert not {pin.name for pin in read_lock(stack_of("cu130").lock)} & set(left_out)
