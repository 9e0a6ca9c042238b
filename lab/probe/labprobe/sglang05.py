"""The hooks on SGLang 0.5.18 and later: which functions, what their signatures must begin with, which bodies."""

from __future__ import annotations

from collections.abc import Callable

from labprobe.bodies import Bodies
from labprobe.guard import Hook
from labprobe.observer import Observer
from labprobe.tree import TreeBodies

SCHEDULER = "sglang.srt.managers.scheduler"
BATCH = "sglang.srt.managers.schedule_batch"
POLICY = "sglang.srt.managers.schedule_policy"
UNIFIED = "sglang.srt.mem_cache.unified_radix_cache"


def hooks(observer: Observer, start: Callable[[object], None]) -> tuple[Hook, ...]:
    """Those of the observer's level."""
    bodies, tree = Bodies(observer, start), TreeBodies(observer)
    found = _of_batches(bodies, tree)
    if observer.requests:
        found += _of_requests(bodies)
    if observer.cache:
        found += _of_cache(tree)
    return found


def _of_batches(b: Bodies, t: TreeBodies) -> tuple[Hook, ...]:
    def of(
        name: str, path: str, parameters: str, before: object, after: object, module: str = SCHEDULER
    ) -> Hook:
        return Hook(name, module, path, tuple(parameters.split()), before, after)

    def flushed(token: object, result: object, *args: object, **kwargs: object) -> None:
        t.touched.forget()
        b.flushed(token, result)

    return (
        of("create", "Scheduler.__init__", "self server_args port_args", b.begin, b.created),
        of("form", "Scheduler.get_next_batch_to_run", "self", b.o.form_begins, b.form_ends),
        of("run", "Scheduler.run_batch", "self batch", b.o.run_begins, b.run_ends),
        of("done", "Scheduler.process_batch_result", "self batch result", b.done_begins, b.done_ends),
        of("flush", "Scheduler.flush_cache", "self", b.begin, flushed),
        of("retract", "ScheduleBatch.retract_decode", "self", b.retract_begins, b.retract_ends, BATCH),
        of(
            "order",
            "SchedulePolicy.calc_priority",
            "self waiting_queue",
            b.order_begins,
            b.order_ends,
            POLICY,
        ),
        of("evict", "UnifiedRadixCache._evict", "self params", t.begin, t.evicted, UNIFIED),
    )


def _of_requests(b: Bodies) -> tuple[Hook, ...]:
    def of(name: str, path: str, parameters: str, before: object, after: object) -> Hook:
        return Hook(name, SCHEDULER, path, tuple(parameters.split()), before, after)

    return (
        of("arrive", "Scheduler.handle_generate_request", "self recv_req", b.arrives, b.ends),
        of("queue", "Scheduler._add_request_to_queue", "self req", b.queue_begins, b.queue_ends),
        of("abort", "Scheduler.abort_request", "self recv_req", b.queue_begins, b.abort_ends),
    )


def _of_cache(t: TreeBodies) -> tuple[Hook, ...]:
    def of(name: str, method: str, parameters: str, before: object, after: object) -> Hook:
        return Hook(name, UNIFIED, f"UnifiedRadixCache.{method}", tuple(parameters.split()), before, after)

    return (
        of("match", "match_prefix", "self params", t.nothing, t.matched),
        of("insert", "insert", "self params", t.nothing, t.inserted),
        of("store", "cache_unfinished_req", "self req", t.store_begins, t.store_ends),
        of("leaf", "_evict_device_leaf", "self node_id tracker", t.leaf_begins, t.leaf_ends),
    )


def facts(scheduler: object) -> dict[str, object]:
    """What the header says of a scheduler."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return {
        "tp_rank": _or_none(parallel, "tp_rank"),
        "pp_rank": _or_none(parallel, "pp_rank"),
        "dp_rank": _or_none(parallel, "dp_rank"),
        "gpu": _or_none(parallel, "gpu_id"),
        "device": str(getattr(scheduler, "device", "")),
        "overlap": scheduler.enable_overlap,
        "page_size": scheduler.page_size,
        "slots_total": scheduler.req_to_token_pool.size,
        "kv_total": scheduler.max_total_num_tokens,
    }


def _or_none(context: object, name: str) -> object:
    """A rank that this server has no groups for is not an error."""
    try:
        return getattr(context, name)
    except Exception:  # which kind differs between releases
        return None
