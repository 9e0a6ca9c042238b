"""The catalogue: its shapes against the published sizes, and the arithmetic of whether a model fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.catalogue import text
from lab.dialect import get_dialect
from lab.errors import LabError
from lab.fit import Fit, Memory, cannot_divide, fit
from lab.models import CATALOGUE, get_model, kv_bytes_per_token, parameters, weight_bytes

OLD, NEW = get_dialect("0.4.6.post5"), get_dialect("0.5.21")
A100 = Memory(mib=81_920, gpu="NVIDIA A100-SXM4-80GB")
GIB = 2**30


def fits(name: str, *argv: str, memory: Memory = A100, longest: int = 2048, new: bool = False) -> Fit:
    return fit(get_model(name), argv, memory=memory, dialect=NEW if new else OLD, longest=longest)


# ---- the catalogue


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # total_parameters of each repository's safetensors
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("mistral-7b", 7_248_023_552),
    ],
)
def test_the_shapes_give_the_published_count(name: str, count: int) -> None:
    assert parameters(get_model(name)) == count


def test_every_entry_is_whole() -> None:
    assert list(CATALOGUE) == ["nano", "llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "mistral-7b"]
    for name, model in CATALOGUE.items():
        assert model.name == name
        assert model.heads % model.kv_heads == 0
        assert model.vocab % 64 == 0
        if model.source == "built":
            assert all(len(digest) == 64 and int(digest, 16) for _, digest in model.files)
        else:
            assert model.repository.count("/") == 1
            assert model.hidden == model.heads * model.head_dim
            assert not model.revision or (len(model.revision) == 40 and int(model.revision, 16))


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(LabError) as caught:
        get_model("nanno")
    assert "unknown model 'nanno'" in str(caught.value)
    assert "the lab knows: llama-3.1-70b, llama-3.1-8b, mistral-7b, nano, qwen2.5-7b" in caught.value.why
    assert "did you mean 'nano'" in caught.value.fix


def test_kv_bytes_per_token() -> None:
    # 2 (key and value) x 2 layers x 2 heads x 16 numbers x 4 bytes
    assert kv_bytes_per_token(get_model("nano")) == 512
    assert kv_bytes_per_token(get_model("llama-3.1-8b")) == 131_072
    assert kv_bytes_per_token(get_model("qwen2.5-7b")) == 2 * 28 * 4 * 128 * 2
    big = get_model("llama-3.1-70b")
    assert [kv_bytes_per_token(big, tp=tp) for tp in (1, 2, 8, 16)] == [327_680, 163_840, 40_960, 40_960]


def test_weights_over_ranks() -> None:
    big = get_model("llama-3.1-70b")
    assert weight_bytes(big) == 141_107_412_992
    # Only the norms are on every rank: 80 layers with two of 8,192 numbers, and one at the end.
    assert 2 * parameters(big, tp=2) - parameters(big) == (80 * 2 + 1) * 8192
    # 16 ranks and 8 KV heads: each is there twice.
    copied = 8 * 80 * 2 * big.hidden * big.head_dim
    assert 16 * parameters(big, tp=16) - parameters(big) == 15 * (80 * 2 + 1) * 8192 + copied


def test_the_list_says_what_is_missing_and_how_to_get_it(tmp_path) -> None:
    said = text(cache=tmp_path / "cache", hub=tmp_path / "hub")
    assert "llama-3.1-70b" in said
    assert "141 GB" in said
    assert "70.55 billion parameters" in said
    assert "ask for access on the page of meta-llama/Llama-3.1-8B-Instruct" in said
    assert "hf download Qwen/Qwen2.5-7B-Instruct --revision a09a35458c70" in said


def test_a_revision_that_is_not_known_is_said_to_be_so() -> None:
    assert replace(get_model("mistral-7b"), revision="").pinned == "not pinned"


# ---- fit, by hand-checked numbers


def test_8b_on_one_a100() -> None:
    """(80 - 1) x 0.88 = 69.52; 69.52 - 14.96 = 54.56 GiB; x 8,192 tokens a GiB."""
    found = fits("llama-3.1-8b")
    assert found.refusal == ""
    assert found.tokens == int((79 * 0.88 - 8_030_261_248 * 2 / GIB) * GIB // 131_072) == 446_975
    assert "8.03e9 parameters x 2 bytes = 16 GB" in found.words
    assert "446,975 tokens" in found.words


def test_8b_against_a_log_of_sglang() -> None:
    """SGLang's own log of Llama-3.1-8B on an H100 (81,559 MiB), share 0.88: 27.13 GB of keys, as many of values."""
    logged = 2 * 27.13 * GIB / 131_072
    found = fits("llama-3.1-8b", memory=Memory(mib=81_559, gpu="NVIDIA H100 80GB HBM3"))
    assert found.tokens == pytest.approx(logged, rel=0.01)


