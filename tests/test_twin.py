"""The stack cpu046: that its stand-ins are still the names SGLang 0.4.6.post5 asks for, that it is the release and the
packages of cu125, and that the lab serves, measures and repeats with it.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
from checkout import Checkout, make_checkout
from packaging.requirements import Requirement
from parts import need
from realstack import real_stack

from lab import modelfiles, places
from lab.images.context import stage, stage_name
from lab.modelfiles import ensure_model, with_python
from lab.models import get_model
from lab.read.requestecho import read_echo
from lab.rundir import Run, read_json
from lab.stack import Stack, load_stack
from lab.stacks.check import check, python_of, read_manifest, site_packages, verify
from lab.stacks.lock import normal_name, read_lock, read_names
from lab.stacks.run import child_env

SHIMS = places.ROOT / "containers" / "cpu046" / "shims"
REFERENCE = Path(__file__).with_name("nano_reference.py")


def stack_of(name: str) -> Stack:
    return load_stack(name, root=places.ROOT)


# ---- the stand-ins

ON_CPU = ("_is_cuda", "_is_hip", "is_cuda", "is_hip")  # what SGLang's modules ask, false on a CPU


def known(test: ast.expr) -> bool | None:
    """What a condition is on a CPU, None where it depends on something else."""
    if isinstance(test, ast.Name) and test.id in ON_CPU:
        return False
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in ON_CPU:
        return False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = known(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [known(value) for value in test.values]
        decisive = isinstance(test.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    return None


def asked_for(source: str) -> set[str]:
    """The names that Python source imports, on a CPU, from vllm and sgl_kernel with nothing to catch a failure."""
    found: set[str] = set()

    def visit(node: ast.AST, *, guarded: bool) -> None:
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and (is_so := known(node.test)) is not None:
            children = list(node.body if is_so else node.orelse)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("vllm", "sgl_kernel"):
            found.update(f"{node.module}.{alias.name}" for alias in node.names if not guarded)
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.split(".")[0] in ("vllm", "sgl_kernel")}
            found.update(names if not guarded else ())
        for child in children:
            visit(child, guarded=guarded or isinstance(node, ast.Try))

    visit(ast.parse(source), guarded=False)
    return found


def test_the_search_for_names_sees_what_it_should() -> None:
    source = """
from vllm.a import one
if not _is_cuda:
    from vllm.b import two
if not (_is_cuda or _is_hip):
    from vllm.b import three
elif other:
    from vllm.b import never
if _is_hip and other:
    from vllm.b import never
if other or not is_cuda():
    import sgl_kernel
else:
    from sgl_kernel import never
if other:
    from sgl_kernel import four
def f():
    from sgl_kernel.x import five
try:
    from vllm.c import never
except ImportError:
    pass
