"""A run directory with the files of a real one, small and made in milliseconds, for tests of what reads runs.

Every format is copied from a real run of SGLang 0.5.21: bench_serving's details, the chat program's lines, the
server's export, log and metrics. Times are fixed; one token of a prompt is four characters of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lab import commands
from lab.experiment import Source, load_experiment
from lab.models import get_model
from lab.plan import LoadStep, Plan, Trial, to_json
from lab.planning import make_plan
from lab.rundir import LoadFiles, Run, write_json, write_text
from lab.site import Site
from lab.stack import Needs, Stack

NAME = "20260102T030405Z-ab12"
START = 1_767_322_800.0  # 2026-01-02 03:00 UTC
POOL = 4096
PLACES = {
    "STACK": "/lab-test/stack",
    "MODEL": "/lab-test/model",
    "LAB": "/lab-test/lab",
    "JIT": "/lab-test/jit",
}

EXPERIMENT = '''\
"""A small experiment for tests."""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import Chat, RandomIds, SharedPrefix

EXPERIMENT = Experiment(
    name="small",
    question="Does it work?",
    mechanism="It works like this.",
    sources=("`somewhere.py`",),
    server=("--max-total-tokens", "4096"),
    variants=(
        Variant(name="cache-on", says="with"),
        Variant(name="cache-off", says="without", args=("--disable-radix-cache",)),
    ),
    loads=(
        RandomIds(name="warmup", role="warmup", seed=1, prompts=2, input_tokens=100, output_tokens=4),
        Chat(name="chat", seed=0, questions=("A?", "B?", "C?"), system_chars=800, system_tokens=200, output_tokens=4),
        SharedPrefix(
            name="shared", seed=2, groups=2, prompts_per_group=3, prefix_tokens=200, question_tokens=20, output_tokens=4
        ),
    ),
    claims=(
        Claim(
            name="hits",
            says="Later requests hit.",
            measure=Measure(table="requests", load="chat", column="cached_share", rows="later", reduce="min"),
            variant="cache-on",
            op=">",
            threshold=0.8,
        ),
        Claim(
            name="faster",
            says="And are faster.",
            measure=Measure(table="requests", load="shared", column="ttft_ms", rows="later"),
            variant="cache-on",
            against="cache-off",
            op="<",
            threshold=0.7,
        ),
    ),
    try_next=("Something else.",),
    repeats=2,
    probe="off",
)
'''


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as both sides saw it; seconds and tokens."""

    rid: str
    prompt: str | list[int]
    prompt_tokens: int
    cached: int
    output: int
    received: float
    ttft: float


def stack() -> Stack:
    """A stack that exists nowhere; its arguments are like those of `cpu`."""
    return Stack(
        name="fake",
        folder=Path("/lab-test/containers/fake"),
        description="none",
        sglang="0.5.21",
        torch="2.13.0+cpu",
        python="3.11",
        device="cpu",
        dialect="0.5.21",
        needs=Needs(memory_gb=0, disk_gb=0, system="Linux", machine="x86_64", glibc="2.34"),
        env=(("SGLANG_USE_CPU_ENGINE", "1"),),
        server_args=("--device", "cpu", "--dtype", "float32"),
        observe_args=("--enable-metrics", "--decode-log-interval", "10", "--random-seed", "1"),
        imports=(),
        lock_hash="0" * 64,
    )


def make_fake_plan(source: Source, *, repeats: int | None = None, site: Site | None = None) -> Plan:
    """The plan of an experiment on the fake stack, with places that are nowhere."""
    return make_plan(
        source,
        stack=stack(),
        model=get_model("nano"),
        model_sha256=get_model("nano").sha256,
        site=site or Site(name="fake"),
        places=PLACES,
        repeats=repeats,
    )


def small(root: Path) -> Source:
    """The small experiment, read from a file below `root`."""
    folder = root / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.py").write_text(EXPERIMENT)
    return load_experiment("small", folder=folder)


