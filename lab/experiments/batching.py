"""How does continuous batching fill a batch: joining, leaving, waiting, and giving up a place when memory runs out?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Published, Variant
from lab.workload import RandomIds

OUTPUT_TOKENS = 128
# KV slots for five requests of 256 + 128 tokens; the fast load has more than that under way.
TIGHT_POOL_TOKENS = 2048


def fast(column: str) -> Measure:
    return Measure(table="loads", load="fast", column=column)


EXPERIMENT = Experiment(
    name="batching",
    question="How does SGLang form its batches while requests come and go, and what gives when the KV pool is full?",
    mechanism="""\
A static batch waits until it is full and ends when its longest answer ends. SGLang's scheduler decides anew **before every forward
pass**. In each turn of its loop it first takes in what has arrived, then asks: may any waiting request start? If so, the
pass is a **prefill** of those requests alone, and everybody who is decoding waits for it; if not, the pass is a **decode**
that gives each running request one more token. After a prefill its requests are merged into the running batch, and whoever has its last token
is filtered out. So requests **join and leave a batch that never stops**, its size follows the load (by Little's law: arrival rate times the
time a request stays), and prefills cut into the token streams of the others.

Whether a request may start is a bet on memory. It needs KV slots for its prompt now and for its answer later. `PrefillAdder` sets aside only
a part of what the running requests may still generate, the **new-token ratio**: 0.7 at the start times `--schedule-conservativeness`, falling
with every decode pass, because most answers end early. If too many were let in, a decode pass finds no free slot, and the
scheduler **retracts** requests: those with the fewest output tokens lose their KV entries and go back to the queue, with the tokens they have;
the ratio is raised to what was really used. Later their prompt and answer so far are prefilled again. No request fails, but work is done twice.

`slow` and `fast` are the same requests (256 tokens in, 128 out, no two alike) at two rates. `roomy` has the pool the machine
gives. `tight` has 2,048 slots, five whole requests, and bets carelessly (conservativeness 0.01), so it must retract.""",
    sources=(
        "`sglang/srt/managers/scheduler.py`: `get_next_batch_to_run` (merge, prefill first, else decode), `update_running_batch` (filter, retract)",
        "`sglang/srt/managers/schedule_policy.py`: `PrefillAdder.add_one_req`, which compares a request's tokens with what is left",
        "`sglang/srt/managers/schedule_batch.py`: `merge_batch`, `filter_batch`, `check_decode_mem`, `retract_decode`",
        "`sglang/srt/managers/scheduler_components/new_token_ratio_tracker.py` (0.4.6: in `Scheduler.init_memory_pool_and_cache` and `update_running_batch`)",
    ),
    server=(),
    variants=(
        Variant(name="roomy", says="the pool the machine gives, careful about memory"),
        Variant(
            name="tight", says="a pool for five requests, careless about memory",
            args=("--max-total-tokens", str(TIGHT_POOL_TOKENS), "--schedule-conservativeness", "0.01"),
        ),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=400, prompts=3, input_tokens=256, output_tokens=16),
        RandomIds(
            name="slow", seed=410, prompts=100, input_tokens=256, output_tokens=OUTPUT_TOKENS, rate_per_s=5.0,
            variants=("roomy",), small={"prompts": 8, "rate_per_s": 2.0},
        ),
        RandomIds(
            name="fast", seed=420, prompts=500, input_tokens=256, output_tokens=OUTPUT_TOKENS, rate_per_s=50.0,
            small={"prompts": 60, "rate_per_s": 12.0},
        ),
    ),
    claims=(
        Claim(
            name="batch-follows-load",
            says="Five times the rate or more makes the mean decode batch at least three times as large.",
            measure=fast("running_mean"), base=Measure(table="loads", load="slow", column="running_mean"),
            variant="roomy", op=">", threshold=3,
        ),
        Claim(
            name="batch-size-changes", says="One load sees decode batches of many sizes.",
            measure=Measure(table="forwards", load="fast", column="requests", rows="decode", reduce="distinct"),
            variant="roomy", op=">=", threshold=8,
        ),
        Claim(
            name="join", says="Requests join a batch that is running: most prefill passes begin while others decode.",
            measure=fast("joined_passes"), base=fast("prefill_passes"), variant="roomy", op=">", threshold=0.8,
        ),
        Claim(
            name="leave", says="Requests leave a batch that goes on without them.",
            measure=fast("left_passes"), variant="roomy", op=">=", threshold=10,
        ),
        Claim(
            name="interleave", says="Prefill and decode alternate: prefill passes follow directly on decode passes.",
            measure=fast("alternations"), variant="roomy", op=">=", threshold=10,
        ),
        Claim(
            name="forming-is-cheap", says="Deciding what to run takes less than a tenth of the time in which there is work.",
            measure=fast("form_share"), variant="roomy", op="<", threshold=0.1,
        ),
        Claim(
            name="forming-is-quick",
            says="Nor is it slow now and then: 99 of 100 decisions take less than half the time between two tokens.",
            measure=Measure(table="forwards", load="fast", column="form_ms", reduce="p99"),
            base=Measure(table="requests", load="fast", column="tpot_ms"), variant="roomy", op="<", threshold=0.5,
        ),
        Claim(
            name="tokens-come-slower",
            says="The streams pay for company: time per output token grows with the batch and the prefills in between.",
            measure=Measure(table="requests", load="fast", column="tpot_ms"),
            base=Measure(table="requests", load="slow", column="tpot_ms"), variant="roomy", op=">", threshold=1.2,
        ),
        Claim(
            name="no-retraction-with-room", says="With room for all nobody is retracted.",
            measure=fast("retracted_requests"), variant="roomy", op="<=", threshold=0,
        ),
        Claim(
            name="retraction", says="Under pressure running requests are put back into the queue.",
            measure=fast("retracted_requests"), variant="tight", op=">=", threshold=1,
        ),
        Claim(
            name="full-length", says="Every request still gets its whole answer.",
            measure=Measure(table="requests", load="fast", column="completion_tokens", reduce="min"),
            variant="tight", op=">=", threshold=OUTPUT_TOKENS,
        ),
        Claim(
            name="work-twice", says="What was retracted is computed again: more tokens are prefilled than without pressure.",
            measure=Measure(table="forwards", load="fast", column="new_tokens", rows="prefill", reduce="sum"),
            variant="tight", against="roomy", op=">", threshold=1,
        ),
        Claim(
            name="queue-under-pressure",
            says="Without pressure a request waits for the pass that runs, under pressure for somebody's end: 95 of 100 wait far less.",
            measure=Measure(table="requests", load="fast", column="wait_ms", reduce="p95"),
            variant="tight", against="roomy", op=">", threshold=3,
        ),
    ),
    published=(
        Published(
            figure="median TPOT 13.17 ms at 4 requests/s, 17.85 ms at 8",
            setup="SGLang 0.3, 1 A100 80GB, Llama-3.1-8B-Instruct, ShareGPT",
            source="SGLang's repository, benchmark/benchmark_vllm_060/README.md",
            comparable="in kind: the same effect of load on decode, with other lengths, another release and model",
        ),
    ),
    repeats=3,
    probe="requests",
    pictures=("batches", "pools", "ttft"),
    try_next=(
        "Give `tight` `--schedule-conservativeness 1`: fewer bets are lost, and requests wait longer before they start.",
        "Add a variant with `--enable-mixed-chunk`: prompts are then prefilled in the same pass as the decodes, and alternations vanish.",
        "Add `--max-running-requests 8` to a variant of its own: the batch stops growing at 8 and the queue takes over.",
    ),
)
