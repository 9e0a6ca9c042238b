"""Where a model's files come from: `locate` turns `--weights` into a `Weights` (which kind, which folder, which sum) without
refusing anything that may still be missing, `require` refuses it, and `ensure_weights` makes what the lab makes itself. The
lab downloads nothing, and reads no access token."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from lab.dummymodel import dummy_files, dummy_sha256
from lab.errors import LabError
from lab.modelcheck import check_folder, fingerprint
from lab.modelfiles import Builder, ensure_model
from lab.models import Model, get_model, parameters

Kind = Literal["built", "local", "cache", "dummy"]

NO_DOWNLOAD = "the lab downloads no weights by itself"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's files. `kind` is "built" (made by the lab), "local" (a folder somebody named), "cache" (the Hugging Face cache
    of this account) or "dummy" (shapes and a tokenizer; the server draws the weights). `folder` may not be there yet;
    `sha256` is empty then."""

    kind: Kind
    folder: Path
    sha256: str
    reason: str


def hub_cache(env: Mapping[str, str], *, home: Path | None = None) -> Path:
    """The Hugging Face cache, by the variables of its own tools."""
    usual = Path(env.get("XDG_CACHE_HOME") or (home or Path.home()) / ".cache") / "huggingface"
    return Path(env.get("HF_HUB_CACHE") or Path(env.get("HF_HOME") or usual) / "hub").expanduser()


def snapshots(model: Model, *, hub: Path) -> Path:
    """The folder of a model's snapshots in the cache, one a revision."""
    return hub / f"models--{model.repository.replace('/', '--')}" / "snapshots"


def locate(model: Model, *, asked: str, cache: Path, hub: Path) -> Weights:
    """The weights that `--weights` names: "" and "cache", "dummy", or a path. `LabError` for the model that has no choice."""
    if model.source == "built":
        if asked:
            raise LabError(
                f"--weights {asked}: the model {model.name!r} has no other weights than its own",
                why="the lab makes them on this machine",
                fix="leave --weights out, or name another --model",
            )
        folder = cache / "models" / f"{model.name}-{model.sha256[:12]}"
        return Weights(kind="built", folder=folder, sha256=model.sha256, reason="made by the lab")
    if asked == "dummy":
        digest = dummy_sha256(model)
        folder = cache / "models" / f"{model.name}-dummy-{digest[:12]}"
        why = "dummy weights: the architecture and its speed are real, the text means nothing"
        return Weights(kind="dummy", folder=folder, sha256=digest, reason=why)
    if asked in ("", "cache"):
        folder = snapshots(model, hub=hub) / (model.revision or _main(model, hub=hub))
        why = f"in the Hugging Face cache, revision {model.pinned}"
        return Weights(kind="cache", folder=folder, sha256=fingerprint(folder), reason=why)
    try:
        folder = Path(asked).expanduser().absolute()
        folder.is_dir()
        return Weights(kind="local", folder=folder, sha256=fingerprint(folder), reason=f"in {folder}")
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long or in a closed folder, no such user, a byte that no name has.
        raise _unreadable(asked[:200], error) from error


def require(model: Model, weights: Weights) -> None:
    """Raise `LabError` when the weights are neither there nor made by the lab, with how to get them."""
    try:
        _require(model, weights)
    except OSError as error:
        raise _unreadable(str(weights.folder), error) from error


def _unreadable(folder: str, error: Exception) -> LabError:
    return LabError(
        f"no weights can be read from {folder}",
        why=str(error)[:200],
        fix="name a folder that you may read with --weights, or use --weights dummy",
    )


def _require(model: Model, weights: Weights) -> None:
    if weights.kind == "local":
        check_folder(model, folder=weights.folder)
    if weights.kind != "cache":
        return
    if (weights.folder / "config.json").exists():
        check_folder(model, folder=weights.folder)
        return
    # Some repositories hold the same weights a second time, in their maker's own format.
    fetch = f"hf download {model.repository}{f' --revision {model.revision}' if model.revision else ''}"
    fetch += " --exclude 'original/*' 'consolidated*'"
    others = _others(weights.folder)
    if others:
        raise LabError(
            f"the weights of {model.name!r} are in the Hugging Face cache in another revision only",
            why=f"there is {others[0]}; the catalogue has {model.pinned}, and {NO_DOWNLOAD}",
            fix=f"{fetch}, or take the other with --weights {weights.folder.parent / others[0]}, or --weights dummy",
        )
    page = f"the page of {model.repository}"
    ask = {
        True: f"ask for access on {page}, log in (hf auth login), ",
        False: "",
        None: f"log in (hf auth login) where {page} asks for it, ",
    }[model.gated]
    gated = "it is gated, so its owner must give your account access first; " if model.gated else ""
    raise LabError(
        f"the weights of {model.name!r} ({model.repository}) are not in the Hugging Face cache",
        why=f"{gated}{NO_DOWNLOAD}; looked for {weights.folder}",
        fix=f"{ask}then: {fetch}; or name a folder with --weights; or serve the same shapes with --weights dummy",
    )


