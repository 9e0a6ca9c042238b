"""What is served: a catalogue of models as frozen `Model`s, and `ensure_model`, which takes one of them and
gives back the folder with its files, built into the cache if they are not there yet, and checked byte by byte
against the sums in the catalogue. Only `nano` is built here (see `lab/nano.py` and
`docs/decisions/0003-nano-model.md`)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from lab.errors import LabError, unknown_name

BUILDER = Path(__file__).resolve().parent / "nano.py"
BUILD_LIMIT_S = 300.0

_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by its name, its shapes and the SHA-256 of each of its files.

    `source` says where the files come from: "built" by `lab/nano.py`, or "local", a folder `path` that is
    already on this machine. `context` is the largest number of tokens of a request, prompt and answer
    together. `files` may be empty for a local model; then only the presence of its `config.json` is checked.
    """

    name: str
    description: str
    source: Literal["built", "local"]
    licence: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    dtype: str
    files: tuple[tuple[str, str], ...] = ()
    path: Path | None = None

    @property
    def sha256(self) -> str:
        """One sum for all files: of the lines that `sha256sum` prints for them, sorted by name."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()


CATALOGUE: Mapping[str, Model] = {
    "nano": Model(
        name="nano",
        description="2-layer Llama with seeded random weights, made on this machine; for servers without GPU",
        source="built",
        licence="Apache-2.0 (part of this repository)",
        hidden=256,
        intermediate=1024,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=10240,
        context=16384,
        dtype="float32",
        files=(
            ("config.json", "4de11ab9aa65150415d4304b2c8491ff81435100c4b7ebee1d3c5978c8fc379a"),
            ("generation_config.json", "3e0ec4685daa702afe754b156f4eb823ae3606c8087a1b22302cb88ca6c7790d"),
            ("model.safetensors", "2b3b5d82602e46a10cbf745cb57b49d15db8b64e7cd193cfe34f452eb404a10b"),
            ("tokenizer.json", "17604d83075b763df339e088ffae622fd671ca6015afe7892e2e3f1dfb691d5f"),
            ("tokenizer_config.json", "553e2a88fa245b9b6d6424088b9601dd8171f7d5f6f45f4e5be234317eaecece"),
        ),
    ),
}


# Runs a script of the lab with the stack's interpreter: in go its path and arguments, out come the exit code and
# what it wrote to standard error.
Builder = Callable[[tuple[str, ...]], tuple[int, str]]


def get_model(name: str) -> Model:
    """The model of that name; `LabError` with the valid names otherwise."""
    if name not in CATALOGUE:
        raise unknown_name("model", name, CATALOGUE)
    return CATALOGUE[name]


def kv_bytes_per_token(model: Model) -> int:
    """Bytes that one token takes in the KV cache: a key and a value in each layer and for each key/value
    head.

    For a cache in the model's own dtype; the server may be told another one (`--kv-cache-dtype`).
    """
    return 2 * model.layers * model.kv_heads * model.head_dim * _BYTES[model.dtype]


def ensure_model(model: Model, *, cache: Path, builder: Builder, say: Callable[[str], None]) -> Path:
    """The folder with the model's files, complete and checked.

    A built model goes to `cache`/models/<name>-<first 12 digits of its sum>. It is made beside that place by
    `builder` (the stack's interpreter: `with_python`, or a container), and moved into it when it is right, under
    a lock: an interrupted build is never taken for a finished one, and two builds at once end with one result.
    `say` gets a line before
    anything that takes time. `LabError` when the folder is damaged or cannot be written, or when the build
    gives other bytes than the catalogue expects.
    """
    if model.source == "local":
        return _local_folder(model)
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


def _local_folder(model: Model) -> Path:
    """The folder of a local model, after the checks that are possible."""
    folder = model.path
    if folder is None or not (folder / "config.json").is_file():
        raise LabError(
            f"the model {model.name!r} is not at {folder}",
            why="there is no config.json in that folder",
            fix="give the folder that holds the model's config.json",
        )
    damage = find_damage(model, folder=folder) if model.files else ""
    if damage:
        raise LabError(f"the model folder {folder} is damaged: {damage}", fix="fetch the model again")
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
