"""The numbers of the tables: column, unit, and how each is defined. The report prints these definitions.

Client columns are what bench_serving or the chat program saw; server columns are SGLang's own record of
the request; the names are the field's usual ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column: its `unit` ("" for a plain number), what it means, and how many decimals are worth printing."""

    column: str
    unit: str
    means: str
    decimals: int = 1


METRICS = {
    m.column: m
    for m in (
        Metric(
            column="ttft_ms",
            unit="ms",
            means="time to first token: from the client sending the request to the first streamed token",
        ),
        Metric(
            column="itl_ms",
            unit="ms",
            means="inter-token latency: the request's median gap between streamed tokens",
            decimals=2,
        ),
        Metric(column="e2e_ms", unit="ms", means="from the client sending the request to its last token"),
        Metric(
            column="queue_ms", unit="ms", means="time the request waited in the server's queue", decimals=2
        ),
        Metric(
            column="server_ttft_ms",
            unit="ms",
            means="time to first token by the server's own clock (first_token_latency)",
        ),
        Metric(
            column="prompt_tokens", unit="tokens", means="prompt length as the server counted it", decimals=0
        ),
        Metric(
            column="cached_tokens",
            unit="tokens",
            means="prompt tokens whose KV entries were found in the radix cache",
            decimals=0,
        ),
        Metric(
            column="cached_share", unit="", means="cached_tokens / prompt_tokens of a request", decimals=3
        ),
        Metric(
            column="hit_rate",
            unit="",
            means="cached over prompt tokens of all requests of a load",
            decimals=3,
        ),
        Metric(
            column="predicted_hit_rate",
            unit="",
            means="the hit rate an unbounded cache would show, computed from the prompts that were sent",
            decimals=3,
        ),
        Metric(
            column="hit_rate_lost",
            unit="",
            means="predicted_hit_rate - hit_rate: what eviction took",
            decimals=3,
        ),
        Metric(
            column="lru_hit_rate",
            unit="",
            means="the hit rate of a model cache of the pool's size that evicts least recently used leaves (lab/lru.py)",
            decimals=3,
        ),
        Metric(
            column="lru_agreement",
            unit="",
            means="share of repeated prefixes for which that model and the server agree on found or evicted",
            decimals=3,
        ),
        Metric(
            column="evicted_tokens",
            unit="tokens",
            means="KV slots freed by eviction during the load (sglang:evicted_tokens_total)",
            decimals=0,
        ),
        Metric(
            column="groups_evicted",
            unit="groups",
            means="prefix groups that had been computed, were asked for again, and were no longer cached",
            decimals=1,
        ),
    )
}
