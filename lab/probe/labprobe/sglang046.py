"""The hooks on SGLang 0.4.6.post5, and what this release does otherwise: ranks are arguments, prefill totals stand only
in what is logged, results do not know their pass, the tree's calls take token lists and return tuples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labprobe.bodies import Bodies
from labprobe.guard import Hook
from labprobe.observer import Observer, now
from labprobe.tree import TreeBodies, name_of

SCHEDULER = "sglang.srt.managers.scheduler"
BATCH = "sglang.srt.managers.schedule_batch"
POLICY = "sglang.srt.managers.schedule_policy"
RADIX = "sglang.srt.mem_cache.radix_cache"


class Bodies046(Bodies):
    """Around `Scheduler`, `SchedulePolicy` and `ScheduleBatch`."""

    def __init__(self, observer: Observer, start: Callable[[object], None]) -> None:
        super().__init__(observer, start)
        self._retractions: dict[object, int] = {}
        self._logged: tuple[int, int] | None = None

    def formed(self, scheduler: object, result: object) -> tuple[object, object]:
        return result, scheduler.running_batch

    def forward(self, scheduler: object, batch: object) -> int | None:
        return None

    def prompt_tokens(self, batch: object, at: int) -> tuple[int, int]:
        """As logged when this batch was formed; only the first rank logs, the others count extended tokens."""
        logged, self._logged = self._logged, None
        return logged or (sum(batch.extend_lens[:at]), 0)

    def logs(self, scheduler: object, adder: object, *args: object, **kwargs: object) -> None:
        self._logged = (adder.log_input_tokens, adder.log_hit_tokens)

    def output_tokens(self, req: object) -> int:
        return len(req.output_ids)

    def retractions(self, req: object) -> int | None:
        return self._retractions.pop(req.rid, 0)

    def retracted(self, result: object) -> tuple[Sequence[object], Sequence[object]]:
        for req in result[0]:
            self._retractions[req.rid] = self._retractions.get(req.rid, 0) + 1
        return result[0], ()

    def order_begins(self, policy: object, waiting: object, *args: object, **kwargs: object) -> None:
        # In this release fcfs returns before it looks at the queue.
        if self._ours(policy):
            active = (
                policy.policy if policy.policy.value == "fcfs" else policy._determine_active_policy(waiting)
            )
            self.o.policy = active.value
            self.o.why_match = "policy"

    def extended(
        self, token: object, result: object, scheduler: object, reqs: Sequence[object], *args: object
    ) -> None:
        """Retracted requests go back to the queue all at once."""
        for req in reqs:
            self.o.put(("queued", now(), req.rid, True, len(scheduler.waiting_queue)))


class TreeBodies046(TreeBodies):
    """Around the methods of `RadixCache`, whose nodes know when they were last gone through."""

    def evicted(
        self, start: int, result: object, tree: object, num_tokens: int, *args: object, **kw: object
    ) -> None:
        if self.ours(tree):
            self.note_evicted(start, num_tokens, self._tokens)

    def begin(self, *args: object, **kwargs: object) -> int:
        self._tokens = 0
        return now()

    def matched(
        self, token: object, result: object, tree: object, key: object, *args: object, **kw: object
    ) -> None:
        if self.ours(tree):
            slots, node = result
            self.note_match(kw.get("rid"), node, len(key), slots)

    def inserted(
        self, token: object, result: object, tree: object, key: object, *args: object, **kw: object
    ) -> None:
        if self.ours(tree):
            slots = args[0] if args else kw.get("value")
            self.note_insert(None, len(key), max(0, len(key) - result), slots)

    def leaf_begins(self, tree: object, node: object, *args: object) -> None:
        """Deleted leaves are the only tokens that `evict` frees, and it returns nothing: they are counted here."""
        if not self.ours(tree):
            return
        tokens = len(node.key)
        self._tokens += tokens
        if self.o.cache:
            age_ns = now() - int(node.last_access_time * 1e9)
            self.o.put(("evict_node", now(), name_of(node), tokens, age_ns, "path"))

    def note_insert(self, node: object, key_tokens: int, new: int, slots: object) -> None:
        self.o.put(("insert", now(), self.o.why_insert, None, key_tokens, new, *self.o.pools.tree()))

    def note_match(self, rid: object, node: object, key_tokens: int, slots: object) -> None:
        why = self.o.why_match
        self.o.put(("match", now(), why, rid, name_of(node), key_tokens, len(slots), *self.o.pools.tree()))


def hooks(observer: Observer, start: Callable[[object], None]) -> tuple[Hook, ...]:
    """Those of the observer's level."""
    bodies, tree = Bodies046(observer, start), TreeBodies046(observer)
    found = _of_batches(bodies, tree)
    if observer.requests:
        found += _of_requests(bodies)
    if observer.cache:
        found += _of_cache(tree)
    return found


