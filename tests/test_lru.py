"""The LRU model of a radix cache: known answers, and what must hold for any sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lab.lru import predict


def hits(groups: list[int], *, pool: int, prefix: int = 100, question: int = 10, output: int = 5) -> str:
    """One character a request: H for a prefix that was found, . for one that was computed."""
    n = len(groups)
    found = predict(groups, [prefix + question] * n, [prefix] * n, [output] * n, pool_tokens=pool)
    assert set(found) <= {0, prefix}
    return "".join("H" if tokens else "." for tokens in found)


def test_a_large_pool_forgets_nothing() -> None:
    assert hits([0, 1, 0, 2, 1, 0, 2], pool=10_000) == "..H.HHH"


def test_a_pool_for_two_prefixes_forgets_the_one_used_longest_ago() -> None:
    # 2 prefixes with their tails are 230; a third needs 115 more
    assert hits([0, 1, 2, 1, 2, 0], pool=300) == "...HH."
    assert hits([0, 1, 0, 2, 0, 1], pool=300) == "..H.H."


def test_a_pool_for_one_request_finds_only_what_came_just_before() -> None:
    assert hits([0, 0, 1, 1, 0], pool=140) == ".H.H."


def test_tails_go_before_the_prefix_they_hang_on() -> None:
    """Three questions to one prefix fit only if the tails of the first two make room for the third."""
    assert hits([0, 0, 0, 0, 0, 0], pool=135) == ".HHHHH"


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(115, 2000))
def test_a_first_request_never_hits_and_all_hit_where_everything_fits(groups: list[int], pool: int) -> None:
    small, large = hits(groups, pool=pool), hits(groups, pool=10**6)
    seen: set[int] = set()
    for group, there, unbounded in zip(groups, small, large, strict=True):
        assert (unbounded == "H") == (group in seen)
        assert there == "." or group in seen
        seen.add(group)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_the_same_prefix_twice_in_a_row_is_always_found(groups: list[int]) -> None:
    twice = [g for group in groups for g in (group, group)]
    assert set(hits(twice, pool=150)[1::2]) == {"H"}
