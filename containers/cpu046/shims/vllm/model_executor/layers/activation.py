"""Gives `sglang/srt/layers/activation.py` back its own classes.

That module defines them and, without CUDA, ends by importing vLLM's of the same names over them. Here the names are those classes
themselves, so SGLang computes with its own PyTorch code (`forward_native`).
"""

from __future__ import annotations

import sys

NAMES = ("SiluAndMul", "GeluAndMul")

# It is being loaded right now: its last statement is what imports this module.
globals().update({name: getattr(sys.modules["sglang.srt.layers.activation"], name) for name in NAMES})