from other.vllm import never
"""
    assert asked_for(source) == {
        *("vllm.a.one", "vllm.b.two", "vllm.b.three", "sgl_kernel"),
        *("sgl_kernel.four", "sgl_kernel.x.five"),
    }


# Asked for in places that a Llama on this stack does not come to.
NOT_HERE = {
    "srt/layers/attention/flashattention_backend.py": {  # --attention-backend fa3
        "sgl_kernel.merge_state_v2",
        "sgl_kernel.flash_attn.flash_attn_varlen_func",
        "sgl_kernel.flash_attn.flash_attn_with_kvcache",
    },
    "srt/layers/attention/merge_state.py": {"sgl_kernel.merge_state_v2"},  # of the same
    "srt/layers/quantization/__init__.py": {  # a function for models that vLLM has quantized
        "vllm.model_executor.layers.fused_moe.FusedMoE",
        "vllm.model_executor.layers.linear.LinearBase",
        "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding",
    },
    # A model that cannot be imported is left out, with a line in the log.
    "srt/models/deepseek_v2.py": {"vllm._custom_ops.awq_dequantize"},
    "srt/models/internvl.py": {"sgl_kernel.flash_attn.flash_attn_varlen_func"},
}


def stood_in() -> set[str]:
    """Every name that the stand-ins of vllm have, read from their source."""
    found = set()
    for file in (SHIMS / "vllm").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES":
                module = ".".join(file.relative_to(SHIMS).with_suffix("").parts)
                found |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    return found


def test_sglang_asks_for_exactly_the_names_of_the_stand_ins() -> None:
    stack, folder = real_stack("cpu046")
    package = site_packages(stack, folder) / "sglang"
    found = {
        file.relative_to(package).as_posix(): names
        for file in package.rglob("*.py")
        if (names := asked_for(file.read_text(encoding="utf-8-sig")))
    }
    assert {name: found.pop(name, None) for name in NOT_HERE} == NOT_HERE
    assert set().union(*found.values()) - {"vllm._custom_ops"} == stood_in()  # that one is the module itself


def test_sglang_reads_one_name_of_sgl_kernel_as_it_loads() -> None:
    """`import sgl_kernel` stands in a try there, which logs a failure; the line after it is not in one."""
    stack, folder = real_stack("cpu046")
    text = (site_packages(stack, folder) / "sglang/srt/_custom_ops.py").read_text()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    attributes = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "sgl_kernel"
        and id(node) not in inside
    }
    assert attributes == set(load("sgl_kernel", SHIMS / "sgl_kernel" / "__init__.py").NAMES) == {"allreduce"}


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_stand_in_computes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("kernels", SHIMS / "vllm" / "_custom_ops.py")
    for name in kernels.NAMES:
        with pytest.raises(NotImplementedError, match=rf"vllm\._custom_ops\.{name} "):
            getattr(kernels, name)(1, x=2)
    for part in ("activation", "layernorm"):
        own = SimpleNamespace(SiluAndMul=1, GeluAndMul=2, RMSNorm=3, GemmaRMSNorm=4)
        monkeypatch.setitem(sys.modules, f"sglang.srt.layers.{part}", own)  # type: ignore[arg-type]
        stand_in = load(part, SHIMS / "vllm/model_executor/layers" / f"{part}.py")
        assert {n: getattr(stand_in, n) for n in stand_in.NAMES} == {
            n: getattr(own, n) for n in stand_in.NAMES
        }


FACTS = """
import json
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler
from sglang.srt.layers import activation, layernorm, quantization
from sglang.srt.models import llama
made = layernorm.RMSNorm(8), activation.SiluAndMul()
print(json.dumps({
    "modules": [type(one).__module__ for one in made],
    "methods": [one._forward_method.__name__ for one in made],
    "of_llama": [llama.RMSNorm is layernorm.RMSNorm, llama.SiluAndMul is activation.SiluAndMul],
    "vllm": quantization.VLLM_AVAILABLE,
}))
"""


def test_what_runs_is_sglangs_own() -> None:
    stack, folder = real_stack("cpu046")
    done = subprocess.run(
        (str(python_of(folder)), "-c", FACTS),
        env={**child_env(os.environ), **dict(stack.env)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "modules": ["sglang.srt.layers.layernorm", "sglang.srt.layers.activation"],
        "methods": ["forward_native", "forward_native"],
        "of_llama": [True, True],
        "vllm": False,
    }


# ---- the packages


def test_the_twins_have_the_same_packages() -> None:
    """Both locks are made from files of the same day; what the CPU's torch brings with it is its own."""
    pins = {
        name: {pin.name: pin.version for pin in read_lock(stack_of(name).lock)}
        for name in ("cpu046", "cu125")
    }
    ours, theirs = pins["cpu046"], pins["cu125"]
    assert set(ours) <= set(theirs)
    # cu125's fsspec is held back by `datasets`, which this stack does without
    assert {name for name in ours if ours[name] != theirs[name]} == {"torch", "sympy", "fsspec"}
    assert stack_of("cpu046").image.date == stack_of("cu125").image.date
    assert not [name for name in ours if name.startswith(("nvidia", "cuda"))]


def test_the_built_stack_is_what_its_files_say() -> None:
    stack, folder = real_stack("cpu046")
    manifest = check(stack, folder)
    assert (manifest.versions["sglang"], manifest.versions["torch"]) == ("0.4.6.post5", "2.13.0+cpu")
    assert read_manifest(folder).missing_on_purpose == ()  # SGLang declares everything in extras
    imported, _ = verify(stack, folder, env=child_env(os.environ))
    assert "sglang.srt.managers.scheduler" in imported


def test_what_is_left_out_is_declared_and_what_is_declared_is_there() -> None:
    """In SGLang's extras, which the check after a build does not look at."""
    stack, folder = real_stack("cpu046")
    (sglang,) = (d for d in distributions(path=[str(site_packages(stack, folder))]) if d.name == "sglang")
    wants = [Requirement(text) for text in sglang.requires or ()]
    declared = {
        normal_name(want.name)
        for want in wants
        if want.marker
        and any(want.marker.evaluate({"extra": extra}) for extra in ("srt-cpu", "runtime-common"))
    }
    excluded = {normal_name(name) for name in read_names(stack.excludes)}
    assert excluded <= declared  # a stale exclude fails here
    assert declared - excluded <= {pin.name for pin in read_lock(stack.lock)}
    assert not excluded & {pin.name for pin in read_lock(stack.lock)}


def test_an_image_of_it_is_made_by_the_stage_of_its_device(tmp_path: Path) -> None:
    """The Dockerfile has no stage of its name."""
    stack = stack_of("cpu046")
    assert stage_name(stack) == "cpu"
    context = stage(stack, folder=tmp_path)
    assert dict(context.labels)["lab.sglang"] == "0.4.6.post5"
    assert (tmp_path / "shims/vllm/_custom_ops.py").is_file()