def _of_batches(b: Bodies046, t: TreeBodies046) -> tuple[Hook, ...]:
    def of(
        name: str, path: str, parameters: str, before: object, after: object, module: str = SCHEDULER
    ) -> Hook:
        return Hook(name, module, path, tuple(parameters.split()), before, after)

    return (
        of("create", "Scheduler.__init__", "self server_args port_args gpu_id tp_rank", b.begin, b.created),
        of("form", "Scheduler.get_next_batch_to_run", "self", b.o.form_begins, b.form_ends),
        of("log", "Scheduler.log_prefill_stats", "self adder can_run_list running_bs", b.logs, b.ends),
        of("run", "Scheduler.run_batch", "self batch", b.o.run_begins, b.run_ends),
        of("done", "Scheduler.process_batch_result", "self batch result", b.done_begins, b.done_ends),
        of("flush", "Scheduler.flush_cache", "self", b.begin, b.flushed),
        of(
            "retract",
            "ScheduleBatch.retract_decode",
            "self server_args",
            b.retract_begins,
            b.retract_ends,
            BATCH,
        ),
        of(
            "order",
            "SchedulePolicy.calc_priority",
            "self waiting_queue",
            b.order_begins,
            b.order_ends,
            POLICY,
        ),
        of("evict", "RadixCache.evict", "self num_tokens", t.begin, t.evicted, RADIX),
        of("leaf", "RadixCache._delete_leaf", "self node", t.leaf_begins, t.nothing, RADIX),
    )


def _of_requests(b: Bodies046) -> tuple[Hook, ...]:
    def of(name: str, path: str, parameters: str, before: object, after: object) -> Hook:
        return Hook(name, SCHEDULER, path, tuple(parameters.split()), before, after)

    return (
        of("arrive", "Scheduler.handle_generate_request", "self recv_req", b.arrives, b.ends),
        of("queue", "Scheduler._add_request_to_queue", "self req", b.queue_begins, b.queue_ends),
        of("requeue", "Scheduler._extend_requests_to_queue", "self reqs", b.begin, b.extended),
        of("abort", "Scheduler.abort_request", "self recv_req", b.queue_begins, b.abort_ends),
    )


def _of_cache(t: TreeBodies046) -> tuple[Hook, ...]:
    def of(name: str, method: str, parameters: str, before: object, after: object) -> Hook:
        return Hook(name, RADIX, f"RadixCache.{method}", tuple(parameters.split()), before, after)

    return (
        of("match", "match_prefix", "self key", t.nothing, t.matched),
        of("insert", "insert", "self key value", t.nothing, t.inserted),
        of("store", "cache_unfinished_req", "self req", t.store_begins, t.store_ends),
    )


def facts(scheduler: object) -> dict[str, object]:
    """What the header says of a scheduler."""
    return {
        "tp_rank": scheduler.tp_rank,
        "pp_rank": scheduler.pp_rank,
        "dp_rank": getattr(scheduler, "dp_rank", None),
        "gpu": getattr(scheduler, "gpu_id", None),
        "device": str(getattr(scheduler, "device", "")),
        "overlap": scheduler.enable_overlap,
        "page_size": scheduler.page_size,
        "slots_total": scheduler.req_to_token_pool.size,
        "kv_total": scheduler.max_total_num_tokens,
    }
