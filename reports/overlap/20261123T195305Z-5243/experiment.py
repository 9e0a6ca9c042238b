"""What does the overlap ("zero-overhead") scheduler hide, and what does it cost?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Published, Variant
from lab.workload import RandomIds

# `single` sends so many requests, one by one; each costs the overlap scheduler one decode pass more.
SINGLE = 12

EXPERIMENT = Experiment(
    name="overlap",
    question="What does the overlap scheduler hide behind the GPU's work, what does it cost, and does it change any answer?",
    mechanism="""\
Between two forward passes the scheduler has work of its own on the CPU: take in new requests, look up prefixes, choose the next
batch, allocate KV slots, then read the sampled tokens, see who is done, send them off. Done in turn, the GPU idles all that time.

The **overlap scheduler** launches pass n+1 **before** it looks at the results of pass n. The tokens of pass n, which pass n+1 needs as
its input, never leave the GPU: the batch is built with placeholders, which are filled there. While the GPU computes pass n+1,
the CPU processes pass n and then prepares n+2. As long as that takes less than a pass, the GPU never waits.

The order of things is visible on any machine: with overlap the result of a pass is processed after the next one was launched
(`late_share` near 1, it is 0 without). So is its price: the scheduler learns **one pass late** that a request is
finished, so a pass has already been launched with it, and its token is thrown away. One request alone
with 32 tokens decodes 31 times without overlap (the first token comes from prefill), 32 times with it.

What it gains needs a GPU. On a CPU a "launch" *is* the computation, done by the scheduler's own process before the call returns
(PyTorch's streams do nothing there), so there is no other processor to hide work behind. There only the price is left: the
first token of a lone request, ready after prefill, is not sent before the next pass has been computed as well.""",
    sources=(
        "`sglang/srt/managers/scheduler.py`: `event_loop_normal` and `event_loop_overlap`, side by side",
        "`sglang/srt/managers/overlap_utils.py`: `FutureMap`, through which a pass gets the tokens of the one before "
        "(0.4.6: `tp_worker_overlap_thread.py`, with a thread for the launches)",
        "`sglang/srt/managers/schedule_batch.py`: `ScheduleBatch.filter_batch`, where a finished request leaves, one pass late",
    ),
    server=(),
    variants=(
        Variant(name="overlap", says="SGLang as it comes: the next pass is launched before the last one's result is processed"),
        Variant(name="in-turn", says="the control: launch, wait, process", args=("--disable-overlap-schedule",)),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=100, prompts=3, input_tokens=256, output_tokens=16),
        RandomIds(name="single", seed=200, prompts=SINGLE, input_tokens=256, output_tokens=32),
        RandomIds(
            name="busy", seed=300, prompts=400, input_tokens=512, output_tokens=256, concurrency=32,
            small={"prompts": 48, "input_tokens": 256, "output_tokens": 64, "concurrency": 16},
        ),
    ),
    claims=(
        Claim(
            name="processed-late",
            says="With overlap, nearly every result is processed after the next pass was launched.",
            measure=Measure(table="loads", load="busy", column="late_share"),
            variant="overlap", op=">", threshold=0.9,
        ),
        Claim(
            name="processed-in-turn",
            says="Without it none is.",
            measure=Measure(table="loads", load="busy", column="late_share"),
            variant="in-turn", op="<=", threshold=0,
        ),
        Claim(
            name="same-answers",
            says="Overlap changes the order of work, not the work: every answer is the same.",
            measure=Measure(table="requests", load="single", column="same_answer", reduce="min"),
            variant="in-turn", op=">=", threshold=1,
        ),
        Claim(
            name="one-pass-more",
            says=f"A finished request is noticed one pass late: {SINGLE} requests, one by one, take {SINGLE} more decode passes.",
            measure=Measure(table="loads", load="single", column="decode_passes"),
            variant="overlap", against="in-turn", by="difference", op=">=", threshold=SINGLE,
        ),
        Claim(
            name="no-gain-for-the-first",
            says="A lone prompt has nothing to hide behind: its first token comes no sooner (later, if a launch takes long).",
            measure=Measure(table="requests", load="single", column="ttft_ms"),
            variant="overlap", against="in-turn", op=">", threshold=0.95,
        ),
        Claim(
            name="throughput",
            says="The same load is done faster: at least 2 % more tokens a second.",
            measure=Measure(table="loads", load="busy", column="output_tokens_per_s"),
            variant="overlap", against="in-turn", op=">", threshold=1.02, needs=("gpu",),
        ),
        Claim(
            name="time-per-token",
            says="Each token comes sooner: the scheduler's work no longer stands between two passes.",
            measure=Measure(table="requests", load="busy", column="tpot_ms"),
            variant="overlap", against="in-turn", op="<", threshold=0.98, needs=("gpu",),
        ),
        Claim(
            name="gpu-waits-less",
            says="The GPU is idle for less than half of the time that it is without overlap.",
            measure=Measure(table="loads", load="busy", column="gpu_idle_share"),
            variant="overlap", against="in-turn", op="<", threshold=0.5, needs=("gpu", "nsys"),
        ),
    ),
    published=(
        Published(
            figure="1.1 times the throughput of the version before, 1.3 times that of other systems",
            setup="SGLang 0.4, Llama-3.2-3B, 500 prompts of 4096 tokens with 2048 tokens of answer; GPU not named",
            source="lmsys.org/blog/2024-12-04-sglang-v0-4",
            comparable="in direction only: a small model on a fast GPU has short passes, so the scheduler's work weighs more",
        ),
    ),
    pictures=("steps", "batches", "measures"),
    try_next=(
        "Raise `concurrency` of `busy`: passes get longer, the scheduler's work too. Which of the two grows faster?",
        "Serve a larger model: passes get longer, so there is less to gain. Where does the gain vanish?",
        "Serve with `--schedule-policy lpm` and 100 requests waiting: choosing the next batch takes longer. Is it still hidden?",
    ),
)
