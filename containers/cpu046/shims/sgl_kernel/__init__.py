"""Stands in for SGLang's compiled kernel package, which is published for CUDA only.

`sglang/srt/_custom_ops.py` reads one name from it as it loads, `allreduce`, the all-reduce between GPUs. Here that is a
namespace with nothing in it: whoever asks it for a function gets an AttributeError. What else SGLang imports from this
package, it imports where there is CUDA, or in modules that a Llama on this stack does not load.
"""

from __future__ import annotations

from types import SimpleNamespace

__version__ = "0.0.0+lab.cpu.shim"

NAMES = ("allreduce",)

allreduce = SimpleNamespace()
