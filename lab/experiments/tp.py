"""What does tensor parallelism gain, and what does the link between the GPUs decide?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Published, Variant
from lab.workload import RandomIds

TP2 = ("--tp-size", "2")
NCCL = (*TP2, "--disable-custom-all-reduce")

THROUGHPUT = Measure(table="loads", load="busy", column="output_tokens_per_s")
FIRST_TOKEN = Measure(table="requests", load="single", column="ttft_ms")
EACH_TOKEN = Measure(table="requests", load="single", column="tpot_ms")

EXPERIMENT = Experiment(
    name="tp",
    question="What does tensor parallelism gain, and how much of it does the link between the GPUs take back?",
    mechanism="""\
With tensor parallelism every rank holds a slice of every matrix: heads of attention, columns and then rows of the MLP. Each rank reads
only its share of the weights, so a pass takes less time. But after attention and after the MLP each rank has only a *part* of each sum;
an **all-reduce** adds the parts and gives everybody the total. That is two a layer and one for the embedding: 65 in a pass of
an 8B model with 32 layers. No rank can go on before it is done, so the link's time adds to that of the pass.

What travels is tokens times hidden size times 2 bytes. **Decode** of one request: 8 KB. The time is all latency, and SGLang has a **custom
all-reduce** for it: each GPU reads the others' memory in one kernel, without NCCL's steps. **Prefill** of 2,048 tokens: 16 MB, 65 times,
over 1 GB. That is bandwidth: about 5 ms at 200 GB/s over NVLink, above 50 ms at 20 GB/s through PCIe. Messages of several MB go
to NCCL even on NVLink. Beyond two GPUs the custom kernel needs NVLink between all of them: TP=4 on two NVLink pairs
always uses NCCL, so TP=2 against TP=4 compares two algorithms as well. `tp2-nccl` tells the one from the other.

So each doubling of ranks gains less than a factor of two. Nothing else changes: all ranks run the same scheduler on the same requests,
rank 0 sends the answers. The sums are added in another order, which changes their last bits. In float32 that should
turn no answer; in bfloat16 it may turn a token here and there, and with it the rest of that answer.
Without a GPU, two processes exchange the sums over gloo: all of the mechanism, none of the speed.""",
    sources=(
        "`sglang/srt/layers/linear.py`: `RowParallelLinear.forward`, which ends in the all-reduce",
        "`sglang/srt/distributed/parallel_state.py`: `GroupCoordinator.all_reduce` chooses custom kernel, NCCL or gloo",
        "`sglang/srt/distributed/device_communicators/custom_all_reduce.py`: `should_custom_ar`, the sizes and links it takes",
    ),
    server=(),
    variants=(
        Variant(name="tp1", says="one rank, the reference"),
        Variant(name="tp2", says="two ranks; with GPUs, a pair joined by NVLink", args=TP2, link="nvlink"),
        Variant(name="tp2-nccl", says="the same pair, all-reduce by NCCL", args=NCCL, link="nvlink", needs=("gpu", "nvlink")),
        Variant(name="tp2-pxb", says="two GPUs of one NUMA node, over PCIe", args=TP2, link="pxb", needs=("gpu",)),
        Variant(name="tp2-sys", says="two GPUs of two NUMA nodes", args=TP2, link="sys", needs=("gpu",)),
        Variant(name="tp4", says="four GPUs of one NUMA node", args=("--tp-size", "4"), same_numa=True, needs=("gpu",)),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=100, prompts=3, input_tokens=512, output_tokens=16),
        RandomIds(name="single", seed=200, prompts=12, input_tokens=2048, output_tokens=32, small={"input_tokens": 512}),
        RandomIds(
            name="busy", seed=300, prompts=200, input_tokens=512, output_tokens=128, concurrency=32,
            small={"prompts": 32, "input_tokens": 256, "output_tokens": 64, "concurrency": 8},
        ),
    ),
    claims=(
        Claim(
            name="same-answers",
            says="Two ranks give the answers of one (in float32; in bfloat16 rounding may turn some).",
            measure=Measure(table="requests", load="single", column="same_answer", reduce="mean"),
            variant="tp2", op=">=", threshold=1,
        ),
        Claim(
            name="less-than-double",
            says="Two ranks bring less than twice the tokens a second: what they exchange is on top.",
            measure=THROUGHPUT, variant="tp2", against="tp1", op="<", threshold=2,
        ),
        Claim(
            name="speed-up",
            says="Over NVLink a second GPU is worth it: at least 1.2 times the tokens a second.",
            measure=THROUGHPUT, variant="tp2", against="tp1", op=">", threshold=1.2, needs=("gpu", "nvlink"),
        ),
        Claim(
            name="room-for-more",
            says="The KV pool more than doubles: a token takes half of the bytes on each GPU, and half of the weights made room.",
            measure=Measure(table="loads", load="busy", column="pool_tokens"),
            variant="tp2", against="tp1", op=">", threshold=2, needs=("gpu", "nvlink"),
        ),
        Claim(
            name="four-add-less",
            says="From two to four is a smaller step: less than 1.5 times.",
            measure=THROUGHPUT, variant="tp4", against="tp2", op="<", threshold=1.5, needs=("gpu", "nvlink"),
        ),
        Claim(
            name="pcie-prefill",
            says="Prefill moves a gigabyte, so the way shows in time to first token: PCIe above NVLink.",
            measure=FIRST_TOKEN, variant="tp2-pxb", against="tp2", op=">", threshold=1.1, needs=("gpu", "nvlink"),
        ),
        Claim(
            name="pcie-decode",
            says="Decode moves kilobytes, but waits for each: a token takes longer over PCIe than over NVLink.",
            measure=EACH_TOKEN, variant="tp2-pxb", against="tp2", op=">", threshold=1, needs=("gpu", "nvlink"),
        ),
        Claim(
            name="sockets-decode",
            says="And longer still from one socket to the other.",
            measure=EACH_TOKEN, variant="tp2-sys", against="tp2-pxb", op=">", threshold=1, needs=("gpu",),
        ),
        Claim(
            name="custom-all-reduce",
            says="Without the custom all-reduce a token takes longer on the same pair.",
            measure=EACH_TOKEN, variant="tp2-nccl", against="tp2", op=">", threshold=1, needs=("gpu", "nvlink"),
        ),
        Claim(
            name="communication",
            says="With four GPUs a larger share of GPU time goes into communication than with two.",
            measure=Measure(table="loads", load="busy", column="comm_share"),
            variant="tp4", against="tp2", op=">", threshold=1, needs=("gpu", "nsys", "nvlink"),
        ),
    ),
    published=(
        Published(
            figure="all-reduce bus bandwidth 208 GB/s inside an NVLink pair, 20 GB/s with 3 GPUs",
            setup="nccl-tests on A100 PCIe with NVLink pairs and two NUMA nodes",
            source="NVIDIA/nccl-tests, issue 178",
            comparable="the links, not the server: it explains the times to first token",
        ),
        Published(
            figure="46.79, 29.39 and 32.06 ms a token with TP 1, 2 and 4",
            setup="TGI 1.2, CodeLlama-34B, A100 80GB",
            source="huggingface/text-generation-inference, issue 1315",
            comparable="in shape only: another server and model; there, too, four are slower than two",
        ),
    ),
    pictures=("ttft", "steps", "measures"),
    try_next=(
        "Raise `input_tokens` of `single` to 8192 and compare `tp2-pxb` with `tp2`: bandwidth decides.",
    ),
)
