"""Stands in for SGLang's compiled kernel package, of which there is no published build for CPUs.

With SGLANG_USE_CPU_ENGINE=1 some of SGLang's modules import the names below as they load, whether or not they
will be used. All belong to speculative decoding or to the Intel AMX attention backend, which this stack does
not offer; here each raises when it is called. A Llama-like model on the torch_native attention backend calls
none of them: its maths is SGLang's own PyTorch code.

`torch.ops.sgl_kernel.convert_weight_packed` must not come into being: SGLang takes it as the sign that its
AMX kernels are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0+lab.cpu.shim"

NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _missing(name: str) -> Callable[..., NoReturn]:
    def kernel(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is a compiled kernel that this CPU stack does not have; "
            "the lab's stand-in only lets SGLang's modules be imported"
        )

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


globals().update({name: _missing(name) for name in NAMES})
