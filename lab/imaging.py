"""What the command line does with images: build, list, lint and measure, lock, stage. Each function is one task of tasks.py
and returns the exit code."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from lab import places
from lab.choice import fitting_stack
from lab.errors import LabError
from lab.hardware.detect import detect
from lab.images.build import build_image, image_tag, make_context
from lab.images.check import check_image, lint
from lab.images.context import Options
from lab.images.engine import check_engine, docker_env, find_client, list_images
from lab.progress import Progress
from lab.stack import Stack, all_stacks, load_stack
from lab.stacks.lock import write_lock


def chosen(name: str) -> Stack:
    """The stack of that name; without one, the stack that fits this machine."""
    if not name:
        name, reason = fitting_stack(detect(), stacks=all_stacks(places.ROOT))
        print(f"stack {name}: {reason}")
    return load_stack(name, root=places.ROOT)


def build(name: str, *, base: str, bare: bool, index_url: str) -> int:
    """Build a stack's image."""
    stack = chosen(name)
    options = Options(base=base, bare=bare, index_url=index_url)
    with Progress() as progress:
        built = build_image(
            stack, cache=places.cache(), say=progress.step, live=progress.live, options=options
        )
    print(f"{built.tag}  {built.size_bytes / 1e9:.2f} GB  {built.id}  in {built.seconds:.0f} s")
    return 0


def images() -> int:
    """Print the lab's images in the engine, with the versions that were measured in them."""
    env = docker_env(os.environ)
    client = find_client(env=env)
    check_engine(client, env=env)
    found = list_images(client, env=env)
    table = Table(
        Column("image", overflow="fold"),
        "of today's lock",
        "size",
        "SGLang",
        "torch",
        "CUDA",
        "nsys",
        "ncu",
        "base",
    )
    today = {image_tag(stack) for stack in all_stacks(places.ROOT)}
    for image in found:
        label = image.labels.get
        table.add_row(
            "\n".join(image.tags) or image.id[:19],
            "yes" if today & set(image.tags) else "no",
            f"{image.size_bytes / 1e9:.2f} GB",
            *(
                label(f"lab.{key}") or "-"
                for key in ("sglang", "torch", "cuda.toolkit", "nsys", "ncu", "base")
            ),
        )
    Console().print(table if found else "no image of the lab yet; invoke image.build makes one")
    return 0


def check(name: str) -> int:
    """Lint the Dockerfile and measure in the stack's image."""
    if not name:
        lint(say=print)
        return 0
    check_image(load_stack(name, root=places.ROOT), say=print)
    return 0


def lock(name: str, *, newest: str) -> int:
    """Make a stack's lock anew, from files published before a date (default: the one in stack.toml)."""
    stack = load_stack(name or "cpu", root=places.ROOT)
    try:
        day = date.fromisoformat(newest or stack.image.date)
    except ValueError:
        raise LabError(
            f"--date {newest} is not a date",
            why="files published before it are taken",
            fix="--date 2026-11-20",
        ) from None
    write_lock(stack, newest=day, say=print)
    return 0


def context(name: str, *, out: str) -> int:
    """Leave a stack's build context in a folder, for a build by other means."""
    if not out:
        raise LabError("--out is missing", why="the context is a folder", fix="--out FOLDER")
    folder = Path(out).resolve()
    ours = all((folder / name).is_file() for name in ("Dockerfile", "args.txt", "labels.txt", "stack.json"))
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(
            f"{folder} is something else already",
            why="a build context is made whole, and what does not belong to it is removed",
            fix="name a new folder",
        )
    with Progress() as progress:
        made = make_context(
            chosen(name), folder=folder, cache=places.cache(), say=progress.step, live=progress.live
        )
    print(f"build context of {len(made.args)} arguments and {len(made.labels)} labels: {made.folder}")
    return 0