def ensure_weights(
    model: Model, weights: Weights, *, cache: Path, builder: Builder, say: Callable[[str], None]
) -> Path:
    """The folder with the model's files, made where the lab makes them, checked in any case."""
    if weights.kind == "built":
        return ensure_model(model, cache=cache, builder=builder, say=say)
    if weights.kind == "dummy":
        nano = ensure_model(get_model("nano"), cache=cache, builder=builder, say=say)
        tokenizer = (nano / "tokenizer.json").read_text(encoding="utf-8")
        files = dummy_files(model, nano_tokenizer=tokenizer)
        try:
            return _written(weights.folder, files=files, say=say)
        except OSError as error:
            raise LabError(
                f"the shapes of {model.name!r} cannot be written to {weights.folder}",
                why=str(error),
                fix="make room there, or give the lab another cache folder that you may write to",
            ) from error
    require(model, weights)
    return weights.folder


def container_folder(model: Model, weights: Weights, *, cache: Path) -> Path:
    """The folder as a container can use it, which sees that folder alone.

    The Hugging Face cache holds symbolic links to files beside the folder. They lead nowhere inside a container, so
    the files get a second name (a hard link) in a folder of the lab's cache. `LabError` on another file system.
    """
    folder = weights.folder
    if weights.kind not in ("cache", "local") or not _leads_out(folder):
        return folder
    twin = cache / "models" / f"{model.name}-linked-{weights.sha256[:12]}"
    if twin.is_dir():
        return twin
    aside = twin.with_name(f".{twin.name}.linking")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file():
                os.link(file.resolve(), aside / file.name)
        aside.rename(twin)
    except OSError as error:
        raise LabError(
            f"a container cannot be given the weights in {folder}",
            why=f"they are links to files elsewhere, and {cache} cannot hold those files too ({error.strerror})",
            fix=f"hf download {model.repository} --local-dir FOLDER, then --weights FOLDER; or --runtime process",
        ) from error
    return twin


def about(model: Model, weights: Weights) -> dict[str, object]:
    """What environment.json says of the model."""
    return {
        "name": model.name,
        "repository": model.repository,
        "revision": model.revision,
        "licence": model.licence,
        "parameters": parameters(model),
        "weights": weights.kind,
        "sha256": weights.sha256,
    }


def _leads_out(folder: Path) -> bool:
    return folder.is_dir() and any(
        file.is_symlink() and folder.resolve() not in file.resolve().parents for file in folder.iterdir()
    )


def _written(folder: Path, *, files: Mapping[str, bytes], say: Callable[[str], None]) -> Path:
    """`folder` with exactly these files; written aside first, so that an interrupted one is never taken for it."""
    if _holds(folder, files=files):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _holds(folder, files=files):
            return folder
        say(f"writing {folder.name}: shapes and tokenizer, no weights")
        aside = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, content in files.items():
            (aside / name).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)  # one that was changed: it holds nothing but these files
        aside.rename(folder)
    return folder


def _holds(folder: Path, *, files: Mapping[str, bytes]) -> bool:
    if not folder.is_dir() or {file.name for file in folder.iterdir()} != set(files):
        return False
    return all((folder / name).read_bytes() == content for name, content in files.items())


def _main(model: Model, *, hub: Path) -> str:
    """The commit that the cache calls main, for a model whose revision is not pinned."""
    try:
        return (snapshots(model, hub=hub).parent / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return "main"


def _others(folder: Path) -> list[str]:
    """Other revisions in the cache that look complete."""
    beside = folder.parent.glob("*/config.json") if folder.parent.is_dir() else ()
    return sorted(config.parent.name for config in beside)
