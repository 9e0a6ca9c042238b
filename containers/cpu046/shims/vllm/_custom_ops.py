"""Two of vLLM's compiled kernels, which SGLang imports and does not call on a CPU: each raises when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

NAMES = ("rotary_embedding", "scaled_fp8_quant")


def _missing(name: str) -> Callable[..., NoReturn]:
    def kernel(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"vllm._custom_ops.{name} is a compiled kernel that this CPU stack does not have; "
            "the lab's stand-in only lets SGLang's modules be imported"
        )

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


globals().update({name: _missing(name) for name in NAMES})
