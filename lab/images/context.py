"""The build context of a stack's image: a folder with the Dockerfile, the stack's lock in three parts, shims, uv, the
wheels that only this machine's pip can see, what the smoke step compares with (stack.json), and the build arguments and
labels. The same stack gives the same files, byte by byte. Nothing is built here; BuildKit gets the folder from `images.build`, or
from a workflow or a person, with args.txt and labels.txt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import uv

from lab import places
from lab.errors import LabError
from lab.stack import Stack, shim_files
from lab.stacks.lock import Pin, drift, normal_name, read_lock, read_names

# The packages that make nearly all of an image's size, and change rarely.
LARGE = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|sgl-kernel|sglang-kernel|flashinfer-cubin)$")
TORCH_BACKEND = {"cpu": "cpu"}  # device of a stack -> the name uv has for PyTorch's index of that device
IMAGE_FILES = Path("containers", "image")


@dataclass(frozen=True, kw_only=True)
class Context:
    """A staged folder, with the arguments and labels for building from it."""

    folder: Path
    args: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a site may want otherwise: another base image, a mirror, an image without CUDA toolkit and profilers (`bare`).

    `base_digest` is that of a base image that is given without one, where it is known.
    """

    base: str = ""
    base_digest: str = ""
    index_url: str = ""
    bare: bool = False


