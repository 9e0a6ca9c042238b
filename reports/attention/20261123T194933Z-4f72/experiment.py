"""How do the attention backends compare: FlashInfer, Triton, FlashAttention 3, plain PyTorch?"""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import RandomIds

LONG, QUARTER = 8192, 2048

EXPERIMENT = Experiment(
    name="attention",
    question="How do the attention backends compare, and when does attention matter at all?",
    mechanism="""\
Attention is the one part of a Transformer whose work for a token depends on how many tokens stand before it. In **prefill** every
new token attends to all before it, so the work grows with the square of the prompt. In **decode** one new token attends to the whole
context: little arithmetic, but all keys and values of the request are read from the KV cache in every pass. They lie there in
slots handed out one by one, so a kernel finds them through a table of indices.

Backends differ in how. **FlashInfer** compiles CUDA kernels for the model at hand and first *plans* each batch on the CPU, so that
requests of different lengths fill all SMs evenly. **Triton** kernels are written in Python and compiled for the GPU at the first
call; decode splits long contexts over SMs and joins the parts in a second kernel. **FlashAttention 3** takes the
page table as it is. **torch_native** is the definition written down: a Python loop over requests gathers each one's keys and
values and calls PyTorch's `scaled_dot_product_attention`. It is slow with many requests, but easy to trust, so the others' answers
are held against it. It also runs without a GPU, and computes cached parts of a prompt again (only the result is dropped).

Decode passes are replayed from a CUDA graph with one launch (torch_native turns that off). In prefill, attention is launched by
itself, even where the rest of the pass is in a graph, so it is there that launch overhead shows. The backend in force is read
back from each server, and a trial with another one than asked for is invalid. (The variable `SGLANG_ATTENTION_BACKEND`
of some texts is read neither by 0.4.6 nor by 0.5.21: with it, one compares the default with the default.)

`quarter` and `whole` send one prompt at a time, so time to first token is prefill time. `short` and `long` decode with equally
many requests at once; the gap between tokens (ITL) is then the time of a decode pass.""",
    sources=(
        "`sglang/srt/layers/attention/base_attn_backend.py`: what a backend must do: `init_forward_metadata`, `forward_extend`, `forward_decode`",
        "`sglang/srt/layers/attention/torch_native_backend.py`: `_run_sdpa_forward_decode`, the definition in 40 lines",
        "`sglang/srt/layers/attention/flashinfer_backend.py`: `call_begin_forward`, where a batch is planned",
        "`sglang/srt/layers/attention/triton_backend.py`: `get_num_kv_splits`, into how many parts a context is split",
    ),
    server=(),
    variants=(
        Variant(name="torch-native", says="PyTorch's own attention, the reference", args=("--attention-backend", "torch_native")),
        Variant(name="flashinfer", says="FlashInfer", args=("--attention-backend", "flashinfer"), needs=("gpu",)),
        Variant(name="triton", says="Triton kernels of SGLang", args=("--attention-backend", "triton"), needs=("gpu",)),
        Variant(name="fa3", says="FlashAttention 3", args=("--attention-backend", "fa3"), needs=("gpu",)),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=100, prompts=3, input_tokens=QUARTER, output_tokens=16),
        RandomIds(name="quarter", seed=200, prompts=6, input_tokens=QUARTER, output_tokens=16),
        RandomIds(name="whole", seed=300, prompts=6, input_tokens=LONG, output_tokens=16, small={"prompts": 3}),
        RandomIds(
            name="short", seed=400, prompts=16, input_tokens=256, output_tokens=128, concurrency=16,
            small={"prompts": 4, "output_tokens": 64, "concurrency": 4},
        ),
        RandomIds(
            name="long", seed=500, prompts=16, input_tokens=LONG, output_tokens=128, concurrency=16,
            small={"prompts": 4, "output_tokens": 64, "concurrency": 4},
        ),
    ),
    claims=(
        Claim(
            name="decode-reads-the-context",
            says="The same number of requests decodes more slowly with a long context: every pass reads all of it.",
            measure=Measure(table="requests", load="long", column="itl_ms"),
            base=Measure(table="requests", load="short", column="itl_ms"),
            variant="torch-native", op=">", threshold=1.3,
        ),
        Claim(
            name="prefill-grows-faster",
            says="A prompt four times as long takes more than four times as long to prefill.",
            measure=Measure(table="requests", load="whole", column="ttft_ms"),
            base=Measure(table="requests", load="quarter", column="ttft_ms"),
            variant="torch-native", op=">", threshold=4,
        ),
        Claim(
            name="flashinfer-reads-it-too",
            says="A good kernel does not change that: FlashInfer's decoding slows down with the context as well.",
            measure=Measure(table="requests", load="long", column="itl_ms"),
            base=Measure(table="requests", load="short", column="itl_ms"),
            variant="flashinfer", op=">", threshold=1.3, needs=("gpu",),
        ),
        *(
            Claim(
                name=f"{backend}-answers",
                says=f"{backend} gives the reference's answers, but for a few that rounding turns.",
                measure=Measure(table="requests", load="quarter", column="same_answer", reduce="mean"),
                variant=backend, op=">", threshold=0.5, needs=("gpu",),
            )
            for backend in ("flashinfer", "triton", "fa3")
        ),
        Claim(
            name="decode-triton",
            says="With a long context Triton decodes more slowly than FlashInfer.",
            measure=Measure(table="requests", load="long", column="tpot_ms"),
            variant="triton", against="flashinfer", op=">", threshold=1, needs=("gpu",),
        ),
        Claim(
            name="prefill-triton",
            says="Triton prefills more slowly than FlashInfer.",
            measure=Measure(table="requests", load="whole", column="ttft_ms"),
            variant="triton", against="flashinfer", op=">", threshold=1, needs=("gpu",),
        ),
        Claim(
            name="launch-overhead",
            says="FlashInfer's kernels are launched faster than Triton's, whose launches go through Python.",
            measure=Measure(table="loads", load="whole", column="launch_us_median"),
            variant="triton", against="flashinfer", op=">", threshold=1, needs=("gpu", "nsys"),
        ),
        Claim(
            name="sm-use",
            says="FlashInfer keeps more of the SMs busy.",
            measure=Measure(table="loads", load="long", column="sm_share"),
            variant="flashinfer", against="triton", op=">", threshold=1, needs=("gpu", "nsys"),
        ),
    ),
    pictures=("ttft", "steps", "measures"),
    try_next=(
        "Raise `LONG` in `lab/experiments/attention.py` to 12288: from where on does attention take most of a decode pass?",
        "Turn CUDA graphs off for all (`--disable-cuda-graph` in `server`): now every backend pays its launches in decode too.",
        "On a GPU, page the cache (`--page-size 16`): which backends gain from keys that lie together?",
    ),
)
