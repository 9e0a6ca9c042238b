"""The stacks for CPUs themselves for tests, built once into the user's own cache, where the lab finds them too."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import parts

from lab import places
from lab.errors import LabError
from lab.stack import Stack, load_stack
from lab.stacks.build import ensure

UNSET = ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE", "UV_OFFLINE")
AS_STARTED = {key: os.environ[key] for key in UNSET if key in os.environ}  # before any test changed them


@cache
def _built(name: str) -> tuple[Stack, Path] | LabError:
    changed = {key: os.environ.pop(key) for key in UNSET if key in os.environ}
    os.environ.update(AS_STARTED)
    try:
        stack = load_stack(name, root=places.ROOT)
        return stack, ensure(stack, cache=places.cache(), say=print)
    except LabError as error:
        return error
    finally:
        for key in UNSET:
            os.environ.pop(key, None)
        os.environ.update(changed)


def real_stack(name: str = "cpu") -> tuple[Stack, Path]:
    """The stack and its folder; the test is skipped, or fails, where it cannot be built."""
    built = _built(name)
    if isinstance(built, LabError):
        parts.need(False, f"the {name} stack: {built}")
        raise AssertionError("need() must not return")
    return built
