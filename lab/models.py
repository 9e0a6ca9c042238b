"""What can be served: the catalogue of models as frozen `Model`s, and what follows from a model's shapes alone, which is
the number of its parameters and the bytes a token takes in the KV cache. No disk, no network: where a model's files
come from is in `lab/weights.py`, whether they fit into a machine in `lab/fit.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lab.errors import unknown_name

BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "half": 2, "bfloat16": 2, "float": 4}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary embedding, under the names of its config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by its name, its shapes, and where it is published.

    `source` is "built" for the one that `lab/nano.py` makes, with the SHA-256 of each of its `files`, and "hub" for those
    of a Hugging Face `repository` (owner/name) at the commit `revision`, empty where it is not pinned. `gated` says that
    its owner gives access to accounts that ask for it, None that the lab could not find out. `context` is the largest
    number of tokens of a request, prompt and answer together; `head_dim` the width of a head; `bias` says that Q, K
    and V have one, `tied` that the output layer is the table of embeddings.
    """

    name: str
    description: str
    source: Literal["built", "hub"]
    licence: str
    architecture: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    dtype: str
    rope_theta: float
    norm_eps: float
    rope_scaling: RopeScaling | None = None
    bias: bool = False
    tied: bool = False
    tokenizer: str
    repository: str = ""
    revision: str = ""
    gated: bool | None = False
    files: tuple[tuple[str, str], ...] = ()

    @property
    def sha256(self) -> str:
        """One sum for all files: of the lines that `sha256sum` prints for them, sorted by name."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def pinned(self) -> str:
        """The revision for people, or that there is none."""
        return self.revision or "not pinned"

    @property
    def access(self) -> str:
        """Who may fetch it, for people."""
        if self.source == "built":
            return "made on this machine"
        words = {
            True: "gated: ask on its page, with an account",
            False: "open",
            None: "may ask for an account",
        }
        return words[self.gated]


LLAMA_31_ROPE = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
LLAMA_31_LICENCE = "Llama 3.1 Community License"

# Shapes: each repository's config.json at its revision.
_ENTRIES = (
    Model(
        name="nano",
        description="2-layer Llama with seeded random weights, made on this machine; for servers without GPU",
        source="built",
        licence="Apache-2.0 (part of this repository)",
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden=256,
        intermediate=1024,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=10240,
        context=16384,
        dtype="float32",
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tokenizer="byte-level BPE, trained on lab/data/handbook.md",
        files=(
            ("config.json", "4de11ab9aa65150415d4304b2c8491ff81435100c4b7ebee1d3c5978c8fc379a"),
            ("generation_config.json", "3e0ec4685daa702afe754b156f4eb823ae3606c8087a1b22302cb88ca6c7790d"),
            ("model.safetensors", "2b3b5d82602e46a10cbf745cb57b49d15db8b64e7cd193cfe34f452eb404a10b"),
            ("tokenizer.json", "17604d83075b763df339e088ffae622fd671ca6015afe7892e2e3f1dfb691d5f"),
            ("tokenizer_config.json", "553e2a88fa245b9b6d6424088b9601dd8171f7d5f6f45f4e5be234317eaecece"),
        ),
    ),
    Model(
        name="llama-3.1-8b",
        description="Llama-3.1-8B-Instruct: one GPU, and detailed profiles",
        source="hub",
        licence=LLAMA_31_LICENCE,
        repository="meta-llama/Llama-3.1-8B-Instruct",
        revision="0e9e39f249a16976918f6564b8830bc894c89659",
        gated=True,
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128_256,
        context=131_072,
        dtype="bfloat16",
        rope_theta=500_000.0,
        rope_scaling=LLAMA_31_ROPE,
        norm_eps=1e-5,
        tokenizer="byte-level BPE of Llama 3",
    ),
    Model(
        name="llama-3.1-70b",
        description="Llama-3.1-70B-Instruct: tensor parallelism; two GPUs of 80 GB at least",
        source="hub",
        licence=LLAMA_31_LICENCE,
        repository="meta-llama/Llama-3.1-70B-Instruct",
        revision="1605565b47bb9346c5515c34102e054115b4f98b",
        gated=True,
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden=8192,
        intermediate=28_672,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocab=128_256,
        context=131_072,
        dtype="bfloat16",
        rope_theta=500_000.0,
        rope_scaling=LLAMA_31_ROPE,
        norm_eps=1e-5,
        tokenizer="byte-level BPE of Llama 3",
    ),
    Model(
        name="qwen2.5-7b",
        description="Qwen2.5-7B-Instruct: of the size of Llama-3.1-8B, open to everybody",
        source="hub",
        licence="Apache-2.0",
        repository="Qwen/Qwen2.5-7B-Instruct",
        revision="a09a35458c702b33eeacc393d103063234e8bc28",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        hidden=3584,
        intermediate=18_944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        vocab=152_064,
        context=32_768,
        dtype="bfloat16",
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        bias=True,
        tokenizer="byte-level BPE of Qwen2",
    ),
    Model(
        name="mistral-7b",
        description="Mistral-7B-Instruct-v0.3: one GPU",
        source="hub",
        licence="Apache-2.0",
        repository="mistralai/Mistral-7B-Instruct-v0.3",
        revision="c170c708c41dac9275d15a8fff4eca08d52bab71",
        gated=None,
        architecture="MistralForCausalLM",
        model_type="mistral",
        hidden=4096,
        intermediate=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=32_768,
        context=32_768,
        dtype="bfloat16",
        rope_theta=1_000_000.0,
        norm_eps=1e-5,
        tokenizer="SentencePiece BPE of Mistral, version 3",
    ),
)
CATALOGUE: Mapping[str, Model] = {model.name: model for model in _ENTRIES}


def get_model(name: str) -> Model:
    """The model of that name; `LabError` with the valid names otherwise."""
    if name not in CATALOGUE:
        raise unknown_name("model", name, CATALOGUE)
    return CATALOGUE[name]


def parameters(model: Model, *, tp: int = 1) -> int:
    """Numbers in the weights of one of `tp` ranks, sharded as SGLang does it.

    Heads, the feed forward part and the vocabulary are divided; a key/value head is copied where there are fewer than
    ranks; norms are on every rank (`srt/models/llama.py`, `qwen2.py`, and the layers they use, of 0.4.6.post5 and 0.5.21). With
    one rank this is the published count. A vocabulary is padded to a multiple of 64, which all of the catalogue are.
    """
    wide = model.heads // tp * model.head_dim
    narrow = max(1, model.kv_heads // tp) * model.head_dim
    attention = 2 * model.hidden * wide + 2 * model.hidden * narrow + (wide + 2 * narrow if model.bias else 0)
    feed_forward = 3 * model.hidden * model.intermediate // tp
    table = -(-model.vocab // 64) * 64 // tp * model.hidden
    tables = table if model.tied else 2 * table
    return tables + model.layers * (attention + feed_forward + 2 * model.hidden) + model.hidden


def kv_bytes_per_token(model: Model, *, tp: int = 1, number_bytes: int = 0) -> int:
    """Bytes that one token takes in the KV cache of one of `tp` ranks: a key and a value in each layer and for each
    key/value head of the rank, which has one at least.

    `number_bytes` are those of one number, 0 for the model's own dtype; the server may be told another
    (`--dtype`, `--kv-cache-dtype`).
    """
    heads = max(1, model.kv_heads // tp)
    return 2 * model.layers * heads * model.head_dim * (number_bytes or BYTES[model.dtype])


def weight_bytes(model: Model) -> int:
    """Bytes of all weights in the model's own dtype."""
    return parameters(model) * BYTES[model.dtype]
