"""How does continuous batching fill a batch: joining, leaving, waiting, and giving up a place when memory runs out?"""

from lab.claims import Claim, Measure, Reduce
from lab.experiment import Experiment, Published, Variant
from lab.workload import RandomIds

OUTPUT_TOKENS = 128
# Of `surge`, with 64 + 192 tokens a request, the tight pool holds 16 whole ones. Careless about memory, far more are let in.
SURGE_TOKENS, TIGHT_POOL = 192, 4096


def loads(load: str, column: str) -> Measure:
    return Measure(table="loads", load=load, column=column)


def requests(load: str, column: str, reduce: Reduce = "median") -> Measure:
    return Measure(table="requests", load=load, column=column, reduce=reduce)


EXPERIMENT = Experiment(
    name="batching",
    question="How does SGLang form its batches while requests come and go, and what gives when the KV pool is full?",
    mechanism="""\
A static batch waits until it is full and ends when its longest answer ends. SGLang's scheduler decides anew **before every forward pass**.
In each turn of its loop it first takes in what has arrived, then asks: may any waiting request start? If so, the pass is a **prefill** of
those requests alone, and everybody who is decoding waits for it; if not, the pass is a **decode** that gives each running request one more
token. After a prefill its requests are merged into the running batch, and whoever has its last token is filtered out. So requests **join
and leave a batch that never stops**, its size follows the load (by Little's law: arrival rate times the time a request stays), and prefills
cut into the token streams of the others.

Whether a request may start is a bet on memory. It needs KV slots for its prompt now and for its answer later. `PrefillAdder` sets aside
only a part of what the running requests may still generate, the **new-token ratio**: 0.7 at the start times `--schedule-conservativeness`,
falling with every decode pass, because most answers end early. If too many were let in, a decode pass finds no free slot, and the scheduler
**retracts** requests: those with the fewest output tokens lose their KV entries and go back to the queue, with the tokens they have; the
ratio is raised to what was really used. Later their prompt and answer so far are prefilled again. No request fails, but work is done twice.

`slow` and `fast` are the same kind of requests (256 tokens in, 128 out, no two alike) at two rates; `surge` has short prompts and long
answers and comes faster still. `roomy` has the pool the machine gives; `tight` 4,096 slots, 16 whole requests of `surge`, and it bets
carelessly (conservativeness 0.01).""",
    sources=(
        "`sglang/srt/managers/scheduler.py`: `get_next_batch_to_run` (merge, prefill first, else decode), `update_running_batch` (filter, retract)",
        "`sglang/srt/managers/schedule_policy.py`: `PrefillAdder.add_one_req`, which compares a request's tokens with what is left",
        "`sglang/srt/managers/schedule_batch.py`: `merge_batch`, `filter_batch`, `check_decode_mem`, `retract_decode`",
        "`sglang/srt/managers/scheduler_components/new_token_ratio_tracker.py` (0.4.6: in `Scheduler`)",
    ),
    server=(),
    variants=(
        Variant(name="roomy", says="the pool the machine gives, careful about memory"),
        Variant(name="tight", says="a small pool, careless", args=("--max-total-tokens", str(TIGHT_POOL), "--schedule-conservativeness", "0.01")),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=400, prompts=3, input_tokens=256, output_tokens=16),
        RandomIds(
            name="slow", seed=410, prompts=100, input_tokens=256, output_tokens=OUTPUT_TOKENS, rate_per_s=5.0,
            variants=("roomy",), small={"prompts": 8, "rate_per_s": 2.0},
        ),
        RandomIds(
            name="fast", seed=420, prompts=500, input_tokens=256, output_tokens=OUTPUT_TOKENS, rate_per_s=50.0,
            variants=("roomy",), small={"prompts": 60, "rate_per_s": 12.0},
        ),
        RandomIds(
            name="surge", seed=430, prompts=200, input_tokens=64, output_tokens=SURGE_TOKENS, rate_per_s=200.0,
            small={"prompts": 48, "rate_per_s": 60.0},
        ),
    ),
    claims=(
        Claim(name="batch-follows-load", says="Five times the rate or more makes the mean decode batch at least three times as large.",
              measure=loads("fast", "running_mean"), base=loads("slow", "running_mean"), variant="roomy", op=">", threshold=3),
        Claim(name="batch-size-changes", says="One load sees decode batches of many sizes.",
              measure=Measure(table="forwards", load="fast", column="requests", rows="decode", reduce="distinct"), variant="roomy", op=">=", threshold=8),
        Claim(name="join", says="Requests join a batch that is running: most prefill passes begin while others decode.",
              measure=loads("fast", "joined_passes"), base=loads("fast", "prefill_passes"), variant="roomy", op=">", threshold=0.8),
        Claim(name="leave", says="Requests leave a batch that goes on without them.",
              measure=loads("fast", "left_passes"), variant="roomy", op=">=", threshold=10),
        Claim(name="interleave", says="Prefill and decode alternate: prefill passes follow directly on decode passes.",
              measure=loads("fast", "alternations"), variant="roomy", op=">=", threshold=10),
        Claim(name="forming-is-cheap", says="Deciding what to run takes less than a tenth of the time in which there is work.",
              measure=loads("fast", "form_share"), variant="roomy", op="<", threshold=0.1),
        Claim(name="forming-is-quick", says="Nor is it slow now and then: 99 of 100 decisions take less than half the time between two tokens.",
              measure=Measure(table="forwards", load="fast", column="form_ms", reduce="p99"), base=requests("fast", "tpot_ms"), variant="roomy", op="<", threshold=0.5),
        Claim(name="tokens-come-slower", says="The streams pay for company: time per output token grows with the batch and the prefills in between.",
              measure=requests("fast", "tpot_ms"), base=requests("slow", "tpot_ms"), variant="roomy", op=">", threshold=1.2),
        Claim(name="no-retraction-with-room", says="With room for all nobody is retracted.",
              measure=loads("surge", "retracted_requests"), variant="roomy", op="<=", threshold=0),
        Claim(name="retraction", says="Under pressure running requests are put back into the queue.",
              measure=loads("surge", "retracted_requests"), variant="tight", op=">=", threshold=1),
        Claim(name="full-length", says="Every request still gets its whole answer.",
              measure=requests("surge", "completion_tokens", "min"), variant="tight", op=">=", threshold=SURGE_TOKENS),
        Claim(name="work-twice", says="What was retracted is computed again: more tokens are prefilled than without pressure.",
              measure=Measure(table="forwards", load="surge", column="new_tokens", rows="prefill", reduce="sum"),
              variant="tight", against="roomy", op=">", threshold=1),
        Claim(name="queue-under-pressure",
              says="Without pressure a request waits for the pass that runs, under pressure for somebody's end: p95 is over three times as long.",
              measure=requests("surge", "wait_ms", "p95"), variant="tight", against="roomy", op=">", threshold=3),
    ),
    published=(
        Published(
            figure="median TPOT 13.17 ms at 4 requests/s, 17.85 ms at 8",
            setup="SGLang 0.3, 1 A100 80GB, Llama-3.1-8B-Instruct, ShareGPT", source="SGLang's repository, benchmark/benchmark_vllm_060/README.md",
            comparable="in kind: the same effect of load on decode, with other lengths, another release and model",
        ),
    ),
    repeats=3, probe="requests", pictures=("batches", "pools", "ttft"),
    try_next=(
        "Give `tight` `--schedule-conservativeness 1`: fewer bets are lost, and requests wait longer before they start.",
        "Add a variant with `--enable-mixed-chunk`: prompts are then prefilled in the same pass as the decodes, and alternations vanish.",
        "Add `--max-running-requests 8` to a variant of its own: the batch stops growing at 8 and the queue takes over.",
    ),
)
