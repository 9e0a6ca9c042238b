"""From a stack to its image in the Docker engine: `build_image` stages the build context, runs `docker build` with BuildKit
and returns what came out. Everything that can be known to fail is said before anything starts; the log of a build lies in
the cache, and a build ends with the lab.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lab.errors import LabError
from lab.images.context import Context, Options, check_lock, stage, stage_name
from lab.images.engine import (
    WITHOUT,
    Client,
    base_digest,
    check_engine,
    docker_env,
    find_client,
    free_gb,
    inspect_image,
)
from lab.images.wheels import fetch_wheels
from lab.stack import Stack
from lab.stacks.run import Job, Steps

PROGRESS = re.compile(r"^#\d+ (?:[\d.]+ )?")  # BuildKit's step number and clock
FAILED = re.compile(
    r"^(ERROR: )?executor failed running \[.*?\]: "
)  # then the exit code, or why the engine could not run it
UNTOLD = re.compile(r"^(CACHED|DONE|sha256:|-+$|\s*> |exit code: \d+|\s*$)")


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """An image in the engine: its id (sha256:...), its tag, how long the build took, its size unpacked."""

    id: str
    tag: str
    seconds: float
    size_bytes: int


def image_tag(stack: Stack, *, bare: bool = False) -> str:
    """The name of the stack's image in the engine: a change of the lock gives another one."""
    return f"sglang-lab/{stack.name}:{stack.lock_hash[:12]}{'-bare' if bare else ''}"


class ImageSteps(Steps):
    """Steps that show of BuildKit's output what a person wants to read."""

    def failure(self, step: str, lines: Sequence[str]) -> LabError:
        """What the smoke step found, else the last lines."""
        said = [FAILED.sub("", PROGRESS.sub("", line)) for line in lines]
        smoke = [line for line in dict.fromkeys(said) if line.startswith("SMOKE: ")]
        kept = [line for line in said if not UNTOLD.match(line)]
        error = super().failure(step, smoke or kept)
        if smoke:
            return LabError(
                "the image is not what stack.toml states",
                why=error.why,
                fix=f"correct stack.toml, the lock or the base image\n       log: {self.logs}",
            )
        return error


def build_image(
    stack: Stack,
    *,
    cache: Path,
    say: Callable[[str], None],
    live: Callable[[str], None],
    options: Options | None = None,
    env: Mapping[str, str] | None = None,
) -> BuiltImage:
    """Build the image of `stack` and tag it `image_tag(stack)`; a second build of the same takes seconds.

    `say` is given lasting lines, `live` what goes on right now; `env` is this process's where not given. Raises `LabError` when
    no engine or no client that can build is there, when the lock does not fit, the base image cannot be had or the disk is too
    small, and when the build fails: then with the last of what it said.
    """
    options = options or Options()
    started = time.monotonic()
    child = docker_env(os.environ if env is None else env)
    client = find_client(env=child)
    check_engine(client, env=child)
    tag = image_tag(stack, bare=options.bare)
    _check_disk(stack, tag=tag, client=client, env=child)
    steps = _steps(stack, cache=cache, say=say, live=live, env=child)
    check_lock(stack)
    digest = _have_base(options.base or stack.image.pinned_base, client=client, steps=steps)
    folder = cache / "images" / stack.name
    with _alone(folder, say=say):
        context = stage(
            stack,
            folder=folder,
            wheels=fetch_wheels(stack, cache=cache, steps=steps),
            options=replace(options, base_digest=digest),
        )
        argv = build_argv(context, client=client, target=stage_name(stack), tag=tag)
        steps.run(Job(step="build", argv=argv))
    found = inspect_image(client, tag, env=child)
    if found is None:
        raise LabError(f"the engine does not have {tag} after the build", fix=f"read the log: {steps.logs}")
    size = found["Size"]
    return BuiltImage(
        id=str(found["Id"]),
        tag=tag,
        seconds=round(time.monotonic() - started, 1),
        size_bytes=size if isinstance(size, int) else 0,
    )


@contextmanager
def _alone(folder: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a build context, which another lab may be sending to its engine right now."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another lab is building this image; waiting for it (lock: {lock.lock_file})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_context(
    stack: Stack,
    *,
    folder: Path,
    cache: Path,
    say: Callable[[str], None],
    live: Callable[[str], None],
    options: Options | None = None,
) -> Context:
    """The build context of `stack` in `folder`, with the wheels that pip sees here, for a build by other means than the lab.

    Needs no engine. `LabError` when the lock does not fit, or pip fails otherwise than by not having a wheel.
    """
    check_lock(stack)
    steps = _steps(stack, cache=cache, say=say, live=live, env=docker_env(os.environ))
    wheels = fetch_wheels(stack, cache=cache, steps=steps)
    return stage(stack, folder=folder, wheels=wheels, options=options)


def _steps(
    stack: Stack,
    *,
    cache: Path,
    say: Callable[[str], None],
    live: Callable[[str], None],
    env: Mapping[str, str],
) -> ImageSteps:
    """Steps with a folder of their own for logs."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    parent = cache / "logs"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        logs = Path(tempfile.mkdtemp(prefix=f"image-{stack.name}-{stamp}-", dir=parent))
    except OSError as error:
        raise LabError(
            f"cannot write in {parent}, where the log of a build goes",
            why=str(error),
            fix="make the folder writable and free some space, or set XDG_CACHE_HOME to another one",
        ) from None
    return ImageSteps(say=say, live=live, logs=logs, env=env)


def build_argv(context: Context, *, client: Client, target: str, tag: str) -> tuple[str, ...]:
    """The command that builds the stage `target` of a staged context."""
    return (
        *client.argv,
        *("--progress", "plain", "--target", target, "--tag", tag),
        *(word for key, value in context.args for word in ("--build-arg", f"{key}={value}")),
        *(word for key, value in context.labels for word in ("--label", f"{key}={value}")),
        str(context.folder),
    )


def _check_disk(stack: Stack, *, tag: str, client: Client, env: Mapping[str, str]) -> None:
    free = free_gb(client, env=env)
    if free is None or free >= stack.image.build_gb or inspect_image(client, tag, env=env) is not None:
        return
    raise LabError(
        f"not enough disk for the image of stack {stack.name!r}: {free:.1f} GB free where the engine keeps its images, "
        f"{stack.image.build_gb:.1f} GB needed",
        fix="free some space (docker system df shows what takes it)",
    )


def _have_base(base: str, *, client: Client, steps: Steps) -> str:
    """Get the base image if the engine does not have it; its digest in a registry. `LabError` when it cannot be had."""
    if inspect_image(client, base, env=steps.env) is None:
        try:
            steps.run(Job(step="base", argv=(str(client.path), "pull", base)))
        except LabError as error:
            raise LabError(
                f"the base image {base} cannot be obtained",
                why=error.why,
                fix=f"--base IMAGE takes one that the engine has (docker images), {WITHOUT}",
            ) from None
    digest = base_digest(client, base, env=steps.env)
    if "@sha256:" not in base:
        steps.say(
            f"the base image {base} is not pinned by a digest; this one is {digest or 'of this machine only'}"
        )
    return digest
