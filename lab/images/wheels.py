"""Wheels for a build context that are fetched on this machine, with the pip that is set up here: an index or a folder of
wheels that pip knows (pip.conf, PIP_FIND_LINKS) need not be visible inside a build. A stack goes in, paths in the cache come
out; what the index does not have is left to uv inside the build.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lab.errors import LabError
from lab.stack import Stack
from lab.stacks.lock import normal_name, read_lock
from lab.stacks.python import find_python
from lab.stacks.run import Job, Steps


def fetch_wheels(stack: Stack, *, cache: Path, steps: Steps) -> tuple[Path, ...]:
    """The wheels that stack.toml's `wheelhouse` names, fetched once into `cache`; empty when pip's index lacks them.

    Runs in `steps`; `LabError` when pip fails in another way.
    """
    names = {normal_name(name) for name in stack.image.wheelhouse}
    text = "".join(pin.text for pin in read_lock(stack.lock) if pin.name in names)
    if not text:
        return ()
    folder = cache / "wheels" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not folder.is_dir():
        _download(stack, text, folder=folder, steps=steps)
    return tuple(sorted(folder.glob("*.whl")))


def _download(stack: Stack, text: str, *, folder: Path, steps: Steps) -> None:
    aside = folder.with_name(f".fetching-{os.getpid()}-{folder.name}")
    try:
        with steps.step("prepare"):
            aside.mkdir(parents=True)
            (aside / "lock.txt").write_text(text, encoding="utf-8")
            python = find_python(stack.python, env=steps.env)
        steps.run(Job(step="wheels", argv=_pip(python.path, aside), retry=_none_there(steps.say)))
        with steps.step("keep"):
            if any(aside.glob("*.whl")) and not folder.is_dir():  # another lab may have been quicker
                aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _pip(python: Path, folder: Path) -> tuple[str, ...]:
    """The lab's own pip, run by a Python of the stack's version, so that it takes the wheels for that one."""
    pip = importlib.util.find_spec("pip")
    if pip is None or pip.origin is None:
        raise LabError(
            "the lab's environment has no pip", fix="python -m ensurepip, or install the lab again"
        )
    return (
        *(str(python), "-I", str(Path(pip.origin).with_name("__pip-runner__.py")), "download", "--no-deps"),
        *("--require-hashes", "--only-binary", ":all:", "--progress-bar", "off", "--dest", str(folder)),
        *("--requirement", str(folder / "lock.txt")),
    )


def _none_there(say: Callable[[str], None]) -> Callable[[str], tuple[str, ...] | None]:
    """When pip's index does not have the package, and only then, go on without."""

    def retry(log: str) -> tuple[str, ...] | None:
        if "No matching distribution found" not in log:
            return None
        say("the index that pip is set up with does not have it; uv asks its own inside the build")
        return ("true",)

    return retry
