"""Whether a folder holds a model of the catalogue: `check_folder` looks at config.json and its shapes, at the tokenizer, and at
every file of weights (there, and as long as its own header says), and raises a `LabError` that names what is wrong. Nothing
is loaded: it reads a few kilobytes of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lab.dummymodel import shape_fields
from lab.errors import LabError
from lab.models import Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json")
HEADER_LIMIT = 100_000_000  # bytes; what safetensors itself allows a header

# What transformers takes for a key that a config.json leaves out, where that is the same for all models.
_LEFT_OUT: Mapping[str, object] = {"tie_word_embeddings": False}


def check_folder(model: Model, *, folder: Path) -> None:
    """Raise `LabError` when `folder` is not a complete copy of `model`, with what is wrong and what to do."""
    if not folder.is_dir():
        raise _refused(
            model, folder=folder, why="there is no such folder", fix="name the folder that holds config.json"
        )
    wrong = next(_faults(model, folder=folder), "")
    if wrong:
        raise _refused(
            model,
            folder=folder,
            why=wrong,
            fix=f"fetch the model again ({model.repository}, revision {model.pinned}), or use --weights dummy",
        )


def fingerprint(folder: Path) -> str:
    """A sum that tells one copy of a model from another without reading all of it: of the texts (config, index, tokenizer)
    and of the names and sizes of the weights. Empty for a folder that cannot be read."""
    found = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix == ".safetensors":
                found.update(f"{file.name} {file.stat().st_size}\n".encode())
            elif file.suffix == ".json" or file.name in TOKENIZERS:
                found.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    except OSError:
        return ""
    return found.hexdigest()


def _faults(model: Model, *, folder: Path) -> Iterator[str]:
    config = _object(folder / "config.json")
    if isinstance(config, str):
        yield config
        return
    yield from _shape_faults(model, config)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield f"it has no tokenizer ({' or '.join(TOKENIZERS[:2])})"
    if not (folder / "tokenizer_config.json").is_file():
        yield "it has no tokenizer_config.json"
    yield from _weight_faults(folder)


def _shape_faults(model: Model, config: Mapping[str, object]) -> Iterator[str]:
    if "quantization_config" in config:
        yield "its config.json has quantization_config; the catalogue's model is not quantised"
    # A config.json of transformers 5 has the rotary embedding below rope_parameters.
    rope = config.get("rope_parameters")
    nested = rope if isinstance(rope, dict) else {}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    expected = {"architectures": [model.architecture], "model_type": model.model_type, **shape_fields(model)}
    for field, wanted in expected.items():
        found = config.get(field, nested.get(field, _LEFT_OUT.get(field)))
        if field == "head_dim" and found is None:
            found = width
        if found != wanted:
            yield f"its config.json is of another shape: {field} is {found!r}, expected {wanted!r}"
    dtype = config.get("torch_dtype", config.get("dtype"))
    if dtype != model.dtype:
        yield f"its config.json is of another precision: torch_dtype is {dtype!r}, expected {model.dtype!r}"
    scaling = config.get("rope_scaling") or nested
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    wanted_factor = model.rope_scaling.factor if model.rope_scaling else None
    if factor != wanted_factor:
        yield f"its config.json has another rope_scaling: factor is {factor!r}, expected {wanted_factor!r}"


def _weight_faults(folder: Path) -> Iterator[str]:
    names = [SINGLE]
    if (folder / INDEX).is_file():
        index = _object(folder / INDEX)
        if isinstance(index, str):
            yield index
            return
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            yield f"{INDEX} names no files"
            return
        names = sorted({str(name) for name in shards.values()})
    for name in names:
        if not (folder / name).is_file():
            where = f", which {INDEX} names" if names != [SINGLE] else ""
            yield f"{name} is missing{where}" if where else f"it has no weights ({SINGLE} or {INDEX})"
        else:
            cut = _cut(folder / name)
            if cut:
                yield f"{name} {cut}"


def _cut(file: Path) -> str:
    """What is wrong with the length of a safetensors file, by its own header; empty when nothing is.

    The format: eight bytes with the header's length, the header as JSON with the place of each tensor, the tensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length <= min(size, HEADER_LIMIT) else None
        ends = [entry["data_offsets"][1] for name, entry in (header or {}).items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "has a header that cannot be read; it was cut short or is not a safetensors file"
    if header is None:
        return "has a header that cannot be read; it was cut short or is not a safetensors file"
    return "" if size == expected else f"has {size} bytes, its header says {expected}; it was cut short"


def _object(file: Path) -> dict[str, object] | str:
    """The JSON object in a file, or what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {file.name}"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{file.name} is no JSON ({error}); it was cut short or changed"
    return value if isinstance(value, dict) else f"{file.name} holds no JSON object"


def _refused(model: Model, *, folder: Path, why: str, fix: str) -> LabError:
    return LabError(f"{folder} is not the model {model.name!r}", why=why, fix=fix)