def test_it_builds_the_same_nano(tmp_path: Path) -> None:
    """Other numpy, tokenizers and safetensors than in the stack cpu: the same bytes, or `ensure_model` refuses."""
    _, folder = real_stack("cpu046")
    model = get_model("nano")
    made = ensure_model(model, cache=tmp_path, builder=with_python(python_of(folder)), say=print)
    assert modelfiles.find_damage(model, folder=made) == ""


# ---- served by the lab

EXPERIMENT = '''\
"""Loads of every kind, and a pool that is too small for one of them."""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import Chat, RandomIds, SharedPrefix

EXPERIMENT = Experiment(
    name="twin",
    question="What does SGLang 0.4.6.post5 tell of its requests?",
    mechanism="Loads of every kind, and a pool that is too small for one of them.",
    sources=("`sglang/srt/managers/tokenizer_manager.py`: the log lines of a request",),
    server=("--max-total-tokens", "1024", "--schedule-conservativeness", "0.01"),
    variants=(
        Variant(name="plain", says="as it comes"),
        Variant(name="lfu", says="another order of eviction", args=("--radix-eviction-policy", "lfu")),
    ),
    loads=(
        Chat(
            name="chat", seed=0, questions=("It's \\"so\\"?", "And?"), system_chars=1800, system_tokens=440, output_tokens=8
        ),
        RandomIds(name="retract", seed=1, prompts=12, input_tokens=64, output_tokens=120, concurrency=12),
        RandomIds(name="rate", seed=2, prompts=24, input_tokens=32, output_tokens=4, rate_per_s=12),
        SharedPrefix(
            name="shared", seed=3, groups=2, prompts_per_group=6, prefix_tokens=128, question_tokens=8, output_tokens=8,
            concurrency=4,
        ),
    ),
    claims=tuple(
        Claim(
            name=name, says=says, measure=Measure(table="loads", load="retract", column=column),
            variant=variant, op=">=", threshold=1,
        )
        for name, says, column, variant in (
            ("retracts", "A pool that is too small retracts.", "retracted_requests", "plain"),
            ("evicts", "And evicts.", "evicted_tokens", "plain"),
            ("lfu", "Another order does so too.", "retracted_requests", "lfu"),
        )
    ),
    try_next=("Nothing.",),
    repeats=1,
)
'''
BUSY = "client was not the bottleneck"  # what else runs on this machine decides that


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    real_stack("cpu046")
    made = make_checkout(tmp_path_factory.mktemp("clone"))
    (made.path / "lab/experiments/twin.py").write_text(EXPERIMENT, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def run(checkout: Checkout, nano: Path) -> Run:
    """A run of the experiment above on cpu046."""
    code, output = checkout.invoke("exp.twin", "--stack", "cpu046", "--runtime", "process")
    found = Run(checkout.newest_run("twin"))
    assert read_json(found.trial("000-plain-r0").status)["status"] == "ok", output
    assert "Traceback" not in output
    assert code in (0, 2)  # 2 where the machine was too busy
    return found


def table(run: Run, name: str) -> pd.DataFrame:
    return pd.read_csv(run.tables / f"{name}.csv")


def test_every_check_that_this_release_allows_is_made_and_passed(run: Run) -> None:
    checks = table(run, "checks")
    assert set(checks.loc[~checks["ok"], "name"]) <= {BUSY}
    for load in ("chat", "retract", "rate", "shared"):
        names = set(checks.loc[checks["load"] == load, "name"])
        assert {"counters fit the requests", "cache was cold", "hit rate fits the workload", BUSY} <= names
    assert "client kept its rate" in set(checks.loc[checks["load"] == "rate", "name"])
    assert table(run, "trials")["unreadable"].isna().all()


def test_each_request_is_joined_with_the_servers_record_of_it(run: Run) -> None:
    requests = table(run, "requests")
    assert len(requests) == 2 + 12 + 24 + 12
    assert requests.groupby("load")["joined"].unique().map(list).to_dict() == {
        "chat": ["rid"],
        "retract": ["answer"],
        "rate": ["answer"],
        "shared": ["answer"],
    }
    assert requests["server_e2e_ms"].gt(0).all()
    assert requests[["server_ttft_ms", "queue_ms", "retractions"]].isna().all(axis=None)
    shared = requests[requests["load"] == "shared"]
    assert (shared["cached_share"] > 0.9).sum() >= 8
    # milliseconds, not the whole seconds that this release prints by itself
    assert (requests["received_s"] % 1).nunique() > 20


def test_the_sums_are_those_of_the_log_and_the_counters(run: Run) -> None:
    """By hand: what the log says of all requests, bench_serving's own one among them, against the counters."""
    loads = table(run, "loads").set_index("load")
    files = run.trial("000-plain-r0")
    lines = re.findall(
        r"Decode out of memory happened\. #retracted_reqs: (\d+),", files.server_log.read_text()
    )
    retracted = sum(map(int, lines))
    assert loads.loc["retract", "retracted_requests"] == retracted >= 1
    assert loads["evicted_tokens"].gt(0).to_dict() == {
        "chat": False,
        "retract": True,
        "rate": False,
        "shared": False,
    }
    assert loads.loc["retract", "generated_tokens"] == 12 * 120
    metrics = table(run, "metrics")
    counted = metrics[metrics["name"] == "sglang:num_requests_total"].set_index("load")["delta"]
    assert counted.to_dict() == {"chat": 2, "retract": 13, "rate": 25, "shared": 13}


def test_what_is_missing_is_said(run: Run) -> None:
    verdicts = {v["claim"]: v for v in read_json(run.verdicts)["verdicts"]}  # type: ignore[attr-defined]
    assert verdicts["evicts"]["outcome"] == "inconclusive", (
        "one repeat; the server counts no evictions, the probe does"
    )
    assert verdicts["lfu"]["reason"] == "no lfu: SGLang 0.4.6.post5 has no --radix-eviction-policy"
    assert verdicts["lfu"]["outcome"] == "untested"
    report = run.report.read_text()
    assert "- variant `lfu`: SGLang 0.4.6.post5 has no --radix-eviction-policy" in report
    assert "- `queue_ms` is empty: " in report


def test_the_answers_are_what_transformers_says(run: Run, stack_python: Path) -> None:
    """Greedy, in float32, cold and from the cache, single and in a batch; with the transformers of the stack cpu."""
    files = run.trial("000-plain-r0")
    windows = {}
    for name in ("rate", "shared"):
        status = read_json(files.load(name).status)
        windows[name] = (float(str(status["started"])), float(str(status["ended"])))
    echo = read_echo(files.server_log, windows, extra={"rate": 1, "shared": 1})
    prompts = prompts_by_rid(files.server_log)
    for name, steps in (("rate", 4), ("shared", 8)):
        rows = echo.frames[name]
        texts = [prompts[rid] for rid in rows["rid"]]
        ids = [one["ids"] for one in reference(stack_python, "there_and_back", texts=texts)]
        assert [len(one) for one in ids] == list(rows["server_prompt"])
        said = [one["ids"] for one in reference(stack_python, "there_and_back", texts=list(rows["answer"]))]
        expected = [one["ids"] for one in reference(stack_python, "greedy", prompts=ids, steps=steps)]
        spelt = [one["ids"] for one in reference(stack_python, "as_text_again", ids=expected)]
        assert said == spelt, "the server gives text, and other tokens may spell the same"
        assert len({tuple(one) for one in said}) > len(said) / 2, "equal answers would prove little"


def prompts_by_rid(log: Path) -> dict[str, str]:
    """The prompt of each request, cut out of its line in another way than the lab does."""
    found = {}
    for line in log.read_text().splitlines():
        _, receive, said = line.partition("] Receive: obj=")
        if receive:
            words = tokenize.generate_tokens(io.StringIO(said.partition("text=")[2]).readline)
            text = next(words).string  # a prompt may hold anything, the line's own < and > among it
            rid = said.rpartition(" rid='")[2].partition("'")[0]
            found[rid] = ast.literal_eval(text)
    return found


def reference(python: Path, question: str, **inputs: object) -> list[dict[str, list[int]]]:
    """The answer of `nano_reference.py`."""
    model = places.cache() / "models" / f"nano-{get_model('nano').sha256[:12]}"
    done = subprocess.run(
        (str(python), "-I", str(REFERENCE), question),
        input=json.dumps({"model": str(model), **inputs}),
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert isinstance(answer, list)
    return answer


def test_commands_repeat_the_run_without_the_lab(run: Run, tmp_path: Path) -> None:
    """The script waits for the end of the server's warm-up, as the lab does."""
    need(shutil.which("curl") is not None, "curl")
    done = subprocess.run(
        ("bash", str(run.commands)),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "OUT": str(tmp_path / "again")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = tmp_path / "again" / "000-plain-r0"
    log = (again / "server.log").read_text()
    flushed = log.index("POST /flush_cache")
    assert log.index("The server is fired up and ready to roll!") < flushed
    first = run.trial("000-plain-r0").load("retract").bench
    texts: Callable[[Path], list[str]] = lambda file: json.loads(file.read_text())["generated_texts"]  # noqa: E731
    assert texts(again / "loads/retract/bench.jsonl") == texts(first)
