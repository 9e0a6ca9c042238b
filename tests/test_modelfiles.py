"""The life of the folder of the model that is made here: built once, checked always, never half there."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lab import modelfiles, nano
from lab.errors import LabError
from lab.modelfiles import ensure_model, with_python
from lab.models import Model, get_model

CONTENT = {"config.json": b"{}\n", "weights": b"\x00\x01\x02"}

# Writes CONTENT into argv[1] and leaves one more line in a diary beside the script.
GOOD_BUILDER = f"""
import sys, time
from pathlib import Path
out = Path(sys.argv[1])
out.mkdir()
time.sleep(0.3)
for name, data in {CONTENT!r}.items():
    (out / name).write_bytes(data)
with Path(__file__).with_name("diary").open("a") as diary:
    diary.write("built\\n")
"""

# Is killed while it writes, as by the kernel or an impatient user.
KILLED_BUILDER = """
import os, signal, sys
from pathlib import Path
out = Path(sys.argv[1])
out.mkdir()
(out / "config.json").write_bytes(b"{")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def small() -> Model:
    """A model of the two files of CONTENT."""
    sums = tuple((name, hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items())
    return replace(get_model("nano"), name="small", files=sums)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of lab/nano.py."""
    script = tmp_path / "builder.py"
    script.write_text(GOOD_BUILDER)
    monkeypatch.setattr(modelfiles, "BUILDER", script)
    return script


def ensure(model: Model, tmp_path: Path) -> tuple[Path, list[str]]:
    """The folder and what was said."""
    said: list[str] = []
    folder = ensure_model(
        model, cache=tmp_path / "cache", builder=with_python(Path(sys.executable)), say=said.append
    )
    return folder, said


def builds(builder: Path) -> int:
    diary = builder.with_name("diary")
    return len(diary.read_text().splitlines()) if diary.exists() else 0


def test_catalogue_agrees_with_the_builder() -> None:
    model = get_model("nano")
    assert (model.hidden, model.intermediate, model.layers) == (nano.HIDDEN, nano.INTERMEDIATE, nano.LAYERS)
    assert (model.heads, model.kv_heads, model.head_dim) == (nano.HEADS, nano.KV_HEADS, nano.HEAD_DIM)
    assert (model.vocab, model.context) == (nano.VOCAB, nano.CONTEXT)
    assert model.dtype == nano.model_config()["torch_dtype"]


def test_sum_of_a_model_is_what_sha256sum_gives(small: Model, tmp_path: Path) -> None:
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    lines = subprocess.run(
        ["sha256sum", *sorted(CONTENT)], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert small.sha256 == hashlib.sha256(lines).hexdigest()


def test_built_once_then_found(small: Model, builder: Path, tmp_path: Path) -> None:
    folder, said = ensure(small, tmp_path)
    assert folder == tmp_path / "cache" / "models" / f"small-{small.sha256[:12]}"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == CONTENT
    assert len(said) == 1
    assert ensure(small, tmp_path) == (folder, [])
    assert builds(builder) == 1


def test_two_builds_at_once_end_with_one(small: Model, builder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ensure(small, tmp_path), range(4)))
    assert len({folder for folder, _ in results}) == 1
    assert sum(len(said) for _, said in results) == 1
    assert builds(builder) == 1


def test_killed_build_leaves_nothing_that_counts(small: Model, builder: Path, tmp_path: Path) -> None:
    builder.write_text(KILLED_BUILDER)
    with pytest.raises(LabError, match="failed with exit status -9"):
        ensure(small, tmp_path)
    assert not (tmp_path / "cache" / "models" / f"small-{small.sha256[:12]}").exists()
    builder.write_text(GOOD_BUILDER)
    folder, _ = ensure(small, tmp_path)
    assert sorted(file.name for file in folder.parent.iterdir() if file.is_dir()) == [folder.name]


def test_failed_build_shows_its_last_line(small: Model, builder: Path, tmp_path: Path) -> None:
    builder.write_text("raise SystemExit('the disk of numbers is empty')")
    with pytest.raises(LabError) as caught:
        ensure(small, tmp_path)
    assert caught.value.why == "the disk of numbers is empty"
    assert str(builder) in caught.value.fix


@pytest.mark.usefixtures("builder")
def test_stack_without_interpreter(small: Model, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="does not start"):
        ensure_model(
            small, cache=tmp_path / "cache", builder=with_python(tmp_path / "no" / "python"), say=print
        )


def test_build_with_other_bytes_is_refused(small: Model, builder: Path, tmp_path: Path) -> None:
    builder.write_text(GOOD_BUILDER.replace(r"\x02", r"\x03"))
    with pytest.raises(LabError, match="differs from the catalogue: weights is not the file"):
        ensure(small, tmp_path)
    assert not list((tmp_path / "cache" / "models").glob("small-*"))


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"\x00\x01\x03"), "weights is not the file"),
        (lambda folder: (folder / "weights").write_bytes(b""), "weights is not the file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "more.safetensors").touch(), "more.safetensors does not belong there"),
    ],
)
def test_damage_is_named_with_the_remedy(small: Model, harm: object, word: str, tmp_path: Path) -> None:
    folder, _ = ensure(small, tmp_path)
    assert callable(harm)
    harm(folder)
    with pytest.raises(LabError) as caught:
        ensure(small, tmp_path)
    assert word in caught.value.problem
    assert f"rm -r {folder}" in caught.value.fix


@pytest.mark.usefixtures("builder")
def test_cache_that_cannot_be_written(small: Model, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(LabError, match="cannot be written"):
        ensure(small, tmp_path)
