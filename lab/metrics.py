"""The numbers of the tables: column, unit, and how each is defined. The report prints these definitions.

Client columns are what bench_serving or the chat program saw; server columns are SGLang's own record of
the request; those of forward passes and of the tree come from the probe. The names are the field's usual ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column: its `unit` ("" for a plain number), what it means, and how many decimals are worth printing."""

    column: str
    unit: str
    means: str
    decimals: int = 1


# column, unit, decimals, what it means
_TABLE = (
    (
        "ttft_ms",
        "ms",
        1,
        "time to first token: from the client sending the request to the first streamed token",
    ),
    ("itl_ms", "ms", 2, "inter-token latency: the request's median gap between streamed tokens"),
    ("e2e_ms", "ms", 1, "from the client sending the request to its last token"),
    ("queue_ms", "ms", 2, "time the request waited in the server's queue"),
    ("server_ttft_ms", "ms", 1, "time to first token by the server's own clock (first_token_latency)"),
    ("prompt_tokens", "tokens", 0, "prompt length as the server counted it"),
    ("cached_tokens", "tokens", 0, "prompt tokens whose KV entries were found in the radix cache"),
    ("cached_share", "", 3, "cached_tokens / prompt_tokens of a request"),
    ("hit_rate", "", 3, "cached over prompt tokens of all requests of a load"),
    (
        "predicted_hit_rate",
        "",
        3,
        "the hit rate an unbounded cache would show, computed from the prompts that were sent",
    ),
    ("hit_rate_lost", "", 3, "predicted_hit_rate - hit_rate: what eviction took"),
    (
        "lru_hit_rate",
        "",
        3,
        "the hit rate of a model cache of the pool's size that evicts least recently used leaves (lab/lru.py)",
    ),
    (
        "lru_agreement",
        "",
        3,
        "share of repeated prefixes for which that model and the server agree on found or evicted",
    ),
    (
        "evicted_tokens",
        "tokens",
        0,
        "KV slots freed by eviction during the load (sglang:evicted_tokens_total; on 0.4.6 by the probe)",
    ),
    (
        "groups_evicted",
        "groups",
        1,
        "prefix groups that had been computed, were asked for again, and were no longer cached",
    ),
    (
        "tpot_ms",
        "ms",
        2,
        "time per output token: (last token - first token) / (output tokens - 1) of a request",
    ),
    (
        "wait_ms",
        "ms",
        2,
        "from being queued to the launch of the first forward pass with the request in it (probe)",
    ),
    (
        "service_order",
        "",
        0,
        "place of the request in the order of service, by the first pass that it was part of (probe)",
    ),
    (
        "same_answer",
        "",
        3,
        "share of requests whose answer is the same text as that of the first variant to the same request",
    ),
    ("retractions", "", 0, "how often the request was put back into the queue because the KV pool was full"),
    ("completion_tokens", "tokens", 0, "length of the answer"),
    ("received_s", "s", 3, "when the request arrived, from the first one on"),
    (
        "output_tokens_per_s",
        "tokens/s",
        1,
        "generated tokens over the time from the first request's arrival to the last one's end",
    ),
    (
        "total_tokens_per_s",
        "tokens/s",
        0,
        "prompt and generated tokens over the time from the first arrival to the last end",
    ),
    ("requests_per_s", "1/s", 2, "requests over the time from the first one's arrival to the last one's end"),
    ("duration_s", "s", 2, "how long the client program ran"),
    ("generated_tokens", "tokens", 0, "output tokens that the server counted"),
    ("retracted_requests", "requests", 1, "requests put back into the queue because the KV pool was full"),
    ("pool_tokens", "tokens", 0, "size of the KV pool"),
    ("prefill_passes", "passes", 0, "forward passes that computed prompts"),
    ("decode_passes", "passes", 0, "forward passes that made one token for each running request"),
    (
        "joined_passes",
        "passes",
        0,
        "prefill passes formed while a decode batch was there, with requests that had just ended: continuous batching",
    ),
    (
        "left_passes",
        "passes",
        0,
        "decode passes right after a decode pass with more requests: requests left while others went on",
    ),
    (
        "alternations",
        "passes",
        0,
        "prefill passes directly after a decode pass: how often the two interleaved",
    ),
    ("running_max", "requests", 0, "largest decode batch"),
    ("running_mean", "requests", 2, "mean size of decode batches"),
    ("waiting_max", "requests", 0, "longest queue after a batch was formed"),
    (
        "gap_share",
        "",
        3,
        "gaps between calls that run batches, over the busy time; on a GPU a gap holds the wait for the result",
    ),
    (
        "late_share",
        "",
        3,
        "share of passes whose result was processed after the next pass had been launched: the overlap scheduler",
    ),
    ("form_share", "", 4, "time spent forming batches over the busy time"),
    ("kv_used_max", "tokens", 0, "most KV slots in use, neither free nor evictable"),
    (
        "kv_used_share_max",
        "",
        3,
        "most KV slots in use, as a share of the pool; at probe level batches read every 10 ms",
    ),
    ("slots_used_max", "requests", 0, "most rows of the request table in use (ReqToToken)"),
    ("retraction_passes", "times", 1, "how often running requests were retracted"),
    ("freed_tokens", "tokens", 0, "KV slots that retraction freed"),
    ("asked_waiting_max", "requests", 0, "longest queue that was ordered by the policy that was asked for"),
    (
        "fallback_waiting_min",
        "requests",
        0,
        "shortest queue that was ordered by another policy than the one asked for",
    ),
    ("order_kept", "", 3, "share of neighbours in the order of service that arrived in that order"),
    ("group_switches", "times", 0, "how often the prefix group changed from one request served to the next"),
    ("stored_tokens", "tokens", 0, "tokens by which the radix tree grew during the load"),
    (
        "held_tokens",
        "tokens",
        0,
        "prompt and output tokens of all requests: what caches without sharing would hold",
    ),
    ("saved_share", "", 3, "1 - stored_tokens / held_tokens: the memory that sharing saves"),
    ("tree_tokens_max", "tokens", 0, "largest size of the radix tree"),
    ("tree_tokens_end", "tokens", 0, "size of the radix tree after the load's last insertion"),
    ("nodes_evicted", "nodes", 0, "nodes of the radix tree that were evicted"),
    (
        "evicted_old_first",
        "",
        3,
        "share of neighbours in an eviction of which the one used less recently went first; known on a CPU only",
    ),
    ("form_ms", "ms", 3, "time to form a batch (`get_next_batch_to_run`)"),
    (
        "run_ms",
        "ms",
        2,
        "time of the call that runs a batch; on a GPU that is the launch, on a CPU the whole forward pass",
    ),
    (
        "step_ms",
        "ms",
        2,
        "from the launch of a pass to the launch of the next, where the scheduler had work throughout",
    ),
    ("process_ms", "ms", 3, "time to process a batch's result"),
    (
        "gap_ms",
        "ms",
        3,
        "from the end of the call that ran a batch to the next such call, where the scheduler had work throughout",
    ),
    ("late", "", 2, "1 when a pass's result was processed after the next pass had been launched"),
    ("requests", "requests", 1, "requests in a batch"),
    ("new_tokens", "tokens", 0, "tokens computed in a pass"),
    ("running", "requests", 1, "requests in the running batch"),
    ("waiting", "requests", 1, "requests in the queue after the batch was formed"),
    ("kv_used", "tokens", 0, "KV slots in use"),
    ("kv_free", "tokens", 0, "KV slots free"),
    ("kv_evictable", "tokens", 0, "KV slots held by the tree for nobody in particular"),
    ("slots_used", "requests", 0, "rows of the request table in use"),
)

METRICS = {
    column: Metric(column=column, unit=unit, means=means, decimals=decimals)
    for column, unit, decimals, means in _TABLE
}