def make_run(root: Path, *, repeats: int = 2, source: Source | None = None) -> Run:
    """A whole run below `root`/runs, not sealed, so that a test may change it first."""
    source = source or small(root)
    plan = make_fake_plan(source, repeats=repeats)
    run = Run(root / "runs" / plan.experiment / NAME)
    write_text(run.plan, to_json(plan))
    write_text(run.commands, commands.script(plan))
    write_text(run.experiment, source.text)
    write_text(run.diff, "")
    machine = {
        "cpu": "Fake CPU",
        "cpus_usable": 2,
        "memory_gib": 8.0,
        "load_average_1min": 0.1,
        "kernel": "6",
        "system": "Linux",
        "glibc": "2.36",
        "python": "3.11",
        "lab": "0.1.0",
        "git_commit": "0" * 40,
        "git_dirty": False,
    }
    choices = {"runtime": "process", "site": "fake", "reasons": ["nothing pinned"]}
    write_json(run.environment, {"machine": machine, "stack": {"lock_hash": "0" * 64}, "choices": choices})
    for trial in plan.trials:
        _trial(run, trial)
    return run


def _trial(run: Run, trial: Trial) -> None:
    files = run.trial(trial.name)
    began = START + 100 * trial.index
    write_json(
        files.status,
        {
            "status": "ok",
            "phase": "done",
            "reason": "",
            "last_lines": [],
            "started": _iso(began),
            "ended": _iso(began + 90),
            "port": 30001,
            "ready_s": 17.5,
            "stopped": [{"name": "server", "how": "SIGINT", "seconds": 1.5, "exit_code": -2}],
        },
    )
    arguments = {
        "model_path": PLACES["MODEL"],
        "device": "cpu",
        "dtype": "float32",
        "host": "127.0.0.1",
        "port": 30001,
        "enable_metrics": True,
        "enable_cache_report": True,
        "export_metrics_to_file": True,
        "decode_log_interval": 10,
        "random_seed": 1,
        "max_total_tokens": 4096,
        "disable_radix_cache": trial.variant == "cache-off",
    }
    write_json(files.server_info, {"server_info": {**arguments, "max_total_num_tokens": POOL}})
    write_text(files.client_log, "")
    log = ["[2026-01-02 03:00:00.100] The server is fired up and ready to roll!"]
    export: list[str] = []
    counted = {"prompt": 0, "cached": 0, "generation": 0, "requests": 0}
    for i, step in enumerate(trial.loads):
        load = files.load(step.name)
        start = began + 20 * (i + 1)
        write_text(load.before, metrics(counted))
        requests = list(_requests(trial, step, start=start))
        for request in requests:
            counted["prompt"] += request.prompt_tokens
            counted["cached"] += request.cached
            counted["generation"] += request.output
            counted["requests"] += 1
            export.append(export_line(request))
            log.append(_prefill_line(request))
        _client_files(load, step, requests)
        write_text(load.after, metrics(counted))
        write_text(load.log, "")
        write_json(load.status, {"exit": 0, "started": start, "ended": start + 15})
    write_text(files.server_log, "\n".join(log) + "\n")
    write_text(files.export / "sglang-request-metrics-20260102_03.log", "".join(export))


def _requests(trial: Trial, step: LoadStep, *, start: float) -> Iterator[Request]:
    """The requests of a load, one a second; a cache hit is five times as fast as a prefill."""
    hits = trial.variant == "cache-on"
    for i in range(step.requests):
        prompt: str | list[int]
        group, first = (i % 2, i < 2) if step.name == "shared" else (0, i == 0)
        if step.dataset == "random-ids":
            prompt, length, shared = [1000 * i + k for k in range(100)], 100, 0
        else:
            prefix = f"{step.name} prefix {group} ".ljust(800, "abcdefg "[group])
            prompt, length, shared = prefix + chr(ord("A") + i) * 80, 220, 0 if first else 200
        cached = shared if hits else 0
        yield Request(
            rid=f"{trial.index:02d}{step.name}{i}",
            prompt=prompt,
            prompt_tokens=length,
            cached=cached,
            output=4,
            received=start + 0.01 + i,
            ttft=(0.02 if cached else 0.1) * (1 + 0.01 * trial.repeat),
        )


