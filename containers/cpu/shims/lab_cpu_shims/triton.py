"""Gives SGLang its own stand-in for Triton, the one it carries for Macs, where there is no Triton either.

SGLang's modules import triton and decorate their GPU kernels with it whether a GPU is there or not. On a Mac
`sglang/_platform_stubs.py` then puts an empty triton in place, with which the kernels can be defined but not
run. That file's installer asks whether this is a Mac with Metal; here it is told yes, and what it sets up for
Metal is taken back, so that of its work only the empty triton stays.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

STUBS = Path("sglang", "_platform_stubs.py")
PRIVATE_NAME = "_lab_sglang_platform_stubs"


def stand_in() -> None:
    """Put SGLang's empty triton into `sys.modules`, unless a real triton is installed."""
    if importlib.util.find_spec("triton") is None:
        _install_as_on_a_mac(_load_stubs())


def _load_stubs() -> ModuleType:
    """SGLang's module, loaded by path: importing `sglang` itself would need triton already."""
    for folder in sys.path:
        path = Path(folder or ".", STUBS)
        if path.is_file():
            break
    else:
        raise ImportError(
            f"{STUBS} is not on the path: this shim was written for SGLang 0.5.21, which has it"
        )
    spec = importlib.util.spec_from_file_location(PRIVATE_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PRIVATE_NAME] = module  # its dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _install_as_on_a_mac(stubs: ModuleType) -> None:
    """Run the stubs' installer as if on a Mac with Metal, and keep only the triton part of what it does."""
    import torch

    stubs.sys = SimpleNamespace(platform="darwin", modules=sys.modules, meta_path=sys.meta_path)
    stubs.platform = SimpleNamespace(machine=lambda: "arm64")
    stubs._patch_non_blocking = lambda: None  # it would wrap Tensor.to and Tensor.copy_
    metal_before = set(vars(torch.mps))
    is_available = torch.backends.mps.is_available
    torch.backends.mps.is_available = lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        torch.backends.mps.is_available = is_available
        for name in set(vars(torch.mps)) - metal_before:
            delattr(torch.mps, name)
