"""Writes the `nano` model: `python lab/nano.py OUT` fills the folder OUT with a small Llama, its tokenizer
and its configuration, and prints one `<sha256>  <name>` line a file. It runs in the interpreter of a *stack*
(numpy, tokenizers and safetensors are pinned by the stack's lock), so it imports nothing else of the lab. The
bytes are the same on every machine: weights are Philox integers scaled by single IEEE multiplications (no
libm, no BLAS), the tokenizer is trained on `lab/data/handbook.md` and a fixed list of made-up words, and
every file has a fixed format. Why it looks as it does is told in `docs/decisions/0003-nano-model.md`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer  # type: ignore[import-not-found]  # only the stack has it

    FloatArray = NDArray[np.float32]

HIDDEN = 256
INTERMEDIATE = 1024
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
VOCAB = 10240
CONTEXT = 16384

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WEIGHTS_SEED = 2
CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
REPEATS = 3000  # above the count of any pair of letters in the rest of the training text


def main(argv: list[str]) -> int:
    """Write the model into `argv[1]`; 0 when done, 2 for a wrong command line."""
    if len(argv) != 2:
        sys.stderr.write("usage: python lab/nano.py OUT\n")
        return 2
    out = Path(argv[1])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config())
    write_json(out / "config.json", model_config())
    write_json(out / "generation_config.json", generation_config())
    write_weights(out / "model.safetensors", silent=silent_tokens(tokenizer))
    for file in sorted(out.iterdir()):
        sys.stdout.write(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")
    return 0


# ---------------------------------------------------------------- tokenizer


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly `VOCAB` entries: any text can be encoded and comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} entries instead of {VOCAB}")
    return Tokenizer.from_str(with_shuffled_ids(tokenizer.to_str()))


def training_text() -> Iterator[str]:
    """The handbook, all made-up words of two syllables, and two things many times over.

    The handbook has about a thousand distinct words, too few for `VOCAB` entries; 8,100 made-up words fill
    the rest. The syllables are repeated so that they are joined first: then a made-up word grows only from
    its front, and nearly every token begins with a space. Such tokens survive decoding and encoding next to
    one another. Half of the 256 byte tokens are no character of their own and decode to U+FFFD, which gets a
    token for that reason.
    """
    handbook = Path(__file__).resolve().parent / "data" / "handbook.md"
    yield handbook.read_text(encoding="utf-8")
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    yield "".join(f" {first}{second}" for first in syllables for second in syllables)
    yield "".join(f"{piece}\n" * REPEATS for piece in (*syllables, "\N{REPLACEMENT CHARACTER}"))


def with_shuffled_ids(tokenizer_json: str) -> str:
    """The same tokenizer with the ids (special tokens apart) in the order of the SHA-256 of their tokens.

    SGLang's `random-ids` load takes runs of consecutive ids. In training order all word fragments stand side
    by side, and a run through them would change its length by a fifth when it is encoded again.
    """
    tokenizer = json.loads(tokenizer_json)
    tokens = [token for token in tokenizer["model"]["vocab"] if token not in SPECIAL]
    tokens.sort(key=lambda token: hashlib.sha256(token.encode("utf-8")).digest())
    tokenizer["model"]["vocab"] = {token: i for i, token in enumerate((*SPECIAL, *tokens))}
    return json.dumps(tokenizer)


def silent_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that the model never says: special tokens, and all that are not printable ASCII on their own.

    A stream whose last token is a part of a character is held back by the server, which would blur TTFT.
    """
    texts = (tokenizer.decode([i], skip_special_tokens=False) for i in range(VOCAB))
    return [
        i for i, text in enumerate(texts) if i < len(SPECIAL) or not (text.isascii() and text.isprintable())
    ]


def tokenizer_config() -> dict[str, object]:
    """`tokenizer_config.json`: the special tokens by role and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


# ---------------------------------------------------------------- model


def model_config() -> dict[str, object]:
    """`config.json` of a Llama with the shape above."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "pad_token_id": SPECIAL.index("<pad>"),
    }


def generation_config() -> dict[str, object]:
    """`generation_config.json`: greedy by default."""
    return {
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "pad_token_id": SPECIAL.index("<pad>"),
        "do_sample": False,
    }


def write_weights(path: Path, *, silent: list[int]) -> None:
    """All tensors of the Llama in float32; the output rows of the `silent` tokens are zero."""
    from safetensors.numpy import save_file  # type: ignore[import-not-found]  # only the stack has it

    tensors = dict(draw_weights())
    # The other scores have a standard deviation near 5, so a score of 0 is never the largest of ten thousand.
    tensors["lm_head.weight"][silent] = 0.0
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable for its owner alone


def draw_weights() -> Iterator[tuple[str, FloatArray]]:
    """(name, tensor) in a fixed order, uniform in [-bound, bound)."""
    bits = np.random.Philox(WEIGHTS_SEED)

    def uniform(rows: int, columns: int, bound: float) -> FloatArray:
        integers = (bits.random_raw(rows * columns) >> np.uint64(40)).astype(np.int64) - (1 << 23)
        # Both steps are exact or rounded once, as IEEE 754 demands: equal everywhere.
        scaled = integers.astype(np.float64) * (bound / (1 << 23))
        return scaled.astype(np.float32).reshape(rows, columns)

    norm = np.ones(HIDDEN, dtype=np.float32)
    yield "model.embed_tokens.weight", uniform(VOCAB, HIDDEN, 1.75)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", norm.copy()
        yield prefix + "self_attn.q_proj.weight", uniform(HEADS * HEAD_DIM, HIDDEN, 0.1875)
        yield prefix + "self_attn.k_proj.weight", uniform(KV_HEADS * HEAD_DIM, HIDDEN, 0.1875)
        yield prefix + "self_attn.v_proj.weight", uniform(KV_HEADS * HEAD_DIM, HIDDEN, 0.1875)
        yield prefix + "self_attn.o_proj.weight", uniform(HIDDEN, HEADS * HEAD_DIM, 0.1875)
        yield prefix + "post_attention_layernorm.weight", norm.copy()
        yield prefix + "mlp.gate_proj.weight", uniform(INTERMEDIATE, HIDDEN, 0.125)
        yield prefix + "mlp.up_proj.weight", uniform(INTERMEDIATE, HIDDEN, 0.125)
        yield prefix + "mlp.down_proj.weight", uniform(HIDDEN, INTERMEDIATE, 0.125)
    yield "model.norm.weight", norm.copy()
    yield "lm_head.weight", uniform(VOCAB, HIDDEN, 0.5)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """One fixed format: two spaces, keys in the order given, ASCII, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=True) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