def stage(
    stack: Stack, *, folder: Path, wheels: Iterable[Path] = (), options: Options | None = None
) -> Context:
    """Make `folder` the build context of `stack`, with these wheel files; `LabError` when the lock does not fit.

    Files that are as they should be are left alone, others are replaced, and what does not belong is removed.
    """
    options = options or Options()
    check_lock(stack)
    found = sorted(wheels)
    context = Context(
        folder=folder,
        args=build_args(stack, options=options, wheels=found),
        labels=labels(stack, options=options),
    )
    texts = _texts(stack, context=context, options=options)
    copies = _copies(stack, wheels=found)
    try:
        for sub in ("wheels", "shims", "image"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        for file in [file for file in folder.rglob("*") if not file.is_dir()]:
            if file.relative_to(folder).as_posix() not in texts | copies:
                file.unlink()
        for name, text in texts.items():
            _write(folder / name, text)
        for name, source in copies.items():
            _copy(source, folder / name)
    except OSError as error:
        raise LabError(
            f"cannot write the build context in {folder}",
            why=str(error),
            fix="free some space or make the folder writable",
        ) from None
    return context


def check_lock(stack: Stack) -> None:
    """`LabError` when the stack's lock is not what would be made from its input."""
    reasons = drift(stack)
    if reasons:
        raise LabError(
            f"the lock of stack {stack.name!r} does not fit its input",
            why="\n       ".join(reasons),
            fix=f"invoke image.lock --stack {stack.name}",
        )


def build_args(stack: Stack, *, options: Options, wheels: Iterable[Path]) -> tuple[tuple[str, str], ...]:
    """The build's arguments, sorted; empty ones are left out."""
    backend = TORCH_BACKEND.get(stack.device, "")
    if any(normal_name(file.name.partition("-")[0]) == "torch" for file in wheels):
        backend = ""  # uv need not look for it
    values = {
        "BASE": options.base or stack.image.pinned_base,
        "PYTHON": stack.image.python,
        "PACKAGES": "" if options.bare else " ".join(stack.image.packages),
        "SOURCE_DATE_EPOCH": str(epoch(stack)),
        "TORCH_BACKEND": backend,
        "INDEX_URL": options.index_url,
    }
    return tuple(sorted((key, value) for key, value in values.items() if value))


def labels(stack: Stack, *, options: Options) -> tuple[tuple[str, str], ...]:
    """The image's labels, sorted: what stack.toml states, which the smoke step has compared with what is there."""
    image = stack.image
    base, _, digest = (options.base or image.pinned_base).partition("@")
    stated = _stated(stack, bare=options.bare)
    values = {
        "org.opencontainers.image.title": f"sglang-lab {stack.name}",
        "org.opencontainers.image.description": stack.description,
        "org.opencontainers.image.version": f"{stack.sglang}-{stack.lock_hash[:12]}",
        "org.opencontainers.image.created": f"{image.date}T00:00:00Z",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": base,
        "org.opencontainers.image.base.digest": digest or options.base_digest,
        "lab.stack": stack.name,
        "lab.stack.lock": stack.lock_hash,
        "lab.base": options.base or image.pinned_base,
        "lab.sglang": stack.sglang,
        "lab.torch": stack.torch,
        "lab.torch.cuda": stated["torch_cuda"],
        "lab.cuda.toolkit": stated["cuda_toolkit"],
        "lab.nsys": stated["nsys"],
        "lab.ncu": stated["ncu"],
    }
    return tuple(sorted(values.items()))


def stage_name(stack: Stack) -> str:
    """The stage of the Dockerfile that makes the stack's image: its own, else that of its device."""
    text = (places.ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)$", text)
    return stack.name if stack.name in stages else stack.device


def epoch(stack: Stack) -> int:
    """SOURCE_DATE_EPOCH of the stack's image: its date at midnight UTC, in seconds since 1970."""
    return int(datetime.fromisoformat(stack.image.date).replace(tzinfo=UTC).timestamp())


def split_lock(stack: Stack) -> dict[str, tuple[Pin, ...]]:
    """The lock's pins by the file they are installed from: large wheels, the other wheels, published as source."""
    parts: dict[str, list[Pin]] = {"torch.txt": [], "packages.txt": [], "source.txt": []}
    source = {normal_name(name) for name in stack.image.source}
    for pin in read_lock(stack.lock):
        large = "torch.txt" if LARGE.match(pin.name) else "packages.txt"
        parts["source.txt" if pin.name in source else large].append(pin)
    return {name: tuple(pins) for name, pins in parts.items()}


def _stated(stack: Stack, *, bare: bool) -> dict[str, str]:
    """The versions that the smoke step has to find; "" for what must not be there."""
    image = stack.image
    return {
        "python": stack.python,
        "sglang": stack.sglang,
        "torch": stack.torch,
        "torch_cuda": image.torch_cuda,
        "cuda_toolkit": "" if bare else image.cuda_toolkit,
        "nsys": "" if bare else image.nsys,
        "ncu": "" if bare else image.ncu,
    }


def _texts(stack: Stack, *, context: Context, options: Options) -> dict[str, str]:
    """The files that are made, by their name in the folder."""
    parts = split_lock(stack)
    stated = {
        "stack": stack.name,
        "lock": stack.lock_hash,
        **_stated(stack, bare=options.bare),
        "env": {key: value.replace("${STACK}", "/opt/stack") for key, value in stack.env},
        "imports": stack.imports,
        "command": stack.command,
        "server_args": (*stack.server_args, *stack.observe_args),
        "excludes": [normal_name(name) for name in read_names(stack.excludes)],
        "packages": {pin.name: pin.version for pins in parts.values() for pin in pins},
    }
    return {
        **{name: "".join(pin.text for pin in pins) for name, pins in parts.items()},
        "stack.json": json.dumps(stated, indent=1, sort_keys=True) + "\n",
        "args.txt": "".join(f"{key}={value}\n" for key, value in context.args),
        "labels.txt": "".join(f"{key}={value}\n" for key, value in context.labels),
    }


def _copies(stack: Stack, *, wheels: Iterable[Path]) -> dict[str, Path]:
    """The files that are copied, by their name in the folder."""
    scripts = places.ROOT / IMAGE_FILES
    return {
        "Dockerfile": places.ROOT / "Dockerfile",
        "uv": Path(uv.find_uv_bin()),
        **{f"image/{name}": scripts / name for name in ("steps.sh", "smoke.py")},
        **{f"shims/{file.relative_to(stack.shims).as_posix()}": file for file in shim_files(stack.folder)},
        **{f"wheels/{file.name}": file for file in wheels},
    }


def _write(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """A copy with the source's time, by which the next staging sees that nothing changed."""
    if target.is_file():
        old, new = target.stat(), source.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    # a build must not depend on this user's umask
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
