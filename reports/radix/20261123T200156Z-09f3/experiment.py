"""How does RadixAttention's prefix cache behave: cold, warm, and under a pool that is too small?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Published, Variant
from lab.workload import Chat, RandomIds, SharedPrefix

# The pool of KV slots holds the working set of `chat` and `shared`, and less than half of that of `pressure`.
POOL_TOKENS = 8192


def loads(load: str, column: str) -> Measure:
    return Measure(table="loads", load=load, column=column)


def ttft_later(load: str) -> Measure:
    return Measure(table="requests", load=load, column="ttft_ms", rows="later")


EXPERIMENT = Experiment(
    name="radix",
    question="How does RadixAttention's prefix cache behave: what does it save, and when does it forget?",
    mechanism="""\
SGLang keeps the KV entries of finished requests in a **radix tree**: each edge holds a run of token ids together with the KV slots computed
for it. A new prompt walks down the tree from the root; as far as its tokens match, its KV entries are taken from the tree, and only the
rest is prefilled. At least one token is always computed, because its logits choose the first output token.

That makes three things observable. The **first** request with a prefix finds nothing: `cached_tokens` is 0 and it pays the full prefill.
**Later** requests find the prefix: they prefill only their own question, so their time to first token falls. The tree **grows by what is
new**: a first request adds prompt and answer, a later one only its own question and answer, so a prefix is stored once, however many share
it. The tree lives in the same pool of KV slots as running requests; when a new request needs slots and none are free, **leaves are evicted,
least recently used first** (`lru`). A prefix becomes a leaf once all that hangs below it is gone; evicted, it is computed again by the next
request that needs it, as if it had never been seen. With `lfu` the leaf that was **used least often** goes first, the older one
of equals; whether that finds more depends on the load.

The server runs with a pool of 8,192 KV slots. `chat` and `shared` fit into it; `pressure` needs about 18,000, so the cache has to forget.
Requests are sent one at a time: time to first token is then prefill time, with no queue in it, and the order of cache accesses is known.""",
    sources=(
        "`sglang/srt/mem_cache/radix_cache.py`: `match_prefix`, `insert`, `evict` (0.5.21: `unified_radix_cache.py`, same operations)",
        "`sglang/srt/managers/schedule_policy.py`: `PrefillAdder`, where a request's matched prefix is subtracted from its cost",
        "`sglang/srt/mem_cache/memory_pool.py`: the slots the tree's entries point to; `evict_policy.py` (0.5.21): what goes first",
    ),
    server=("--max-total-tokens", str(POOL_TOKENS)),
    variants=(
        Variant(name="cache-on", says="SGLang as it comes, radix cache on"),
        Variant(name="cache-off", says="the control: no prefix reuse", args=("--disable-radix-cache",)),
        Variant(name="lfu", says="evicts what was used least often", args=("--radix-eviction-policy", "lfu")),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=100, prompts=3, input_tokens=2048, output_tokens=16),
        Chat(
            name="chat", seed=0, variants=("cache-on", "cache-off"), questions=("What is Python?", "What is JavaScript?", "What is Rust?"),
            system_chars=8500, system_tokens=2010, output_tokens=32,
        ),
        SharedPrefix(
            name="shared", seed=200, groups=2, prompts_per_group=6, variants=("cache-on", "cache-off"),
            prefix_tokens=2048, question_tokens=64, output_tokens=16,
        ),
        SharedPrefix(
            name="pressure", seed=300, groups=8, prompts_per_group=3, variants=("cache-on", "lfu"),
            prefix_tokens=2048, question_tokens=64, output_tokens=16,
        ),
    ),
    claims=(
        Claim(name="cold-start", says="The first request of a prefix is a full prefill: nothing of it comes from the cache.",
              measure=Measure(table="requests", load="chat", column="cached_tokens", rows="first", reduce="max"),
              variant="cache-on", op="<=", threshold=0),
        Claim(name="prefix-hit", says="Later requests take the shared system prompt from the cache.",
              measure=Measure(table="requests", load="chat", column="cached_share", rows="later", reduce="min"),
              variant="cache-on", op=">", threshold=0.9),
        Claim(name="ttft-falls", says="Their time to first token falls, against the same requests without the cache.",
              measure=ttft_later("chat"), variant="cache-on", against="cache-off", op="<", threshold=0.7),
        Claim(name="hit-share", says="With a pool that holds the working set, most prompt tokens come from the cache.",
              measure=loads("shared", "hit_rate"), variant="cache-on", op=">", threshold=0.7),
        Claim(name="ttft-falls-shared", says="The same holds with more prefixes: time to first token of later requests falls.",
              measure=ttft_later("shared"), variant="cache-on", against="cache-off", op="<", threshold=0.7),
        Claim(name="stored-once", says="Sharing saves memory: the tree stores less than a third of what caches of their own would hold.",
              measure=loads("shared", "saved_share"), variant="cache-on", op=">", threshold=0.67),
        Claim(name="nothing-forgotten", says="As long as the pool holds everything, no node is evicted.",
              measure=loads("shared", "nodes_evicted"), variant="cache-on", op="<=", threshold=0),
        Claim(name="tree-fills-pool", says="Under pressure the tree grows until it fills the pool, but for the request that runs.",
              measure=loads("pressure", "tree_tokens_max"), variant="cache-on", op=">", threshold=0.7 * POOL_TOKENS),
        Claim(name="eviction", says="A pool smaller than the working set evicts prefixes that are asked for again.",
              measure=loads("pressure", "groups_evicted"), variant="cache-on", op=">=", threshold=1),
        Claim(name="eviction-cost", says="Eviction costs hits: at least a tenth of the prompt tokens that a cache without limit would have served.",
              measure=loads("pressure", "hit_rate_lost"), variant="cache-on", op=">", threshold=0.1),
        Claim(name="eviction-order",
              says="What is forgotten is what was used least recently: an LRU model tells for each request whether its prefix is left.",
              measure=loads("pressure", "lru_agreement"), variant="cache-on", op=">", threshold=0.9),
        Claim(name="oldest-first", says="Within one eviction the nodes go in the order of their last use.",
              measure=loads("pressure", "evicted_old_first"), variant="cache-on", op=">", threshold=0.8),
        Claim(name="lfu-other-order", says="lfu goes by another order: more often a younger node goes before an older one.",
              measure=loads("pressure", "evicted_old_first"), variant="lfu", against="cache-on", by="difference", op="<", threshold=-0.05),
    ),
    probe="cache", pictures=("ttft", "cached-share", "eviction", "tree"),
    published=(
        Published(
            figure="hit rate 75 % against 20 %, throughput 158,596 against 82,665 tokens/s",
            setup="SGLang 0.4, 8 A100 80GB, Llama-3.1-8B, 8 replicas, generated-shared-prefix; cache-aware load balancing against none",
            source="lmsys.org/blog/2024-12-04-sglang-v0-4",
            comparable="no: it compares two ways of routing to caches, not cache against none; the load is of the same kind",
        ),
        Published(
            figure="up to 6.4 times the throughput",
            setup="RadixAttention and the frontend language against other systems of 2023", source="abstract of arXiv:2312.07104",
            comparable="no: other systems, GPUs and programs",
        ),
    ),
    try_next=(
        "Raise `POOL_TOKENS` in `lab/experiments/radix.py` to 32768 and run again: eviction should vanish from `pressure`.",
        "Set `concurrency=4` on `shared`: requests of one group that arrive together cannot hit what none of them has finished computing.",
        "Add a variant with `--schedule-policy lpm` and a concurrency above 1: the scheduler then serves longest prefix first.",
    ),
)
