"""What a radix cache that evicts least recently used leaves must find, request by request.

A small model, for requests served one at a time whose prompts share a prefix within their group: the tree
then has two levels, a prefix per group and below it one tail (question and answer) per request. Like SGLang's
`RadixCache.evict`, it frees whole leaves, least recently used first, until the new request fits; a prefix
becomes a leaf, and can go, once all its tails are gone. Prediction only: the tables hold it against the server."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeAlias

Node: TypeAlias = tuple[int, int]  # (group, request); request -1 is the group's prefix
PREFIX = -1


class _Tree:
    """Sizes and last uses of the nodes, free slots, and a heap of leaves with outdated entries left in it."""

    def __init__(self, pool_tokens: int) -> None:
        self.free = pool_tokens
        self.size: dict[Node, int] = {}
        self.used: dict[Node, int] = {}
        self.tails: dict[int, int] = {}
        self.heap: list[tuple[int, Node]] = []

    def touch(self, node: Node, time: int) -> None:
        self.used[node] = time
        heapq.heappush(self.heap, (time, node))

    def add(self, node: Node, *, size: int, time: int) -> None:
        self.size[node] = size
        group, request = node
        if request == PREFIX:
            self.tails[group] = 0
        else:
            self.tails[group] += 1
        self.touch(node, time)

    def evict(self, tokens: int, *, keep: Node | None) -> None:
        """Free leaves, oldest first, until `tokens` are free; `keep` is in use by the request itself."""
        kept: list[tuple[int, Node]] = []
        while self.free < tokens and self.heap:
            time, node = heapq.heappop(self.heap)
            if node not in self.size or self.used[node] != time:
                continue  # evicted, or used again since this entry was made
            group, request = node
            if node == keep or (request == PREFIX and self.tails[group] > 0):
                kept.append((time, node))
                continue
            self.free += self.size.pop(node)
            if request != PREFIX:
                self.tails[group] -= 1
                if self.tails[group] == 0 and (group, PREFIX) in self.size:
                    heapq.heappush(self.heap, (self.used[group, PREFIX], (group, PREFIX)))
                    kept = [entry for entry in kept if entry[1] != (group, PREFIX)]
        for entry in kept:
            heapq.heappush(self.heap, entry)


def predict(
    groups: Sequence[int],
    prompt_tokens: Sequence[int],
    prefix_tokens: Sequence[int],
    output_tokens: Sequence[int],
    *,
    pool_tokens: int,
) -> list[int]:
    """Cached tokens of each request, in order. All sequences have one entry a request, in tokens."""
    tree = _Tree(pool_tokens)
    found: list[int] = []
    for i, group in enumerate(groups):
        prefix = (group, PREFIX)
        hit = tree.size.get(prefix, 0)
        if hit:
            tree.touch(prefix, i)
        need = prompt_tokens[i] - hit + output_tokens[i]
        tree.evict(need, keep=prefix if hit else None)
        tree.free -= need
        if not hit:
            tree.add(prefix, size=prefix_tokens[i], time=i)
            hit_size = prefix_tokens[i]
        else:
            hit_size = hit
        tree.add((group, i), size=prompt_tokens[i] - hit_size + output_tokens[i], time=i)
        found.append(hit)
    return found
