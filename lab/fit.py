"""Whether a model fits into the memory that a server will have: in go the model, the server's arguments and the memory, out
comes a `Fit` with the arithmetic in words. Pure. The rules are SGLang's own: how weights and KV heads are divided over ranks
(`models.parameters`), and which share of a GPU they may take (`--mem-fraction-static`, by default a share that each release
works out from the size of the GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lab.dialect import Dialect
from lab.models import BYTES, Model, kv_bytes_per_token, parameters
from lab.seats import tensor_parallel

GIB = 2**30
CONTEXT_GIB = 1.0
"""What the CUDA context, NCCL and the driver keep of a GPU before SGLang measures what is free. Seen in logs of SGLang on GPUs
with 81,559 MiB: 0.8 to 1.2 GiB (`Load weight begin. avail mem=78.81 GB`, `78.43 GB`)."""

EIGHT_BIT = ("fp8_e5m2", "fp8_e4m3")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a server of one variant fits. `tokens` are those that the KV cache will hold, and `words` is the arithmetic;
    `refusal` says why the server cannot be started, empty when it can."""

    tokens: int
    words: str
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where the server runs: the smallest of its GPUs, or the machine (`gpu` is "" then). None where nobody knows.

    `base_gib` is what the server's processes take beside model and cache, on a machine without GPU.
    """

    mib: int | None
    gpu: str = ""
    base_gib: float = 0.0


def fit(model: Model, argv: Sequence[str], *, memory: Memory, dialect: Dialect, longest: int) -> Fit:
    """How the model fits with these server arguments; `longest` is the tokens of the longest request, answer included."""
    tp = tensor_parallel(argv)
    undivided = cannot_divide(model, tp=tp)
    if undivided:
        return Fit(tokens=0, words=undivided, refusal=undivided)
    given = dict(pairwise(argv))
    number = BYTES.get(given.get("--dtype", ""), BYTES[model.dtype])
    cell_number = 1 if given.get("--kv-cache-dtype") in EIGHT_BIT else number
    cell = kv_bytes_per_token(model, tp=tp, number_bytes=cell_number)
    weights = parameters(model, tp=tp) * number / GIB
    asked = _whole(given.get("--max-total-tokens", ""))
    first = _weight_words(model, tp=tp, number=number)
    if memory.mib is None:
        return Fit(tokens=asked or 0, words=f"{first}; how much memory there is, is not known: not checked")
    if memory.gpu:
        budget, second = _gpu_budget(memory, given, tp=tp, dialect=dialect, argv=argv)
    else:
        budget = (memory.mib / 1024 - memory.base_gib) / tp
        ranks = f" / {tp} ranks" if tp > 1 else ""
        second = (
            f"this machine has {memory.mib / 1024:.1f} GiB - {memory.base_gib:.1f} for the programs{ranks}"
        )
    if not memory.gpu and budget <= 0:  # refused with the stack's own words before anything starts
        return Fit(
            tokens=asked or 0, words=f"{first}; the machine has less memory than the stack itself needs"
        )
    room = int((budget - weights) * GIB // cell)
    tokens = min(room, asked) if asked else room
    per_token = f"{cell / 1024:g} KiB a token"
    copied = f", its {model.kv_heads} KV heads are copied on {tp} ranks" if tp > model.kv_heads else ""
    rest = budget - weights
    third = f"{budget:.1f} - {weights:.1f} = {rest:.1f} GiB for the KV cache{copied}, {per_token}"
    pool = f", {asked:,} asked for" if asked else ""
    words = f"{first}; {second} = {budget:.1f} GiB; {third}: {max(room, 0):,} tokens{pool}"
    if room <= 0:
        place = "a GPU" if memory.gpu else "the memory"
        small = f"{weights:.1f} GiB of weights leave nothing for the KV cache"
        return Fit(
            tokens=0, words=words, refusal=f"{small} in the {budget:.1f} GiB of {place} that they may take"
        )
    return Fit(tokens=tokens, words=words, refusal=_refusal(model, room, asked=asked, longest=longest))


def cannot_divide(model: Model, *, tp: int) -> str:
    """Why `tp` ranks cannot share the model, in words; empty when they can.

    The conditions of SGLang's layers: heads and the feed forward part are cut into equal parts, KV heads too or each is
    copied on as many ranks, and so is the vocabulary, after padding to a multiple of 64.
    """
    if tp < 1:
        return f"a server has at least 1 rank, not {tp}"
    padded = -(-model.vocab // 64) * 64
    parts = {"attention heads": model.heads, "rows of the feed forward part": model.intermediate}
    parts["entries of the vocabulary"] = padded
    for what, count in parts.items():
        if count % tp:
            return f"{model.name} has {count:,} {what}, which {tp} tensor-parallel ranks cannot share equally"
    if model.kv_heads % tp and tp % model.kv_heads:
        return (
            f"{model.name} has {model.kv_heads} KV heads, which {tp} ranks can neither share nor copy equally"
        )
    return ""


def static_share(given: dict[str, str], *, mib: int, tp: int, dialect: Dialect, graphs: bool) -> float:
    """The share of a GPU that weights and KV cache may take (0..1): what was asked for, or the release's own rule.

    0.4.6.post5 (`server_args.py`, `__post_init__`) has a table by ranks, 0.5.21 (`arg_groups/memory_hook.py`) subtracts what
    a chunk of prefill and the CUDA graphs need. Both are for GPUs of more than 60 GiB here; on smaller ones 0.5.21 takes
    smaller chunks and graphs.
    """
    asked = given.get("--mem-fraction-static", "")
    if asked:
        return float(asked)
    if dialect.static_share == "table":
        share = next(
            share for ranks, share in ((16, 0.79), (8, 0.81), (4, 0.85), (2, 0.87), (1, 0.88)) if tp >= ranks
        )
        if mib <= 81_920:
            return share
        if mib <= 96 * 1024:
            return 0.88
        return min(0.88 + 48 * 1024 * 0.12 / mib, (mib - 18 * 1024) / mib)
    chunk, most = _capacity(mib, tp=tp)
    chunk = _whole(given.get("--chunked-prefill-size", "")) or chunk
    most = _whole(given.get("--cuda-graph-max-bs", "")) or most
    reserved = 512 + max(chunk, 2048) * 1.5 + tp / 8 * 1024
    if graphs:
        reserved += (
            most * 2 + _prefill_graphs(min(chunk, _whole(given.get("--max-total-tokens", "")) or chunk)) * 8
        )
    return round((mib - max(reserved, 10 * 1024 if mib > 60 * 1024 else 0)) / mib, 3)


def _gpu_budget(
    memory: Memory, given: dict[str, str], *, tp: int, dialect: Dialect, argv: Sequence[str]
) -> tuple[float, str]:
    """GiB for weights and KV cache on one GPU, and how they come about."""
    mib = memory.mib or 0
    graphs = "--disable-cuda-graph" not in argv
    share = static_share(given, mib=mib, tp=tp, dialect=dialect, graphs=graphs)
    why = "--mem-fraction-static" if "--mem-fraction-static" in given else f"SGLang's default for TP={tp}"
    free = mib / 1024 - CONTEXT_GIB
    rest = f"the other {free * (1 - share):.1f} GiB are for activations and CUDA graphs"
    return (
        free * share,
        f"{memory.gpu} ({mib / 1024:.1f} GiB - {CONTEXT_GIB:g} for CUDA) x {share:g} ({why}; {rest})",
    )


def _capacity(mib: int, *, tp: int) -> tuple[int, int]:
    """Chunk of prefill in tokens and largest decode graph in requests, as 0.5.21 sets them by the size of the GPU."""
    for below, chunk, few, many in (
        (20, 2048, 8, 8),
        (35, 4096, 48, 160),
        (60, 4096, 32, 160),
        (160, 8192, 256, 512),
    ):
        if mib < below * 1024:
            return chunk, few if tp < 4 else many
    return 16_384, 512


def _prefill_graphs(most: int) -> int:
    """How many prefill graphs 0.5.21 captures for chunks of up to `most` tokens (`generate_prefill_cuda_graph_batch_sizes`)."""
    steps = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256), (4608, most, 512))
    return sum(size <= most for low, high, step in steps for size in range(low, high + 1, step))


def _refusal(model: Model, room: int, *, asked: int | None, longest: int) -> str:
    if asked and room < asked:
        return f"--max-total-tokens {asked:,} are asked for, {room:,} fit"
    tokens = min(room, asked) if asked else room
    if tokens < longest:
        return f"the longest request needs {longest:,} tokens, the KV cache holds {tokens:,}"
    if longest > model.context:
        return f"the longest request has {longest:,} tokens, {model.name} takes {model.context:,}"
    return ""


def _weight_words(model: Model, *, tp: int, number: int) -> str:
    """The weights, in decimal GB as they are published, and the part of one rank in GiB."""
    count = parameters(model)
    whole = f"{model.name}: {count / 1e9:.2f}e9 parameters x {number} bytes = {count * number / 1e9:.0f} GB"
    if count * number < 1e9:
        return (
            f"{model.name}: {count / 1e6:.1f}e6 parameters x {number} bytes = {count * number / 1e6:.0f} MB"
        )
    part = f"{parameters(model, tp=tp) * number / GIB:.1f} GiB"
    return f"{whole}, {part} on each of {tp} GPUs" if tp > 1 else f"{whole} ({part})"


def _whole(word: str) -> int | None:
    return int(word) if word.isdigit() else None