@pytest.mark.parametrize(
    ("tp", "share", "tokens"),
    [
        # (79 GiB x share - 141.1 GB / TP) / KV bytes a token of one rank
        (2, 0.87, 19_795),
        (4, 0.85, 449_498),
    ],
)
def test_70b_over_ranks(tp: int, share: float, tokens: int) -> None:
    found = fits("llama-3.1-70b", "--tp", str(tp))
    assert found.refusal == ""
    by_hand = (79 * share * GIB - 70_553_706_496 * 2 / tp) / (327_680 / tp)
    assert found.tokens == pytest.approx(by_hand, rel=2e-3)  # the norms, on every rank
    assert found.tokens == tokens
    assert f"x {share:g} (SGLang's default for TP={tp}" in found.words


def test_70b_on_one_gpu_is_refused_with_the_number() -> None:
    found = fits("llama-3.1-70b")
    assert found.tokens == 0
    assert "131.4 GiB of weights leave nothing" in found.refusal
    assert "70.55e9 parameters x 2 bytes = 141 GB" in found.words


def test_the_share_of_the_new_release() -> None:
    """512 + 8192 x 1.5 + 1/8 x 1024 + 256 x 2 + 58 graphs x 8 = 13,904 MiB of 81,920 are left alone: 0.83."""
    found = fits("llama-3.1-8b", new=True)
    assert "x 0.83 (SGLang's default" in found.words
    none = fits("llama-3.1-8b", "--disable-cuda-graph", new=True)
    assert "x 0.842 (SGLang's default" in none.words
    asked = fits("llama-3.1-8b", "--mem-fraction-static", "0.5", new=True)
    assert "x 0.5 (--mem-fraction-static" in asked.words


def test_eight_bit_keys_take_half() -> None:
    plain, half = fits("llama-3.1-8b"), fits("llama-3.1-8b", "--kv-cache-dtype", "fp8_e5m2")
    assert half.tokens == pytest.approx(2 * plain.tokens, abs=1)


def test_copied_heads_are_said() -> None:
    assert "its 8 KV heads are copied on 16 ranks" in fits("llama-3.1-8b", "--tp-size", "16").words
    assert "copied" not in fits("llama-3.1-8b", "--tp-size", "8").words


@pytest.mark.parametrize(
    ("name", "tp", "word"),
    [
        ("llama-3.1-8b", 3, "32 attention heads, which 3 tensor-parallel ranks cannot share"),
        ("qwen2.5-7b", 8, "28 attention heads, which 8"),
        ("qwen2.5-7b", 7, "18,944 rows of the feed forward part, which 7"),
        ("nano", 8, "4 attention heads"),
    ],
)
def test_ranks_that_do_not_divide(name: str, tp: int, word: str) -> None:
    found = fits(name, "--tp", str(tp))
    assert word in found.refusal
    assert found.tokens == 0


def test_the_other_conditions_of_sharing() -> None:
    odd = replace(get_model("llama-3.1-8b"), heads=30, kv_heads=10, intermediate=14_340, vocab=192_000)
    assert "10 KV heads, which 3 ranks can neither" in cannot_divide(odd, tp=3)
    wide = replace(odd, kv_heads=3, vocab=32_064)
    assert cannot_divide(wide, tp=3) == ""
    assert "32,128 entries of the vocabulary" in cannot_divide(replace(wide, vocab=32_100), tp=3)


def test_a_pool_that_does_not_fit_and_one_that_does() -> None:
    small = fits("llama-3.1-70b", "--tp", "2", "--max-total-tokens", "16000")
    assert (small.refusal, small.tokens) == ("", 16_000)
    assert "--max-total-tokens 30,000 are asked for, 19,795 fit" in (
        fits("llama-3.1-70b", "--tp", "2", "--max-total-tokens", "30000").refusal
    )


def test_a_request_that_does_not_fit() -> None:
    assert (
        "the longest request needs 20,000 tokens, the KV cache holds 19,795"
        in fits("llama-3.1-70b", "--tp", "2", longest=20_000).refusal
    )
    assert "has 40,000 tokens, qwen2.5-7b takes 32,768" in fits("qwen2.5-7b", longest=40_000).refusal


def test_a_machine_without_gpu() -> None:
    machine = Memory(mib=24_000, base_gib=3.0)
    assert (
        "29.9 GiB of weights leave nothing"
        in fits("llama-3.1-8b", "--dtype", "float32", memory=machine).refusal
    )
    assert fits("nano", "--max-total-tokens", "8192", memory=machine).tokens == 8192
    unknown = fits("llama-3.1-8b", memory=Memory(mib=None))
    assert unknown.refusal == ""
    assert "not known: not checked" in unknown.words


@given(
    mib=st.integers(24_000, 300_000),
    share=st.floats(0.3, 0.99),
    tp=st.sampled_from([1, 2, 4]),
    name=st.sampled_from(sorted(CATALOGUE)),
)
def test_more_memory_never_holds_less(mib: int, share: float, tp: int, name: str) -> None:
    argv = ("--tp", str(tp), "--mem-fraction-static", f"{share:.3f}")
    few, more = (fits(name, *argv, memory=Memory(mib=size, gpu="x")) for size in (mib, mib + 1000))
    assert few.tokens <= more.tokens
    assert few.refusal or not more.refusal
