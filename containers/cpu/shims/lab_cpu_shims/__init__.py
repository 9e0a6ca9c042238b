"""What lets SGLang's wheel, built for GPUs, start in a Python that has no CUDA package.

`lab_cpu_shims.pth` calls `install()` when any Python of the stack starts, so the processes that the server
spawns get it too. Nothing is imported or changed at that moment: each shim waits until the package it
concerns is first looked for. The third stand-in, the package `sgl_kernel`, lies beside this one.
containers/cpu/README.md explains all three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec


class BeforeFirstImport:
    """A finder that finds nothing: it runs `action` when `package` is first looked for, and goes away."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self.package = package
        self.action = action

    def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if fullname == self.package:
            sys.meta_path.remove(self)  # first, since the action may itself look for the package
            self.action()
        return None


def _before_sglang() -> None:
    from lab_cpu_shims import triton

    triton.stand_in()


def _before_torchvision() -> None:
    from lab_cpu_shims import torchvision

    torchvision.declare_operators()


_installed = False


def install() -> None:
    """Set the two waiting shims up; light, since every start of Python pays for it."""
    global _installed
    if _installed:  # Python reads the .pth files of a virtual environment twice
        return
    _installed = True
    sys.meta_path.insert(0, BeforeFirstImport("sglang", _before_sglang))
    sys.meta_path.insert(0, BeforeFirstImport("torchvision", _before_torchvision))
