"""Loads: what the client is told, and the predicted hit rate against a cache simulated token by token."""

from __future__ import annotations

import pytest

from lab.errors import LabError
from lab.plan import PLACEHOLDER, PLACEHOLDERS
from lab.workload import Chat, RandomIds, SharedPrefix, Workload

RANDOM = RandomIds(name="r", seed=7, prompts=3, input_tokens=100, output_tokens=5)
SHARED = SharedPrefix(
    name="s",
    seed=20,
    groups=3,
    prompts_per_group=4,
    prefix_tokens=50,
    question_tokens=10,
    output_tokens=5,
    concurrency=2,
)
CHAT = Chat(name="c", seed=0, questions=("A?", "B?"), system_chars=400, system_tokens=100, output_tokens=5)


def simulated(prompts: list[tuple[tuple[str, int], ...]]) -> tuple[float, int]:
    """Hit rate and distinct entries of an unbounded prefix cache that is asked these prompts one by one."""
    seen: set[tuple[tuple[str, int], ...]] = set()
    cached = total = 0
    for prompt in prompts:
        prefixes = [prompt[: i + 1] for i in range(len(prompt))]
        cached += sum(p in seen for p in prefixes)
        total += len(prompt)
        seen.update(prefixes)
    return cached / total, len(seen)


def tokens(name: str, count: int) -> tuple[tuple[str, int], ...]:
    return tuple((name, i) for i in range(count))


def test_shared_prefix_prediction_is_what_an_unbounded_cache_does() -> None:
    prompts = [tokens(f"p{g}", 50) + tokens(f"q{g}.{k}", 10) for k in range(4) for g in range(3)]
    rate, entries = simulated(prompts)
    assert SHARED.hit_rate(cache_on=True) == pytest.approx(rate)
    assert SHARED.working_set_tokens() == entries + SHARED.requests() * SHARED.output_tokens


def test_random_ids_prediction_is_what_an_unbounded_cache_does() -> None:
    rate, entries = simulated([tokens(f"r{i}", 100) for i in range(3)])
    assert RANDOM.hit_rate(cache_on=True) == rate == 0
    assert RANDOM.working_set_tokens() == entries + RANDOM.requests() * RANDOM.output_tokens


def test_chat_prediction_is_what_an_unbounded_cache_does() -> None:
    """Up to the questions themselves, which are left out because they are short."""
    rate, _ = simulated([tokens("system", 100) + tokens(q, 2) for q in CHAT.questions])
    assert CHAT.hit_rate(cache_on=True) == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("load", [RANDOM, SHARED, CHAT])
def test_without_a_cache_nothing_is_predicted(load: Workload) -> None:
    assert load.hit_rate(cache_on=False) == 0


def value(argv: tuple[str, ...], flag: str) -> str:
    assert argv.count(flag) == 1, flag
    return argv[argv.index(flag) + 1]


@pytest.mark.parametrize("load", [RANDOM, SHARED])
def test_what_would_spoil_a_trial_by_default_is_said(load: Workload) -> None:
    argv = load.argv(2)
    assert value(argv, "--seed") == str(load.seed + 2)
    assert value(argv, "--warmup-requests") == "0"
    assert value(argv, "--output-file") == "${LOAD}/bench.jsonl"
    assert value(argv, "--dataset-name") == load.dataset
    assert value(argv, "--num-prompts") == str(load.requests())
    assert value(argv, "--request-rate") == "inf"
    assert value(argv, "--max-concurrency") == str(load.concurrency)
    assert "--output-details" in argv
    assert any(f.endswith("range-ratio") and value(argv, f) == "1.0" for f in argv)


def test_repeats_see_other_prompts_and_variants_the_same() -> None:
    assert SHARED.argv(0) == SHARED.argv(0)
    assert SHARED.argv(0) != SHARED.argv(1)


def test_an_open_loop_has_a_rate_and_no_limit() -> None:
    load = RandomIds(name="r", seed=7, prompts=3, input_tokens=100, output_tokens=5, rate_per_s=2.5)
    assert value(load.argv(0), "--request-rate") == "2.5"
    assert "--max-concurrency" not in load.argv(0)


def test_chat_asks_every_question_in_order() -> None:
    argv = CHAT.argv(0)
    asked = [argv[i + 1] for i, word in enumerate(argv) if word == "--question"]
    assert asked == ["A?", "B?"]
    assert CHAT.requests() == 2


@pytest.mark.parametrize("load", [RANDOM, SHARED, CHAT])
def test_only_known_placeholders_are_used(load: Workload) -> None:
    used = {name for word in load.argv(0) for name in PLACEHOLDER.findall(word)}
    assert used
    assert used <= PLACEHOLDERS.keys()


def test_a_small_load_has_its_numbers_and_says_what_they_replace() -> None:
    load = RandomIds(
        name="l", seed=1, prompts=500, rate_per_s=50.0, input_tokens=256, output_tokens=128,
        small={"prompts": 60, "rate_per_s": 6.5},
    )  # fmt: skip
    load.check()
    scaled = load.scaled()
    assert (scaled.prompts, scaled.rate_per_s, scaled.input_tokens) == (60, 6.5, 256)
    assert scaled.small == {}
    assert load.said_scaled() == "prompts 60 instead of 500, rate_per_s 6.5 instead of 50"
    assert scaled.said_scaled() == ""


@pytest.mark.parametrize(
    ("small", "problem"),
    [
        ({"promts": 3}, "unknown number in small of load 'l': 'promts'"),
        ({"seed": 3}, "unknown number in small"),
        ({"rate_per_s": 3.0}, "unknown number in small"),
        ({"prompts": 3.5}, "small has prompts=3.5"),
        ({"prompts": 0}, "prompts is 0"),
    ],
)
def test_small_numbers_that_are_not_the_loads(small: dict[str, float], problem: str) -> None:
    load = RandomIds(name="l", seed=1, prompts=5, input_tokens=9, output_tokens=9, small=small)
    with pytest.raises(LabError, match=problem):
        load.check()
