"""Stack descriptions: what is read, what is refused, what the lock hash covers, which machines fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.stack import Stack, check_platform, check_resources, list_stacks, load_stack
from lab.stacks.lock import drift, normal_name, read_lock, read_names

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cpu() -> Stack:
    return load_stack("cpu", root=ROOT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A root with a copy of the cpu stack that a test may change."""
    shutil.copytree(ROOT / "containers" / "cpu", tmp_path / "containers" / "cpu")
    return tmp_path


def edit(root: Path, old: str, new: str, *, file: str = "stack.toml") -> None:
    path = root / "containers" / "cpu" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_cpu_stack_is_what_the_documents_say(cpu: Stack) -> None:
    assert (cpu.sglang, cpu.torch, cpu.python, cpu.device) == ("0.5.21", "2.13.0+cpu", "3.11", "cpu")
    assert ("SGLANG_USE_CPU_ENGINE", "1") in cpu.env
    assert cpu.server_args[:4] == ("--device", "cpu", "--attention-backend", "torch_native")
    assert re.fullmatch("[0-9a-f]{64}", cpu.lock_hash)
    assert "cpu" in list_stacks(ROOT)


def test_unknown_stack_lists_the_known_ones() -> None:
    with pytest.raises(LabError, match="unknown stack 'cpi'") as caught:
        load_stack("cpi", root=ROOT)
    assert "cpu" in caught.value.why
    assert "did you mean 'cpu'" in caught.value.fix


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 2", "schema 2, this lab reads schema 1"),
        ('name = "cpu"', 'name = "gpu"', "its folder is 'cpu'"),
        ("sglang =", "sgl =", "unknown key 'sgl'"),
        ('sglang = "0.5.21"\n', "", "key 'sglang' is missing"),
        ('sglang = "0.5.21"', "sglang = 5", "sglang in .* must be a string, it is 5"),
        ("memory_gb = 3.0", 'memory_gb = "3"', r"memory_gb in \[needs\].* must be a number"),
        ("memory_gb = 3.0", "memory_gb = true", r"memory_gb in \[needs\].* must be a number"),
        ("memory_gb = 3.0", "memory_gb = -1", "between 0 and a million GB"),
        ("memory_gb = 3.0", "memory_gb = nan", "between 0 and a million GB"),
        ("disk_gb", "disc_gb", r"unknown key 'disc_gb' in \[needs\]"),
        ('OMP_NUM_THREADS = "1"', "OMP_NUM_THREADS = 1", r"OMP_NUM_THREADS in \[env\]"),
        ('"--device", "cpu"', '"--port", 1', "must be a list of strings"),
        ("[server]", "[servers]", "unknown key 'servers'"),
        ("[image]", "[images]", "unknown key 'images'"),
        ('torch_cuda = ""\n', "", r"key 'torch_cuda' is missing in \[image\]"),
        ('date = "2026-11-20"', 'date = "soon"', r"date in \[image\].* must be a day like 2026-11-20"),
        ("build_gb = 6.0", "build_gb = -6", "build_gb in .* between 0 and a million GB"),
        ('driver = ""', "driver = 580", r"driver in \[needs\].* must be a string"),
        ("observe = [", "observed = [", r"unknown key 'observed' in \[server\]"),
        ("args = [", "args = ", "is not valid TOML"),
    ],
)
def test_a_bad_description_is_refused(copy: Path, old: str, new: str, message: str) -> None:
    edit(copy, old, new)
    with pytest.raises(LabError, match=message) as caught:
        load_stack("cpu", root=copy)
    assert "stack.toml" in caught.value.problem
    assert caught.value.fix


def test_an_unknown_key_lists_the_valid_ones(copy: Path) -> None:
    edit(copy, "memory_gb", "memory")
    with pytest.raises(LabError) as caught:
        load_stack("cpu", root=copy)
    assert "memory_gb, disk_gb, system, machine, glibc" in caught.value.why


def test_a_stack_without_its_lock_is_refused(copy: Path) -> None:
    (copy / "containers" / "cpu" / "requirements.txt").unlink()
    with pytest.raises(LabError, match=r"requirements\.txt"):
        load_stack("cpu", root=copy)


def test_the_lock_hash_covers_what_determines_the_environment(copy: Path, cpu: Stack) -> None:
    def lock_hash() -> str:
        return load_stack("cpu", root=copy).lock_hash

    assert lock_hash() == cpu.lock_hash  # whatever the folder it lies in
    edit(copy, '"--dtype", "float32"', '"--dtype", "bfloat16"')
    cache = copy / "containers" / "cpu" / "shims" / "sgl_kernel" / "__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "x.pyc").touch()
    edit(copy, "# Every package", "# Each package", file="requirements.txt")
    # neither comments nor server arguments nor Python's caches are installed
    assert lock_hash() == cpu.lock_hash
    seen = {lock_hash()}
    edit(copy, "--hash=sha256:0", "--hash=sha256:1", file="requirements.txt")
    seen.add(lock_hash())
    edit(copy, "nms", "nns", file="shims/lab_cpu_shims/torchvision.py")
    seen.add(lock_hash())
    (copy / "containers" / "cpu" / "shims" / "new.py").touch()
    seen.add(lock_hash())
    edit(copy, 'python = "3.11"', 'python = "3.12"')
    seen.add(lock_hash())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("system", "machine", "glibc", "message"),
    [
        ("Darwin", "arm64", "", "does not run on Darwin"),
        ("Windows", "AMD64", "", "does not run on Windows"),
        ("Linux", "aarch64", "2.39", "does not run on a aarch64 processor"),
        ("Linux", "x86_64", "2.31", "needs glibc 2.34 or newer, this system has 2.31"),
        ("Linux", "x86_64", "2.9", "needs glibc 2.34"),
        ("Linux", "x86_64", "", "another C library"),
    ],
)
def test_an_unsupported_platform_is_refused(
    cpu: Stack, system: str, machine: str, glibc: str, message: str
) -> None:
    with pytest.raises(LabError, match=message) as caught:
        check_platform(cpu, system=system, machine=machine, glibc=glibc)
    assert "Linux x86_64 with glibc 2.34" in caught.value.fix


