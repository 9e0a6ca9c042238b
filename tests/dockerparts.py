"""The engine, a base image and the cpu image for tests: made when absent, kept for the next test run.

A test that calls one of these is skipped, or fails with `--require-parts`, where it cannot be had.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

import baseimage
import parts

from lab import places
from lab.errors import LabError
from lab.images.build import build_image
from lab.images.context import Options
from lab.images.engine import Client, check_engine, docker_env, find_client, inspect_image
from lab.stack import load_stack

ENV = docker_env(os.environ)


@cache
def _client() -> Client | LabError:
    try:
        client = find_client(env=ENV)
        check_engine(client, env=ENV)
    except LabError as error:
        return error
    return client


def engine() -> Client:
    """A docker client that can build, with an engine that answers."""
    client = _client()
    if isinstance(client, LabError):
        parts.need(False, f"Docker: {client}")
        raise AssertionError("need() must not return")
    return client


@cache
def base_image() -> str:
    """A small Debian with Python, cut out of this machine's own packages; its tag."""
    client = engine()
    if inspect_image(client, baseimage.TAG, env=ENV) is None:
        parts.need(
            shutil.which("dpkg-query") is not None, "a base image is made of this machine's Debian packages"
        )
        baseimage.make()
    return baseimage.TAG


@cache
def _cpu_image() -> str | LabError:
    try:
        stack = load_stack("cpu", root=places.ROOT)
        built = build_image(
            stack, cache=places.cache(), say=print, live=lambda _: None, options=Options(base=base_image())
        )
    except LabError as error:
        return error
    return built.tag


def cpu_image() -> str:
    """The cpu stack's image; its tag. A build takes a minute, and a third of a second where nothing changed."""
    engine()
    built = _cpu_image()
    if isinstance(built, LabError):
        parts.need(False, f"the cpu image: {built}")
        raise AssertionError("need() must not return")
    return built


def docker(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the docker client."""
    argv = (str(engine().path), *words)
    return subprocess.run(argv, env=ENV, capture_output=True, text=True, check=check)
