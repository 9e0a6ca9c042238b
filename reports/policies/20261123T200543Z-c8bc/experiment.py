"""Who goes first: fcfs, lpm, dfs-weight and random, and what the order of service does to the prefix cache."""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Published, Variant
from lab.workload import RandomIds, SharedPrefix

# KV slots for two and a half of the eight prefixes: which prefixes are left depends on who was served.
POOL_TOKENS = 3072
# Above this many waiting requests lpm gives up sorting: `SchedulePolicy._determine_active_policy`, in 0.4.6 and 0.5.21.
LPM_QUEUE = 128


def mixed(column: str) -> Measure:
    return Measure(table="loads", load="mixed", column=column)


MEAN_TTFT = Measure(table="requests", load="mixed", column="ttft_ms", reduce="mean")

EXPERIMENT = Experiment(
    name="policies",
    question="What do SGLang's scheduling policies change: who is served first, how much of the cache is used, who waits?",
    mechanism="""\
Before each prefill the scheduler puts its waiting queue in order (`SchedulePolicy.calc_priority`) and then takes requests from the front as
long as there is room. **fcfs**, the default, leaves the order of arrival. **random** shuffles. Two policies look into the radix tree first:
**lpm** (longest prefix match) sorts by how many tokens of each prompt are cached *now*; **dfs-weight** walks down the tree and takes the
branch with the most waiting requests first, to its end. Both thus serve all requests of one prefix one after the other, while it is in the
pool; fcfs takes them as they come, and a prefix may be evicted between two requests that share it.

When many of the waiting share a prefix that is *not* cached yet, lpm lets only the first of them go ahead and puts the others at the end of
the queue, until that one has filled the cache (the "in-batch" check, from 32 shared tokens on).

Order has a price. A match for every waiting request in every turn costs time, so **above 128 waiting requests lpm falls back to fcfs**. And
nothing keeps a request with an unpopular prefix from being overtaken again and again: the mean falls, the fairness too.

The server runs one request at a time in a pool of 3,072 KV slots: about two and a half of the eight prefixes of 1,024 tokens. 40 requests,
five to a prefix, shuffled, all arrive at once. `crowd` sends 160 small requests at once, so that the queue is longer than 128 at first and
shorter later. With a pool that holds every prefix, or a queue that is empty, all policies are the same.""",
    sources=(
        "`sglang/srt/managers/schedule_policy.py`: `SchedulePolicy.calc_priority`, `_determine_active_policy` (the 128), `_compute_prefix_matches` (the in-batch check)",
        "`sglang/srt/managers/schedule_policy.py`: `_sort_by_longest_prefix`, `_sort_by_dfs_weight` (0.5.21: `dfs_weight_order` in the tree)",
        "`sglang/srt/managers/scheduler.py`: `get_new_batch_prefill`, which sorts, then admits from the front",
    ),
    server=("--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", "1"),
    variants=(
        Variant(name="fcfs", says="first come, first served: the default", args=("--schedule-policy", "fcfs")),
        Variant(name="lpm", says="longest cached prefix first", args=("--schedule-policy", "lpm")),
        Variant(name="dfs-weight", says="the branch of the tree with the most waiting first", args=("--schedule-policy", "dfs-weight")),
        Variant(name="random", says="shuffled: the control without any order", args=("--schedule-policy", "random")),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=500, prompts=2, input_tokens=1024, output_tokens=8),
        SharedPrefix(name="mixed", seed=510, groups=8, prompts_per_group=5, concurrency=40, prefix_tokens=1024, question_tokens=32, output_tokens=4),
        RandomIds(name="crowd", seed=1054, prompts=160, concurrency=160, variants=("lpm",), input_tokens=32, output_tokens=2),
    ),
    claims=(
        Claim(name="fcfs-keeps-order", says="fcfs serves in the order of arrival, without exception.",
              measure=mixed("order_kept"), variant="fcfs", op=">=", threshold=1),
        Claim(name="random-keeps-none", says="random does not: about half of all neighbours are in order, as in a shuffled pack.",
              measure=mixed("order_kept"), variant="random", op="<", threshold=0.8),
        Claim(name="lpm-stays-in-group", says="lpm stays with a prefix while it is cached: it changes the prefix less than half as often as fcfs.",
              measure=mixed("group_switches"), variant="lpm", against="fcfs", op="<", threshold=0.5),
        Claim(name="lpm-hits-more", says="So lpm finds more in the cache than fcfs.",
              measure=mixed("hit_rate"), variant="lpm", against="fcfs", by="difference", op=">", threshold=0.15),
        Claim(name="dfs-hits-more", says="So does dfs-weight.",
              measure=mixed("hit_rate"), variant="dfs-weight", against="fcfs", by="difference", op=">", threshold=0.15),
        Claim(name="random-hits-no-more", says="Disorder alone brings nothing: random finds no more than lpm does.",
              measure=mixed("hit_rate"), variant="random", against="lpm", by="difference", op="<", threshold=-0.15),
        Claim(name="lpm-mean-ttft", says="Less to compute, less to wait: lpm's mean time to first token is below that of fcfs.",
              measure=MEAN_TTFT, variant="lpm", against="fcfs", op="<", threshold=0.9),
        Claim(name="dfs-mean-ttft", says="The same with dfs-weight.",
              measure=MEAN_TTFT, variant="dfs-weight", against="fcfs", op="<", threshold=0.9),
        Claim(name="lpm-sorts-short-queues", says="lpm is in force at queues of up to 128 requests.",
              measure=Measure(table="loads", load="crowd", column="asked_waiting_max"), variant="lpm", op="<=", threshold=LPM_QUEUE),
        Claim(name="lpm-gives-up-long-queues", says="Above that another policy is: fcfs takes over.",
              measure=Measure(table="loads", load="crowd", column="fallback_waiting_min"), variant="lpm", op=">=", threshold=LPM_QUEUE),
    ),
    published=(
        Published(
            figure="cache hit rate 50 to 99 %, 96 % of the optimum on average (seen in secondary texts only)",
            setup="RadixAttention with cache-aware scheduling, workloads of the paper",
            source="said to be in arXiv:2312.07104; not confirmed in the paper itself",
            comparable="no: other loads, pools and models, and an unconfirmed figure",
        ),
    ),
    repeats=3, probe="requests", pictures=("service", "cached-share", "ttft"),
    try_next=(
        "Set `POOL_TOKENS` to 8192 in `lab/experiments/policies.py`: every prefix fits, and the policies become one.",
        "Set `--max-running-requests 4`: requests of one prefix then start together, and the in-batch check has something to do.",
        "Add `--disable-radix-cache` to lpm: without a tree SGLang quietly serves fcfs.",
    ),
)
