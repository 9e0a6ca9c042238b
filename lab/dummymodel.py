"""The folder of a model of the catalogue without its weights: a config.json with its shapes, and a tokenizer of exactly its
vocabulary, for servers that draw their weights themselves (`--load-format dummy`). In go the model and the lab's own
tokenizer (`nano`), out comes each file as bytes, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from lab.models import Model, get_model
from lab.nano import CONSONANTS, SPECIAL, VOWELS, model_config, tokenizer_config

RECIPE = "1"
"""Raised when what is written changes, so that runs with another tokenizer are runs with another model."""

SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)
SPACE = "\u0120"
"""How a byte-level tokenizer writes a leading space."""

STRIDE = 452_929  # without a common divisor with 90 * 90 * 90: every word comes once


def config_text(model: Model) -> str:
    """`config.json` for the catalogue's shapes, with the special tokens of our tokenizer."""
    config = {
        **model_config(),
        "architectures": [model.architecture],
        "model_type": model.model_type,
        **shape_fields(model),
        "torch_dtype": model.dtype,
    }
    if model.rope_scaling is not None:
        config["rope_scaling"] = asdict(model.rope_scaling)
    if model.model_type == "mistral":
        config["sliding_window"] = None
    if model.model_type == "qwen2":
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.layers}
    return _json(config)


def shape_fields(model: Model) -> dict[str, object]:
    """What of config.json decides memory and work, under its names there."""
    return {
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.context,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
    }


def dummy_sha256(model: Model) -> str:
    """What identifies the folder before it is made: its config, the tokenizer it starts from, and the recipe."""
    parts = (RECIPE, config_text(model), dict(get_model("nano").files)["tokenizer.json"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dummy_files(model: Model, *, nano_tokenizer: str) -> dict[str, bytes]:
    """All files by name; `nano_tokenizer` is the text of nano's tokenizer.json."""
    config = json.loads(config_text(model))
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {
        "config.json": config_text(model),
        "generation_config.json": _json({**generation, "do_sample": False}),
        "tokenizer.json": tokenizer_text(nano_tokenizer, vocab=model.vocab),
        "tokenizer_config.json": _json(_tokenizer_config(model)),
    }
    return {name: text.encode() for name, text in texts.items()}


def tokenizer_text(nano_tokenizer: str, *, vocab: int) -> str:
    """nano's tokenizer, cut to what is printable ASCII and filled with made-up words to `vocab` entries.

    Dummy weights may choose any token, and the server holds back text that ends in a part of a character: so no token may
    be one, and the special ones print as they are written, but for the end of a text. Characters without a token, such as a
    line break, become `<unk>` or vanish. What load generators decode comes back as the same tokens: a word is looked
    up whole (`ignore_merges`), and for the class that transformers puts in the place of Qwen's tokenizer, which does not
    know that, each word is also one more merge.
    """
    tokenizer = json.loads(nano_tokenizer)
    model = tokenizer["model"]
    kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if _printable(token)]
    if vocab < len(kept):
        raise ValueError(f"a vocabulary of {vocab} is smaller than the {len(kept)} entries to start from")
    known = set(kept)
    merges = [pair for pair in model["merges"] if known.issuperset((*pair, "".join(pair)))]
    for front, end in _words():
        if len(kept) == vocab:
            break
        if front in known and front + end not in known:
            kept.append(front + end)
            merges.append([front, end])
    if len(kept) < vocab:
        raise ValueError(f"there are words for {len(kept)} entries, not for {vocab}")
    model["vocab"] = {token: i for i, token in enumerate(kept)}
    model["merges"] = merges
    model |= {"unk_token": SPECIAL[0], "ignore_merges": True}
    tokenizer["added_tokens"] = [{**token, "special": False} for token in tokenizer["added_tokens"]]
    return json.dumps(tokenizer, ensure_ascii=True) + "\n"


def _tokenizer_config(model: Model) -> dict[str, object]:
    """nano's, with one special token only: transformers prints nothing for those that are named here, and the class it takes
    for Qwen adds tokens of its own for those that are not."""
    config = {**tokenizer_config(), "model_max_length": model.context}
    del config["bos_token"]
    return config | {"unk_token": config["eos_token"], "pad_token": config["eos_token"]}


def _printable(token: str) -> bool:
    text = token.replace(SPACE, " ")
    return text.isascii() and text.isprintable()


def _words() -> Iterator[tuple[str, str]]:
    """Words of three syllables with a leading space, 729,000 of them, neighbours unlike each other: the first two, the third."""
    n = len(SYLLABLES)
    for k in range(n**3):
        number = k * STRIDE % n**3
        yield SPACE + SYLLABLES[number // n**2] + SYLLABLES[number // n % n], SYLLABLES[number % n]


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"
