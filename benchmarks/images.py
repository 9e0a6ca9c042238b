"""The cpu image: its size and its layers, and how long building it again takes when nothing changed (limit: 5 s)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dockerparts import base_image, cpu_image

from lab import places
from lab.images.build import build_image
from lab.images.context import Options
from lab.images.engine import docker_env, find_client, layers
from lab.stack import load_stack


def main() -> None:
    tag = cpu_image()
    stack = load_stack("cpu", root=ROOT)
    options = Options(base=base_image())
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        built = build_image(
            stack, cache=places.cache(), say=lambda _: None, live=lambda _: None, options=options
        )
        taken.append(time.perf_counter() - start)
    print(f"{tag}: {built.size_bytes / 1e9:.2f} GB; built again {', '.join(f'{s:.2f} s' for s in taken)}")
    env = docker_env(os.environ)
    for size, origin in layers(find_client(env=env), tag, env=env):
        print(f"  {size:>8}  {origin.partition(' # ')[0][-90:]}")
    assert max(taken) < 5, "a rebuild with nothing changed took longer than 5 s"


if __name__ == "__main__":
    main()
