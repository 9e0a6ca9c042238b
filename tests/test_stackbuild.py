"""Building a stack for real: a tiny one for everything that can go wrong, and the cpu stack itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from realstack import real_stack
from tinystack import Package, make_stack

from lab.errors import LabError
from lab.stack import Stack, load_stack
from lab.stacks.build import BUILDING, ensure, lock_file, stack_folder
from lab.stacks.check import check, read_manifest, site_packages, verify
from lab.stacks.lock import normal_name, read_names
from lab.stacks.python import find_python, probe
from lab.stacks.run import child_env

ROOT = Path(__file__).parents[1]
BUILDER = """
import sys
from pathlib import Path
from lab.stack import load_stack
from lab.stacks.build import ensure
stack = load_stack("tiny", root=Path(sys.argv[1]))
print(ensure(stack, cache=Path(sys.argv[2]), say=lambda line: print(line, flush=True)))
"""


@pytest.fixture(autouse=True)
def _only_the_wheels_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_OFFLINE", "1")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def lines() -> list[str]:
    """What a build said."""
    return []


@pytest.fixture
def start_builder(tmp_path: Path, cache: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the lab's build of the tiny stack as a process of its own; ends those still there."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        argv = (sys.executable, "-c", BUILDER, str(tmp_path), str(cache))
        started.append(
            subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def unfinished(cache: Path) -> list[Path]:
    return list((cache / "stacks").glob(f"{BUILDING}*"))


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def processes_in(folder: Path) -> list[str]:
    """Command lines of all living processes that mention `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(" ".join(words))
    return found


def built(stack: Stack, cache: Path, lines: list[str]) -> Path:
    return ensure(stack, cache=cache, say=lines.append)


def test_a_build_ends_under_its_hash_with_a_manifest(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    stack = make_stack(tmp_path)
    folder = built(stack, cache, lines)
    assert folder == cache / "stacks" / f"tiny-{stack.lock_hash[:12]}"
    manifest = read_manifest(folder)
    assert manifest.lock_hash == stack.lock_hash
    assert manifest.versions == {"labtiny": "1.0"}
    assert manifest.imported == {"labtiny": "1.0"}
    assert set(manifest.seconds) == {"prepare", "python", "create", "packages", "shims"}
    assert manifest.size_bytes > 10_000
    assert not unfinished(cache)
    assert [line.split()[0] for line in lines[1:-1]] == [
        *("prepare", "python", "create", "packages", "shims", "verify", "move")
    ]


def test_the_moved_environment_works_by_module_and_by_script(
    tmp_path: Path, cache: Path, lines: list[str]
) -> None:
    folder = built(make_stack(tmp_path), cache, lines)
    env = {"LABTINY_SECONDS": "0"}
    for argv in (
        (folder / "bin" / "python", "-c", "import labtiny as t; t.main()"),
        (folder / "bin" / "labtiny",),
    ):
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        assert done.stdout == "labtiny\n"
    files = [folder / "pyvenv.cfg", *(folder / "bin").iterdir()]
    assert not [file for file in files if file.is_file() and BUILDING.encode() in file.read_bytes()]


def test_everything_is_compiled_ahead(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    stack = make_stack(tmp_path, Package(files={"labtiny/__init__.py": "", "labtiny/part.py": ""}))
    site = site_packages(stack, built(stack, cache, lines))
    assert list((site / "labtiny" / "__pycache__").glob("part.*.pyc"))  # verifying imports labtiny only


def test_a_built_stack_is_found_again_without_building(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    stack = make_stack(tmp_path)
    folder = built(stack, cache, lines)
    lines.clear()
    before = (folder / "lab-stack.json").stat().st_mtime_ns
    assert built(stack, cache, lines) == folder
    assert lines == []
    assert (folder / "lab-stack.json").stat().st_mtime_ns == before


def test_another_lock_is_another_folder(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    first = built(make_stack(tmp_path), cache, lines)
    second = built(make_stack(tmp_path, Package(version="1.1")), cache, lines)
    assert first != second
    assert first.exists()


def test_a_killed_build_leaves_nothing_that_counts(
    tmp_path: Path, cache: Path, lines: list[str], start_builder: Callable[[], subprocess.Popen[str]]
) -> None:
    stack = make_stack(tmp_path, seconds=30)
    builder = start_builder()
    wait_for(lambda: any("LABTINY" in line or "labtiny" in line for line in processes_in(cache)))
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    (left,) = unfinished(cache)
    assert not stack_folder(stack, cache=cache).exists()
    wait_for(lambda: not [line for line in processes_in(left) if "pip" in line], seconds=10)
    stack = make_stack(tmp_path)  # the same lock, so the same folder, and quick this time
    folder = built(stack, cache, lines)
    assert check(stack, folder).versions == {"labtiny": "1.0"}
    assert f"removing an unfinished build: {left}" in lines
    assert not unfinished(cache)


@pytest.mark.parametrize("step", ["create", "packages"])
def test_a_build_killed_early_is_built_again(
    tmp_path: Path,
    cache: Path,
    lines: list[str],
    start_builder: Callable[[], subprocess.Popen[str]],
    step: str,
) -> None:
    stack = make_stack(tmp_path)
    builder = start_builder()
    wait_for(lambda: bool(list((cache / "logs").glob(f"*/{step}.log"))))
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    (left,) = unfinished(cache)
    wait_for(lambda: not processes_in(left), seconds=10)  # its pip or venv died with it
    check(stack, built(stack, cache, lines))
    assert not unfinished(cache)


def test_ctrl_c_takes_its_children_and_its_folder_away(
    tmp_path: Path, cache: Path, start_builder: Callable[[], subprocess.Popen[str]]
) -> None:
    make_stack(tmp_path, seconds=30)
    builder = start_builder()
    wait_for(lambda: any("labtiny" in line for line in processes_in(cache / "stacks")))
    builder.send_signal(signal.SIGINT)
    assert builder.wait(timeout=20) != 0
    assert not unfinished(cache)
    assert not processes_in(cache / "stacks")


def test_two_builds_at_once_end_with_one_result(
    tmp_path: Path, cache: Path, start_builder: Callable[[], subprocess.Popen[str]]
) -> None:
    stack = make_stack(tmp_path, seconds=2)
    first = start_builder()
    wait_for(lambda: bool(unfinished(cache)))
    second = start_builder()
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert "built stack 'tiny'" in said[0]
    assert "another lab is building this stack; waiting for it" in said[1]
    assert "built stack" not in said[1]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1] == str(stack_folder(stack, cache=cache))
    assert [path.name for path in (cache / "stacks").iterdir() if path.is_dir()] == [
        stack_folder(stack, cache=cache).name
    ]


def test_leftovers_of_other_stacks_go_only_when_their_build_is_dead(
    tmp_path: Path, cache: Path, lines: list[str], start_builder: Callable[[], subprocess.Popen[str]]
) -> None:
    make_stack(tmp_path, seconds=30)
    start_builder()
    wait_for(lambda: bool(unfinished(cache)))
    (alive,) = unfinished(cache)
    dead = cache / "stacks" / f"{BUILDING}1-other-0123456789ab"  # its process lives, its lock is free
    dead.mkdir()
    built(make_stack(tmp_path, Package(version="2.0")), cache, lines)
    assert alive.exists()
    assert not dead.exists()


def test_a_wrong_hash_names_step_log_and_what_to_try(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    make_stack(tmp_path)
    lock = tmp_path / "containers" / "tiny" / "requirements.txt"
    lock.write_text(re.sub("sha256:.{8}", "sha256:00000000", lock.read_text()))
    stack = load_stack("tiny", root=tmp_path)
    with pytest.raises(LabError, match="failed at step 'packages'") as caught:
        built(stack, cache, lines)
    assert "00000000" in caught.value.why
    assert "serves another file than the locked one" in caught.value.fix
    logs = Path(caught.value.fix.rpartition("log: ")[2])
    assert "DO NOT MATCH THE HASHES" in (logs / "packages.log").read_text()
    assert not stack_folder(stack, cache=cache).exists()
    assert not unfinished(cache)


def test_a_package_that_the_index_lacks(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    stack = make_stack(tmp_path)
    next((tmp_path / "wheels").iterdir()).unlink()
    with pytest.raises(LabError, match="'packages'") as caught:
        built(stack, cache, lines)
    assert "does not have this package" in caught.value.fix


def test_no_network(tmp_path: Path, cache: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(tmp_path)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(LabError, match="'packages'") as caught:
        built(stack, cache, lines)
    assert "check the network and proxy" in caught.value.fix
    assert not unfinished(cache)


def test_torch_comes_through_uv_only_when_pip_has_none(
    tmp_path: Path, cache: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = Package(name="torch", version="9.9+cpu", files={"torch/__init__.py": "__version__ = '9.9+cpu'\n"})
    stack = make_stack(tmp_path, Package(), torch, imports=("labtiny", "torch"))
    assert read_manifest(built(stack, cache, lines)).imported["torch"] == "9.9+cpu"
    assert not any("through uv" in line for line in lines)

    other = tmp_path / "other"
    other.mkdir()
    for wheel in (tmp_path / "wheels").glob("torch-*"):
        wheel.rename(other / wheel.name)
    monkeypatch.setenv("UV_FIND_LINKS", str(other))  # in the place of PyTorch's index, which tests do not ask
    folder = ensure(stack, cache=tmp_path / "cache2", say=lines.append)
    assert any("no torch 9.9+cpu; asking PyTorch's own index through uv" in line for line in lines)
    assert read_manifest(folder).imported["torch"] == "9.9+cpu"

    monkeypatch.delenv("UV_FIND_LINKS")
    with pytest.raises(LabError, match="failed at step 'torch'") as caught:
        ensure(stack, cache=tmp_path / "cache3", say=lines.append)
    assert "torch" in caught.value.why


@pytest.mark.parametrize(
    ("packages", "excludes", "message"),
    [
        ((Package(requires=("labgone>=2",)),), (), "labtiny requires labgone>=2"),
        ((Package(requires=("labother>=2",)), Package(name="labother")), (), "labtiny requires labother>=2"),
        ((Package(), Package(name="nvidia_labtest")), (), "nvidia-labtest is a CUDA package"),
        ((Package(), Package(name="cuda_labtest")), (), "cuda-labtest is a CUDA package"),
        ((Package(files={"labtiny.py": "import labgone"}),), (), "No module named 'labgone'"),
        (
            (Package(name="torch", version="9.9+cpu", files={"torch.py": "__version__ = '9.8'"}),),
            (),
            "says it is 9.8",
        ),
    ],
)
def test_verification_refuses_what_does_not_hold(
    tmp_path: Path,
    cache: Path,
    lines: list[str],
    packages: tuple[Package, ...],
    excludes: tuple[str, ...],
    message: str,
) -> None:
    stack = make_stack(tmp_path, *packages, excludes=excludes, imports=(packages[0].name,))
    with pytest.raises(LabError, match="failed at step 'verify'") as caught:
        built(stack, cache, lines)
    assert message in caught.value.why
    assert not stack_folder(stack, cache=cache).exists()


def test_verification_takes_what_is_excluded_on_purpose_or_not_asked_for_here(
    tmp_path: Path, cache: Path, lines: list[str]
) -> None:
    requires = (
        "LabGone>=2",
        "labmac; sys_platform == 'darwin'",
        "labold; python_version < '3.11'",
        "x; extra == 'y'",
    )
    stack = make_stack(tmp_path, Package(requires=requires), excludes=("labgone",))
    assert read_manifest(built(stack, cache, lines)).missing_on_purpose == ("labgone",)


def damage_file_lost(site: Path) -> None:
    (site / "labtiny" / "__init__.py").unlink()


def damage_package_lost(site: Path) -> None:
    subprocess.run(("rm", "-r", site / "labtiny"), check=True)


def damage_metadata_lost(site: Path) -> None:
    subprocess.run(("rm", "-r", site / "labtiny-1.0.dist-info"), check=True)


def damage_file_cut(site: Path) -> None:
    (site / "labtiny" / "__init__.py").write_text("")


def damage_package_added(site: Path) -> None:
    (site / "stranger").mkdir()
    (site / "stranger" / "__init__.py").touch()


def damage_shim_lost(site: Path) -> None:
    (site / "tinyshim.pth").unlink()


def damage_shim_changed(site: Path) -> None:
    (site / "tinyshim.py").write_text("WORD = 'SHIM'\n")  # of the same size


def damage_manifest_cut(site: Path) -> None:
    manifest = site.parents[2] / "lab-stack.json"
    manifest.write_text(manifest.read_text()[:100])


def damage_manifest_lost(site: Path) -> None:
    (site.parents[2] / "lab-stack.json").unlink()


def damage_manifest_newer(site: Path) -> None:
    manifest = site.parents[2] / "lab-stack.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))


def damage_inventory_lost(site: Path) -> None:
    (site.parents[2] / "lab-files.txt").unlink()


def damage_python_gone(site: Path) -> None:
    (site.parents[2] / "bin" / "python").unlink()


def damage_lock_other(site: Path) -> None:
    manifest = site.parents[2] / "lab-stack.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "lock_hash": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_file_lost, "labtiny: 1 file missing (first: labtiny/__init__.py)"),
        (damage_package_lost, "labtiny: 1 file missing"),
        (damage_metadata_lost, r"labtiny-1.0.dist-info: "),
        (damage_file_cut, "labtiny: 1 file of another size"),
        (damage_package_added, "stranger: 1 file not from this build"),
        (damage_shim_lost, "shim tinyshim.pth is missing"),
        (damage_shim_changed, "shim tinyshim.py is changed"),
        (damage_manifest_cut, "lab-stack.json cannot be read"),
        (damage_manifest_lost, "lab-stack.json cannot be read"),
        (damage_manifest_newer, "has schema 2, this lab reads 1"),
        (damage_inventory_lost, "its files cannot be listed"),
        (damage_python_gone, "the Python it was built with is gone"),
        (damage_lock_other, "it was built from lock 000000000000"),
    ],
)
def test_a_damaged_stack_is_named_with_the_folder_to_delete(
    tmp_path: Path, cache: Path, lines: list[str], damage: Callable[[Path], None], message: str
) -> None:
    stack = make_stack(tmp_path)
    folder = built(stack, cache, lines)
    damage(site_packages(stack, folder))
    with pytest.raises(LabError, match="is not as it was built") as caught:
        built(stack, cache, lines)
    assert message in caught.value.why
    assert caught.value.fix.endswith(f"rm -r {folder}")
    assert folder.exists()  # deleting is the user's to decide


def test_python_caches_that_come_and_go_are_no_damage(tmp_path: Path, cache: Path, lines: list[str]) -> None:
    stack = make_stack(tmp_path)
    site = site_packages(stack, built(stack, cache, lines))
    for file in (site / "labtiny" / "__pycache__").iterdir():
        file.unlink()
    (site / "__pycache__" / "x.pyc").touch()
    built(stack, cache, lines)


def test_a_cache_that_cannot_be_written(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="cannot write in") as caught:
        built(make_stack(tmp_path), tmp_path / "file" / "cache", lines)
    assert "XDG_CACHE_HOME" in caught.value.fix


def test_too_little_disk_is_said_before_anything_is_built(
    tmp_path: Path, cache: Path, lines: list[str]
) -> None:
    make_stack(tmp_path)
    toml = tmp_path / "containers" / "tiny" / "stack.toml"
    toml.write_text(toml.read_text().replace("disk_gb = 0", "disk_gb = 99999"))
    with pytest.raises(LabError, match="not enough disk"):
        built(load_stack("tiny", root=tmp_path), cache, lines)
    assert not unfinished(cache)


def test_a_full_disk(tmp_path: Path, lines: list[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small))
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        stack = make_stack(
            tmp_path, Package(files={"labtiny/__init__.py": "", "labtiny/big.txt": "x" * 2_000_000})
        )
        with pytest.raises(LabError, match="failed at step 'packages'") as caught:
            built(stack, small, lines)
        assert "No space left" in caught.value.why
        assert "free some space" in caught.value.fix
        assert not stack_folder(stack, cache=small).exists()
        assert not unfinished(small)
    finally:
        subprocess.run(("umount", str(small)), check=True)


def test_children_get_the_users_pip_set_up_and_nothing_that_leads_elsewhere() -> None:
    env = child_env(
        {
            "PATH": "/bin",
            "PIP_INDEX_URL": "x",
            "UV_FIND_LINKS": "x",
            "HTTPS_PROXY": "x",
            "no_proxy": "x",
            "SSL_CERT_FILE": "x",
            "PIP_TARGET": "/elsewhere",
            "PYTHONPATH": "/elsewhere",
            "HF_TOKEN": "secret",
            "LD_PRELOAD": "x",
        }
    )
    assert {
        "PATH",
        "PIP_INDEX_URL",
        "UV_FIND_LINKS",
        "HTTPS_PROXY",
        "no_proxy",
        "SSL_CERT_FILE",
    } <= env.keys()
    assert not {"PIP_TARGET", "PYTHONPATH", "HF_TOKEN", "LD_PRELOAD"} & env.keys()


def fake_python(file: Path, answer: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{answer}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("answer", "found", "verdict"),
    [
        ("echo '[[3, 11, 9], []]'", "3.11.9", "Python 3.11.9"),
        ("echo '[[3, 12, 1], []]'", None, "is Python 3.12.1"),
        ("echo '[[3, 1, 1], []]'", None, "is Python 3.1.1"),
        ("""echo '[[3, 11, 9], ["lzma"]]'""", None, "lacks lzma"),
        ("exit 127", None, "does not run (CalledProcessError)"),
        ("echo nonsense", None, "does not run (JSONDecodeError)"),
    ],
)
def test_a_candidate_python_must_start_and_fit(
    tmp_path: Path, answer: str, found: str | None, verdict: str
) -> None:
    assert probe(fake_python(tmp_path / "python", answer), version="3.11", env={}) == (found, verdict)


def test_the_search_goes_on_past_what_does_not_fit(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python4.2", "exit 1")
    for version in ("4.2.9", "4.2.10"):
        numbers = version.replace(".", ", ")
        answer = "exit 1" if version == "4.2.10" else f"echo '[[{numbers}], []]'"
        fake_python(tmp_path / "pyenv" / "versions" / version / "bin" / "python", answer)
    env = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)}
    python = find_python("4.2", env=env)
    assert python.version == "4.2.9"
    assert [line.rpartition("/bin/")[0].rpartition("/")[2] for line in python.tried] == [
        tmp_path.name,
        "4.2.10",
        "4.2.9",
    ]


def test_no_python_says_what_was_tried(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "UV_OFFLINE": "1"}
    with pytest.raises(LabError, match=r"no Python 4\.2") as caught:
        find_python("4.2", env=env)
    assert "uv python install 4.2" in caught.value.why
    assert "python4.2" in caught.value.fix


def test_the_lab_names_no_index() -> None:
    for file in [*(ROOT / "lab").glob("stack*.py"), *(ROOT / "containers").rglob("*")]:
        if file.is_file() and file.suffix != ".pyc":
            assert not re.search(rb"pypi\.org|download\.pytorch|files\.pythonhosted", file.read_bytes()), file


def test_the_real_stack_is_small_complete_and_free_of_cuda() -> None:
    stack, folder = real_stack()
    manifest = check(stack, folder)
    assert manifest.versions["sglang"] == "0.5.21"
    assert manifest.versions["torch"] == "2.13.0+cpu"
    assert manifest.size_bytes < 2e9
    assert not [name for name in manifest.versions if name.startswith(("nvidia", "cuda", "triton"))]
    assert (folder.parent / lock_file(folder).name).exists()


def test_the_excludes_of_the_real_stack_are_exactly_what_is_missing() -> None:
    stack, folder = real_stack()
    excluded = {normal_name(name) for name in read_names(stack.excludes)}
    assert set(read_manifest(folder).missing_on_purpose) == excluded  # a stale exclude fails here


def test_the_real_stack_still_verifies() -> None:
    stack, folder = real_stack()
    imported, _ = verify(stack, folder, env=child_env(os.environ))
    assert imported["torch"] == stack.torch


def test_the_look_at_every_use_is_quick() -> None:
    stack, folder = real_stack()
    best = min(timed(lambda: check(stack, folder)) for _ in range(3))
    assert best < 2.0  # 0.3 s on an idle machine; this catches only hashing everything, or worse


def timed(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started
