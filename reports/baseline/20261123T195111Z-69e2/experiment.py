"""What fills the server's time under a plain load: prefill, decode, and requests that come and go?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Published, Variant
from lab.workload import RandomIds

EXPERIMENT = Experiment(
    name="baseline",
    question="What does a server do all day under a plain load, and how do requests share it?",
    mechanism="""\
A request is served in two phases. **Prefill** runs all tokens of the prompt through the model in one forward pass and
gives the first output token. **Decode** then runs one pass for each further token. Prefill has hundreds of rows for every
weight that it reads, so it is limited by arithmetic; decode has one row a request, so it is limited by reading the weights.

That is why SGLang batches decoding: a pass for 16 requests reads the weights once, not 16 times. And it batches
**continuously**. Before every pass the scheduler asks: does a waiting request fit? If so, the next pass is a prefill pass
for it, and from then on it is part of the running batch; requests that have all their tokens leave after any pass. Nobody waits
for a batch to be complete. The price is paid by those who are decoding: while a newcomer's prompt is computed they get no
token. Their mean time per token (TPOT) has these pauses in it; the median gap between tokens (ITL) is that of a decode pass.

The plan believes that attention kernels dominate GPU time. Count bytes: a decode pass for 16 requests with 600 tokens of
context reads 16 GB of weights of an 8B model, and about 1.3 GB of keys and values. With prompts this short the matrix products
should dominate; the claim stands here as the plan has it, to be decided by the measurement.

`alone` sends one request at a time, `together` keeps 16 in flight, `arriving` sends them at random moments.""",
    sources=(
        "`sglang/srt/managers/scheduler.py`: `get_next_batch_to_run` prefers a prefill batch over the running one, "
        "`get_new_batch_prefill`, `update_running_batch`",
        "`sglang/srt/managers/schedule_batch.py`: `ScheduleBatch.filter_batch` (who is done leaves), `merge_batch` (who is new joins)",
        "`sglang/srt/layers/attention/flashinfer_backend.py`: one wrapper for prefill, one for decode; with four or more query "
        "heads to a key head (more than four in 0.4.6) `should_use_tensor_core` has decode done by a kernel of the prefill family",
    ),
    server=("--mem-fraction-static", "0.85"),
    variants=(Variant(name="default", says="SGLang as it comes, with the plan's share of memory"),),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=100, prompts=3, input_tokens=512, output_tokens=16),
        RandomIds(name="alone", seed=200, prompts=10, input_tokens=512, output_tokens=128),
        RandomIds(
            name="together", seed=300, prompts=100, input_tokens=512, output_tokens=128, concurrency=16,
            small={"prompts": 48},
        ),
        RandomIds(
            name="arriving", seed=400, prompts=100, input_tokens=512, output_tokens=128, rate_per_s=8.0,
            small={"prompts": 40, "rate_per_s": 6.0},
        ),
    ),
    claims=(
        Claim(
            name="decode-dominates",
            says="Most passes decode: a prompt takes one pass, an answer of 128 tokens 127, shared by at most 16 requests.",
            measure=Measure(table="loads", load="together", column="decode_passes"),
            base=Measure(table="loads", load="together", column="prefill_passes"),
            variant="default", op=">", threshold=7,
        ),
        Claim(
            name="requests-join",
            says="Requests join a running batch: prefill passes begin while others are decoding (never, if batches were closed).",
            measure=Measure(table="loads", load="arriving", column="joined_passes"),
            variant="default", op=">=", threshold=5,
        ),
        Claim(
            name="requests-leave",
            says="Requests leave a running batch, and it goes on with fewer.",
            measure=Measure(table="loads", load="arriving", column="left_passes"),
            variant="default", op=">=", threshold=5,
        ),
        Claim(
            name="batch-size-moves",
            says="So decode passes have many different sizes.",
            measure=Measure(table="forwards", load="arriving", column="requests", rows="decode", reduce="distinct"),
            variant="default", op=">=", threshold=4,
        ),
        Claim(
            name="batching-pays",
            says="Sixteen in flight bring more than twice the tokens a second of one at a time.",
            measure=Measure(table="loads", load="together", column="output_tokens_per_s"),
            base=Measure(table="loads", load="alone", column="output_tokens_per_s"),
            variant="default", op=">", threshold=2,
        ),
        Claim(
            name="batching-costs",
            says="Each of them gets its tokens more slowly, but far from sixteen times: less than half of that.",
            measure=Measure(table="requests", load="together", column="itl_ms"),
            base=Measure(table="requests", load="alone", column="itl_ms"),
            variant="default", op="<", threshold=8,
        ),
        Claim(
            name="newcomers-interrupt",
            says="A prompt takes as long as several tokens: for so long does a newcomer hold up those who decode.",
            measure=Measure(table="requests", load="alone", column="ttft_ms"),
            base=Measure(table="requests", load="alone", column="itl_ms"),
            variant="default", op=">", threshold=2,
        ),
        Claim(
            name="attention-dominates",
            says="Attention kernels take more than half of the GPU's busy time (the plan's expectation).",
            measure=Measure(table="loads", load="together", column="attention_share"),
            variant="default", op=">", threshold=0.5, needs=("gpu", "nsys"),
        ),
        Claim(
            name="two-kinds-of-kernels",
            says="Prefill and decode use different attention kernels: few names are seen in passes of both.",
            measure=Measure(table="loads", load="together", column="kernel_names_shared"),
            variant="default", op="<", threshold=0.5, needs=("gpu", "nsys"),
        ),
    ),
    published=(
        Published(
            figure="at 4 requests/s median TTFT 31.98 ms, TPOT 13.17 ms, ITL 11.93 ms; at 8 requests/s 35.68, 17.85 and 14.41 ms",
            setup="SGLang 0.3.0 with torch.compile, prefix cache off, Llama-3.1-8B-Instruct, one A100 80GB, ShareGPT prompts",
            source="sgl-project/sglang, benchmark/benchmark_vllm_060/README.md",
            comparable="with an 8B model on one A100: nearly, at `arriving`; prompts there have other lengths. Without a GPU: no",
        ),
        Published(
            figure="22.03 requests/s, 4281.51 output tokens/s",
            setup="the same server, 5000 ShareGPT prompts sent at once",
            source="sgl-project/sglang, benchmark/benchmark_vllm_060/README.md",
            comparable="no: hundreds of requests run at once there, 16 here",
        ),
    ),
    pictures=("batches", "ttft", "measures"),
    try_next=(
        "Set `concurrency=64` on `together`: throughput rises further, and so does ITL. Where does it stop to pay?",
        "Add a variant with `--enable-mixed-chunk`: prompts then share passes with decoding requests instead of interrupting them.",
        "Raise `input_tokens` to 8192: attention's part of the bytes grows, that of the weights stays.",
    ),
)