@pytest.mark.parametrize("glibc", ["2.34", "2.36", "2.100", "3.0"])
def test_a_supported_platform_passes(cpu: Stack, glibc: str) -> None:
    check_platform(cpu, system="Linux", machine="x86_64", glibc=glibc)


def test_too_little_disk_or_memory_is_refused_with_both_numbers(cpu: Stack) -> None:
    check_resources(cpu)
    check_resources(cpu, disk_free_gb=3.0, memory_available_gb=3.0)
    with pytest.raises(LabError, match=r"2\.9 GB free, 3\.0 GB needed"):
        check_resources(cpu, disk_free_gb=2.9)
    with pytest.raises(LabError, match=r"1\.0 GB available, 3\.0 GB needed"):
        check_resources(cpu, memory_available_gb=1.0)


def test_the_lock_is_made_from_its_inputs(cpu: Stack) -> None:
    assert drift(cpu) == ()
    versions = {pin.name: pin.version for pin in read_lock(cpu.lock)}
    for entry in read_names(cpu.requirements):
        name, _, version = entry.partition("==")
        assert versions[normal_name(name)] == version
    assert versions["sglang"] == cpu.sglang
    assert versions["torch"] == cpu.torch


@pytest.mark.parametrize("name", list_stacks(ROOT))
def test_every_lock_fits_its_inputs(name: str) -> None:
    assert drift(load_stack(name, root=ROOT)) == ()


def test_extras_are_no_part_of_a_locked_name(tmp_path: Path) -> None:
    """`sglang[srt]==0.4.6.post5` is asked for, `sglang==0.4.6.post5` is locked."""
    shutil.copytree(ROOT / "containers" / "cu125", tmp_path / "containers" / "cu125")
    file = tmp_path / "containers" / "cu125" / "requirements.in"
    assert "sglang[srt]==0.4.6.post5" in file.read_text()
    file.write_text(file.read_text().replace("sglang[srt]==0.4.6.post5", "sglang[srt]==0.4.6.post4"))
    reasons = drift(load_stack("cu125", root=tmp_path))
    assert "sglang==0.4.6.post4 is asked for, the lock has 0.4.6.post5" in reasons


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "requirements.in",
            "sglang==0.5.21",
            "sglang==0.5.20",
            "sglang==0.5.20 is asked for, the lock has 0.5.21",
        ),
        (
            "requirements.in",
            "torchvision==",
            "torchvisio==",
            "torchvisio==0.28.0 is asked for, the lock has none",
        ),
        ("stack.toml", 'torch = "2.13.0+cpu"', 'torch = "2.14.0+cpu"', "torch==2.14.0+cpu is asked for"),
        ("excludes.txt", "scipy", "six", "changed after the lock was made"),
        ("excludes.txt", "scipy", "numpy", "numpy is excluded, and locked"),
    ],
)
def test_drift_between_lock_and_inputs_is_seen(
    copy: Path, file: str, old: str, new: str, reason: str
) -> None:
    edit(copy, old, new, file=file)
    assert any(reason in found for found in drift(load_stack("cpu", root=copy)))


def test_a_comment_in_the_inputs_is_no_drift(copy: Path) -> None:
    edit(copy, "#", "# a word more;", file="excludes.txt")
    assert drift(load_stack("cpu", root=copy)) == ()


def test_nothing_of_cuda_is_locked(cpu: Stack) -> None:
    names = {pin.name for pin in read_lock(cpu.lock)}
    assert not [name for name in names if name.startswith(("nvidia", "cuda"))]
    assert not names & {"triton", "sglang-kernel", "sgl-kernel", "flashinfer-python"}


def test_the_lock_names_no_index_and_no_path(cpu: Stack) -> None:
    text = cpu.lock.read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    assert not re.search(r"(?m)(^|\s)/\w", text)


def test_a_lock_with_a_line_without_hash_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# a comment\nsix==1.0 \\\n    --hash=sha256:ab \\\n    --hash=sha256:cd\n    # via x\nyz==2.0\n"
    )
    with pytest.raises(LabError, match=r"yz==2\.0"):
        read_lock(file)
    file.write_text(file.read_text().replace("yz==2.0\n", ""))
    (pin,) = read_lock(file)
    assert (pin.name, pin.version) == ("six", "1.0")
    assert pin.text == "six==1.0 \\\n    --hash=sha256:ab \\\n    --hash=sha256:cd\n"
