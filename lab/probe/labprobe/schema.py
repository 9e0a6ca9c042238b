"""What the probe writes: kinds of events, the level that a kind belongs to, and its fields in order. The lab's reader
takes its columns from here. Times end in `_ns`; `t_ns` is when the event was noted, `*_at_ns` when something began, all
on the monotonic clock of the machine, which the header ties to Unix time."""

from __future__ import annotations

SCHEMA = 1

# Each level includes those before it.
LEVELS = ("batches", "requests", "cache")

# kind: (level, fields after "e" and "t_ns")
EVENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    # A hook point that was not found as expected ("missing", "changed"), or whose body was switched off ("off").
    "hook": ("batches", ("target", "status", "detail")),
    # The first error of a hook's body; all of them are counted in "counters".
    "error": ("batches", ("hook", "detail")),
    # Once a second, and at the end (`end` true): what this file holds and what it lost.
    "counters": (
        "batches",
        ("written", "dropped", "errors", "queue_peak", "unix_ns", "end"),
    ),
    # Once a second. source "cuda": torch's caching allocator; "malloc": glibc's, where there is no GPU.
    "memory": (
        "batches",
        ("source", "rss_bytes", "allocated_bytes", "reserved_bytes", "peak_bytes", "retries", "ooms"),
    ),
    # One forward pass, noted when its result was processed. `forward` counts passes. The levels of both pools are those
    # after the batch was formed; at level "batches" they are read every 10 ms and null in between. In overlap mode
    # `run_ns` is the launch alone, and done comes after the next launch.
    "batch": (
        "batches",
        (
            "forward",
            "mode",  # prefill | decode | mixed | idle | SGLang's own name for anything else
            "requests",
            "new_tokens",  # prompt tokens computed; for decode, one for each request
            "cached_tokens",
            "running",  # requests in the running batch, this one included if it decodes
            "waiting",
            "policy",  # the one in force: lpm turns into fcfs with a long queue
            "chunked",  # whether a prompt in it goes on in a later batch
            "idle_turns",  # turns of the scheduler without a batch, just before
            "formed_at_ns",
            "form_ns",
            "run_at_ns",
            "run_ns",
            "done_at_ns",
            "done_ns",
            "slots_used",  # ReqToToken: rows of the request table
            "slots_free",
            "kv_used",  # TokenToKV, as the server counts: neither free nor evictable
            "kv_free",
            "kv_evictable",
            "kv_protected",  # held by the tree for requests that run; part of kv_used
        ),
    ),
    # `freed_tokens` is what the pool had more of afterwards; prompt and output tokens are those of the requests put back.
    "retraction": (
        "batches",
        (
            "requests",
            "aborted",
            "freed_tokens",
            "prompt_tokens",
            "output_tokens",
            "ns",
            "kv_free",
            "kv_evictable",
        ),
    ),
    # One pass over the tree's leaves. Levels are those after it.
    "evict": ("batches", ("wanted_tokens", "tokens", "ns", "kv_free", "kv_evictable", "kv_protected")),
    "flush": ("batches", ("done",)),
    "arrived": ("requests", ("rid", "prompt_tokens", "output_limit")),
    "queued": ("requests", ("rid", "again", "waiting")),
    # Each time the request is part of a prefill batch; `more`: its prompt goes on in a later one.
    "scheduled": ("requests", ("rid", "forward", "cached_tokens", "new_tokens", "more")),
    "first_token": ("requests", ("rid", "forward")),
    "finished": (
        "requests",
        ("rid", "forward", "reason", "prompt_tokens", "output_tokens", "cached_tokens", "retractions"),
    ),
    # where: queue (refused on arrival) | waiting | running | retraction
    "aborted": ("requests", ("rid", "where", "prompt_tokens", "output_tokens", "cached_tokens")),
    "retracted": ("requests", ("rid", "prompt_tokens", "output_tokens")),
    # why: schedule (a request looks for its prefix) | store (one finds its own prompt again after storing it) |
    # policy (the order of the queue is being computed). Levels of the tree are those after it, here and in "insert".
    "match": ("cache", ("why", "rid", "node", "key_tokens", "hit_tokens", "kv_evictable", "kv_protected")),
    # why: store (a prompt, or a chunk of one) | finish. `new_tokens`: by how much the tree grew.
    "insert": ("cache", ("why", "node", "key_tokens", "new_tokens", "kv_evictable", "kv_protected")),
    # `age_ns`: since a match or an insert last went through the node; age_of "end": since one last ended there.
    "evict_node": ("cache", ("node", "tokens", "age_ns", "age_of")),
}


def wanted(level: str) -> frozenset[str]:
    """The kinds that `level` writes."""
    allowed = LEVELS[: LEVELS.index(level) + 1]
    return frozenset(kind for kind, (of, _) in EVENTS.items() if of in allowed)