def _client_files(files: LoadFiles, step: LoadStep, requests: list[Request]) -> None:
    gaps = [0.01, 0.01, 0.01]
    if step.dataset == "chat":
        rows = [
            {
                "order": i,
                "question": "A?",
                "rid": r.rid,
                "sent": r.received - 0.002,
                "ttft_s": r.ttft + 0.002,
                "e2e_s": r.ttft + 0.032,
                "itls_s": gaps,
                "prompt_tokens": r.prompt_tokens,
                "cached_tokens": r.cached,
                "completion_tokens": r.output,
                "error": "",
            }
            for i, r in enumerate(requests)
        ]
        write_text(files.chat, "".join(json.dumps(row) + "\n" for row in rows))
        return
    row = {
        "backend": "sglang",
        "dataset_name": step.dataset,
        "request_rate": float("inf"),
        "max_concurrency": 1,
        "duration": 3.0,
        "completed": len(requests),
        "input_lens": [r.prompt_tokens for r in requests],
        "output_lens": [r.output for r in requests],
        "ttfts": [r.ttft + 0.002 for r in requests],
        "itls": [gaps for _ in requests],
        "generated_texts": ["x" for _ in requests],
        "errors": ["" for _ in requests],
        "cached_tokens": [r.cached for r in requests],
    }
    write_text(files.bench, json.dumps(row) + "\n")


def export_line(request: Request) -> str:
    """One line of the server's export, with the fields the lab reads and some it does not."""
    kind = "text" if isinstance(request.prompt, str) else "input_ids"
    parameters = {"rid": request.rid, kind: request.prompt, "sampling_params": {"temperature": 0}}
    row = {
        "request_parameters": json.dumps(parameters),
        "id": request.rid,
        "finish_reason": {"type": "length", "length": request.output},
        "prompt_tokens": request.prompt_tokens,
        "num_retractions": 0,
        "queue_time": 0.001,
        "completion_tokens": request.output,
        "cached_tokens": request.cached,
        "cached_tokens_details": None,
        "e2e_latency": request.ttft + 0.03,
        "request_received_ts": request.received,
        "first_token_latency": request.ttft,
    }
    return json.dumps(row) + "\n"


def metrics(counted: dict[str, int]) -> str:
    """A metrics page; like SGLang's, it has no counter that was never used."""
    lines = ["# HELP sglang:token_usage The token usage.", "# TYPE sglang:token_usage gauge"]
    lines.append('sglang:token_usage{model_name="m",tp_rank="0"} 0.0')
    names = {
        "prompt": "prompt_tokens",
        "cached": "cached_tokens",
        "generation": "generation_tokens",
        "requests": "num_requests",
    }
    for key, name in names.items():
        if counted[key]:
            lines.append(f"# HELP sglang:{name}_total Number of {name}.")
            lines.append(f"# TYPE sglang:{name}_total counter")
            lines.append(f'sglang:{name}_total{{model_name="m"}} {float(counted[key])}')
    return "\n".join(lines) + "\n"


def _prefill_line(request: Request) -> str:
    at = datetime.fromtimestamp(request.received + 0.001, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return (
        f"[{at}] Prefill batch, #new-seq: 1, #new-token: {request.prompt_tokens - request.cached}, "
        f"#cached-token: {request.cached}, token usage: 0.05, #running-req: 0, #queue-req: 0, #pending-token: 0, "
        "cpu graph: False, input throughput (token/s): 721.19"
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
