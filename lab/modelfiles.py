"""The folder of the model that the lab makes itself: `ensure_model` takes it from the catalogue and gives back the folder
with its files, built into the cache if they are not there yet, and checked byte by byte against the sums in the
catalogue (see `lab/nano.py` and `docs/decisions/0003-nano-model.md`). The interpreter that runs a builder is given."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lab.errors import LabError
from lab.models import Model

BUILDER = Path(__file__).resolve().parent / "nano.py"
BUILD_LIMIT_S = 300.0

# Runs a script of the lab with the stack's interpreter: in go its path and arguments, out come the exit code and
# what it wrote to standard error.
Builder = Callable[[tuple[str, ...]], tuple[int, str]]


def ensure_model(model: Model, *, cache: Path, builder: Builder, say: Callable[[str], None]) -> Path:
    """The folder with the model's files, complete and checked.

    A built model goes to `cache`/models/<name>-<first 12 digits of its sum>. It is made beside that place by
    `builder` (the stack's interpreter: `with_python`, or a container), and moved into it when it is right, under
    a lock: an interrupted build is never taken for a finished one, and two builds at once end with one result.
    `say` gets a line before anything that takes time. `LabError` when the folder is damaged or cannot be written,
    or when the build gives other bytes than the catalogue expects.
    """
    models = cache / "models"
    folder = models / f"{model.name}-{model.sha256[:12]}"
    try:
        if not folder.exists():  # a finished model needs no lock, so it can be used from a read-only cache
            models.mkdir(parents=True, exist_ok=True)
            with FileLock(models / f".{folder.name}.lock"):
                if not folder.exists():  # somebody else may have built it while we waited
                    _build(model, folder=folder, builder=builder, say=say)
    except OSError as error:
        raise LabError(
            f"the model {model.name!r} cannot be written to {models}",
            why=str(error),
            fix="make room there, or give the lab another cache folder that you may write to",
        ) from error
    damage = find_damage(model, folder=folder)
    if damage:
        raise LabError(
            f"the model folder {folder} is damaged: {damage}",
            why="its files were compared with the sums in lab/models.py",
            fix=f"delete the folder; the next run makes it again: rm -r {folder}",
        )
    return folder


def find_damage(model: Model, *, folder: Path) -> str:
    """What is wrong with `folder` as a copy of `model`, in words; empty when nothing is."""
    expected = dict(model.files)
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            actual = _sha256(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != digest:
            return f"{name} is not the file it should be (sha256 {actual[:12]}..., expected {digest[:12]}...)"
    # A further *.safetensors or tokenizer file would be read by the server as part of the model.
    strange = sorted(file.name for file in folder.iterdir() if file.name not in expected)
    return f"{strange[0]} does not belong there" if strange else ""


def with_python(python: Path) -> Builder:
    """A builder that runs the stack's interpreter; the first argument of what it makes is a script."""

    def build(argv: tuple[str, ...]) -> tuple[int, str]:
        command = (str(python), "-I", *argv)
        try:
            done = subprocess.run(  # noqa: S603  our own script, no shell
                command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"building a model took more than {BUILD_LIMIT_S:.0f} s",
                why="it takes a few seconds on an idle machine",
                fix="look for other load on this machine and start again",
            ) from error
        except OSError as error:
            raise LabError(
                f"no model can be built: {python} does not start",
                why=str(error),
                fix="that is the stack's interpreter; delete the stack's folder, the next run makes it again",
            ) from error
        return done.returncode, done.stderr

    return build


def _build(model: Model, *, folder: Path, builder: Builder, say: Callable[[str], None]) -> None:
    """Make the model aside, check it, and move it to `folder`; the caller holds the lock."""
    aside = folder.with_name(f".{folder.name}.building")
    if aside.exists():  # left by a build that was interrupted
        shutil.rmtree(aside)
    say(f"building the model {model.name!r} (a few seconds)")
    argv = (str(BUILDER), str(aside))
    code, said = builder(argv)
    if code != 0:
        last = (said.strip().splitlines() or ["no message"])[-1]
        raise LabError(
            f"building the model {model.name!r} failed with exit status {code}",
            why=last,
            fix=f"run it by hand with the stack's Python to see all of it: {' '.join(argv)}",
        )
    damage = find_damage(model, folder=aside)
    if damage:
        raise LabError(
            f"the model {model.name!r} built on this machine differs from the catalogue: {damage}",
            why="it is made to come out the same everywhere; lab/nano.py, lab/data or the stack were changed",
            fix="undo the change, or, if it is meant, put the sums lab/nano.py prints into lab/models.py",
        )
    aside.rename(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
