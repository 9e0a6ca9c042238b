"""How do the two memory pools fill and free over a load, where is the knee, and what does a page size cost?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import RandomIds

AT_ONCE, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 40, 100
# All 16 at once hold 16 x 140 = 2240 tokens: a quarter and a half of that, and more.
DEMAND_TOKENS = AT_ONCE * (PROMPT_TOKENS + OUTPUT_TOKENS)
POOLS = (560, 1120, 2688, 5376)


def burst(column: str) -> Measure:
    return Measure(table="loads", load="burst", column=column)


EXPERIMENT = Experiment(
    name="memory",
    question="How do SGLang's two memory pools fill, fragment and free, and how small may they be before requests pay for it?",
    mechanism="""\
SGLang allocates its KV memory once, at the start, and hands it out itself. **Two levels** lead from a request to its keys and values.
`ReqToTokenPool` is a table with a row, a **slot**, for each running request: column i says *where* the KV entry of its i-th token lies.
`TokenToKVPool` is that where: one long array of **token slots** in each layer, with a free list. A prefill takes one row, and a token slot
for each token it computes; a decode pass takes one token slot a request. When a request ends, its row is free at once. Its token slots go
to the radix tree, which keeps them **evictable**: used by nobody, taken back as soon as somebody needs them. "Used" means neither free nor
evictable; it falls to 0 when nobody runs, and SGLang checks at idle turns that the sum still fits.

Any token slot serves any token, so at **page size 1** the pool cannot fragment: all that is free is usable. With **larger pages** the free
list holds whole pages, which some kernels read faster. Each request then leaves a part of its last page empty (internal fragmentation, half
a page on average), and only whole pages are shared through the tree.

`--max-total-tokens` sets the pool's size; without it SGLang measures the GPU, takes `--mem-fraction-static` of it and subtracts the
weights. In `burst` 16 requests of 40 + 100 tokens are always under way: 2,240 tokens if all run. Above this **knee** a larger pool changes
nothing. Below, requests wait in the queue, fewer run at once, and since the scheduler bets on memory (conservativeness 0.01 here; see
`batching`) some are retracted. `alone` sends one request after the other: each must find everything that its predecessors used either free
or evictable.""",
    sources=(
        "`sglang/srt/mem_cache/memory_pool.py`: `ReqToTokenPool`, `MHATokenToKVPool`",
        "`sglang/srt/mem_cache/allocator/token.py` and `paged.py`: the free lists (0.4.6: `memory_pool.py`, `paged_allocator.py`)",
        "`sglang/srt/mem_cache/allocation.py`: `alloc_for_extend`, which evicts from the tree when the free list is short (0.4.6: `ScheduleBatch.alloc_token_slots`)",
        "`sglang/srt/model_executor/pool_configurator.py`: from `--mem-fraction-static` to tokens (0.4.6: `ModelRunner.profile_max_num_token`)",
    ),
    server=("--schedule-conservativeness", "0.01"),
    variants=(
        *(Variant(name=f"pool-{n}", says=f"a pool of {n} token slots", args=("--max-total-tokens", str(n))) for n in POOLS),
        Variant(
            name="page-64", says="5376 token slots in pages of 64; the paged allocator is a Triton kernel",
            args=("--max-total-tokens", "5376", "--page-size", "64"), needs=("gpu",),
        ),
        Variant(name="half-gpu", says="half of the GPU for weights and pool", args=("--mem-fraction-static", "0.5"), needs=("gpu",)),
        Variant(name="most-gpu", says="0.85 of the GPU", args=("--mem-fraction-static", "0.85"), needs=("gpu",)),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=600, prompts=3, input_tokens=PROMPT_TOKENS, output_tokens=8),
        RandomIds(name="burst", seed=610, prompts=32, concurrency=AT_ONCE, input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS),
        RandomIds(
            name="stream", seed=631, prompts=24, rate_per_s=60.0, variants=("pool-1120", "pool-5376"),
            input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS,
        ),
        RandomIds(name="alone", seed=620, prompts=5, input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS),
    ),
    claims=(
        Claim(name="a-row-a-request", says="With room, every request in flight has its row in the request table.",
              measure=burst("slots_used_max"), variant="pool-5376", op=">=", threshold=AT_ONCE),
        Claim(name="to-the-token", says="And the token pool holds what these requests need, and nothing else.",
              measure=burst("kv_used_max"), variant="pool-5376", op="<=", threshold=1.05 * DEMAND_TOKENS),
        Claim(name="tokens-run-out-first", says="In the smallest pool tokens run out, not rows: 14 prompts of 40 fill it.",
              measure=burst("slots_used_max"), variant="pool-560", op="<=", threshold=POOLS[0] // PROMPT_TOKENS),
        *(
            Claim(name=f"fills-{n}", says=f"A pool of {n}, below the knee, is used to the brim.",
                  measure=burst("kv_used_share_max"), variant=f"pool-{n}", op=">", threshold=0.9)
            for n in POOLS[:2]
        ),
        Claim(name="waits", says="Below the knee there is a queue.",
              measure=burst("waiting_max"), variant="pool-1120", op=">=", threshold=1),
        Claim(name="retracts", says="Requests that come one by one are let in one by one: too many, and some are put back.",
              measure=Measure(table="loads", load="stream", column="retracted_requests"), variant="pool-1120", op=">=", threshold=1),
        Claim(name="retracts-none", says="With room for all, nobody is.",
              measure=Measure(table="loads", load="stream", column="retracted_requests"), variant="pool-5376", op="<=", threshold=0),
        Claim(name="small-pool-small-batch", says="A quarter of the demand runs less than half as many requests at once as a pool with room.",
              measure=burst("running_mean"), variant="pool-560", against="pool-5376", op="<", threshold=0.5),
        Claim(name="knee", says="Above the knee twice the pool brings nothing: the batch stays the same.",
              measure=burst("running_mean"), variant="pool-5376", against="pool-2688", op="<", threshold=1.1),
        Claim(name="all-is-freed", says="Ended requests hold nothing: whoever starts alone sees no slot in use but those of its own prompt.",
              measure=Measure(table="forwards", load="alone", column="kv_used", rows="prefill", reduce="max"),
              variant="pool-560", op="<=", threshold=1.5 * PROMPT_TOKENS),
        Claim(name="cache-gives-way",
              says="What the tree keeps is taken back at need: five requests need 700 tokens of a pool of 560, one after the other.",
              measure=Measure(table="loads", load="alone", column="evicted_tokens"), variant="pool-560", op=">=", threshold=1),
        Claim(name="pages-waste", says="Pages of 64 cost memory: 140 tokens take three pages, 192 slots.",
              measure=burst("kv_used_max"), variant="page-64", against="pool-5376", op=">", threshold=1.1, needs=("gpu",)),
        Claim(name="fraction-buys-tokens", says="The pool grows faster than the fraction (1.7 times), because the weights are subtracted first.",
              measure=burst("pool_tokens"), variant="most-gpu", against="half-gpu", op=">", threshold=1.7, needs=("gpu",)),
    ),
    repeats=3, probe="requests", pictures=("pools", "batches", "measures"),
    try_next=(
        "Set `--schedule-conservativeness` to 1 in `server`: the small pools wait more and retract less.",
        "Give `burst` prompts of 130 and answers of 10 tokens: almost all memory is then claimed on admission, and no bet is lost.",
        "Add `--max-running-requests 8`: now the rows run out first, and a pool of 1,120 is enough.",
    ),
)
