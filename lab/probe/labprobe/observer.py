"""What is known of one scheduler between two hooks, and the events made of it. Knows no release of SGLang: the hooks'
bodies (`sglang05`, `sglang046`) take values out of SGLang's objects, this makes events of them."""

from __future__ import annotations

import time
from collections import deque

from labprobe import nvtx
from labprobe.schema import wanted
from labprobe.writer import Writer

now = time.monotonic_ns

Levels = tuple[object, ...]
NO_LEVELS: Levels = (None,) * 6
# A batch whose result is never processed (pipeline stages) is written without its end once so many wait.
PENDING = 8
# Reading the pools takes as long as all the rest. A batch of a GPU lasts longer than this and always gets its levels;
# of the many that a small model makes on a CPU, some do, unless the level of detail asks for all.
LEVELS_EVERY_NS = 10_000_000


class Pools:
    """Both levels of the memory pool, and the tree."""

    def __init__(self, slots: object, tokens: object, tree: object, *, kv_total: int) -> None:
        self._slots, self._tokens, self._tree, self._kv_total = slots, tokens, tree, kv_total

    def levels(self) -> Levels:
        """slots used and free; KV tokens used, free, evictable, protected."""
        slots = self._slots
        slots_free = slots.available_size()
        free, evictable = self._tokens.available_size(), self._tree.evictable_size()
        used = self._kv_total - free - evictable
        return (slots.size - slots_free, slots_free, used, free, evictable, self._tree.protected_size())

    def free_and_evictable(self) -> tuple[int, int]:
        return self._tokens.available_size(), self._tree.evictable_size()

    def tree(self) -> tuple[int, int]:
        """Evictable and protected tokens; together the size of the tree."""
        return self._tree.evictable_size(), self._tree.protected_size()


class Observer:
    """One scheduler. Only its own thread calls this."""

    def __init__(self, writer: Writer, *, level: str, nvtx_on: bool = False) -> None:
        kinds = wanted(level)
        self.put = writer.put
        self.writer = writer
        self.level = level
        self.requests = "finished" in kinds
        self.cache = "match" in kinds
        self.scheduler: object = None
        self.pools: Pools | None = None
        self.trees: frozenset[int] = frozenset()
        self.policy = ""
        self.why_match = "schedule"
        self.why_insert = "finish"
        self.chunked_rids: set[object] = set()
        self.prefill: tuple[int, int] | None = None  # new and cached tokens, where a release tells them apart
        self.push, self.pop = nvtx.ranges() if nvtx_on else nvtx.NOTHING
        # Without ranges the beginning of a stage is a look at the clock, and no call more than that.
        self.ranges = self.push is not nvtx.NOTHING[0]
        self._levels_every = 0 if self.requests else LEVELS_EVERY_NS
        self._levels_due = 0
        self._idle_turns = 0
        self._formed: tuple[object, ...] | None = None
        self._pending: deque[tuple[object, ...]] = deque()

    def watch(self, scheduler: object, pools: Pools, *, trees: frozenset[int], policy: str) -> None:
        """From here on there is a scheduler to look at."""
        self.scheduler, self.pools, self.trees, self.policy = scheduler, pools, trees, policy

    def levels(self, moment: int) -> Levels:
        """Of the pools, if they are due to be read."""
        if moment < self._levels_due or self.pools is None:
            return NO_LEVELS
        self._levels_due = moment + self._levels_every
        return self.pools.levels()

    # ------------------------------------------------------------ a batch: formed, run, done

    def form_begins(self, *args: object, **kwargs: object) -> int:
        if self.ranges:
            self.push("lab.form")
        return now()

    def form_ends(self, start: int, *, found: bool, running: int, waiting: int) -> None:
        if self.ranges:
            self.pop()
        if not found:
            self._idle_turns += 1
            return
        end = now()
        self._formed = (running, waiting, self._idle_turns, start, end - start, self.levels(end))
        self._idle_turns = 0

    def run_begins(self, *args: object, **kwargs: object) -> int:
        if self.ranges:
            self.push("lab.run")
        return now()

    def run_ends(
        self, start: int, *, forward: int, mode: str, requests: int, new: int, cached: int, chunked: bool
    ) -> None:
        took = now() - start
        if self.ranges:
            self.pop()
        running, waiting, idle, formed_at, form_ns, levels = self._formed or (
            None,
            None,
            None,
            None,
            None,
            NO_LEVELS,
        )
        self._formed = None
        head = (forward, mode, requests, new, cached, running, waiting, self.policy, chunked, idle, formed_at)
        self._pending.append((forward, (*head, form_ns, start, took), levels))
        if len(self._pending) > PENDING:
            self._batch(self._pending.popleft(), None, None)

    def done_begins(self, *args: object, **kwargs: object) -> int:
        if self.ranges:
            self.push("lab.result")
        return now()

    def done_ends(self, start: int, *, forward: int | None) -> int | None:
        """Write the batch; results come in the order of launches. The number of its forward pass comes back."""
        if self.ranges:
            self.pop()
        while self._pending:
            first = self._pending.popleft()
            if forward is None or first[0] == forward:
                self._batch(first, start, now() - start)
                return first[0]  # type: ignore[return-value]
            self._batch(first, None, None)
        return forward

    def result_ends(self) -> None:
        """A result that belongs to no batch."""
        if self.ranges:
            self.pop()

    def _batch(self, pending: tuple[object, ...], done_at: int | None, done_ns: int | None) -> None:
        _, head, levels = pending
        self.put(("batch", now(), *head, done_at, done_ns, *levels))
