"""What differs between releases of SGLang, as data: what is said to the server and to its load generator, what is read
from them, and what a release does not tell. In goes the name that a stack.toml or a plan has, out comes a `Dialect`;
nothing else in the lab asks for a version. Every entry was read in the release's source and run; tests compare it with
the real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from packaging.version import InvalidVersion, Version

from lab.errors import LabError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one release speaks. Metric names are without the prefix `sglang:`; "" where the release has no such metric.

    `health` answers 200 when the HTTP server is up; where `warm_up_pending` that is before the server's own warm-up
    request is done, which `requests_total` then counts. `records` is where the server's account of each request is:
    a file of its own (`export`) or its log (`log`). `unknown_flags` are server arguments of newer releases that
    experiments use and this one refuses; `on_cpu` are those that it has and that only one value of works without a GPU:
    flag, value, and why the others do not. `probe_path` is what PYTHONPATH needs so that the probe comes in.

    Of bench_serving: `implied` are flags that it lacks, each with the value that it acts by; `added` are arguments that
    every load gets; `bench_extra` is how many requests it sends before the load, whatever it is told. `datasets` are
    the loads that the lab has a program for in this release; `silent` are columns of the tables that it gives no
    source for, each with the reason. `static_share` is its rule for how much of a GPU weights and KV cache take: a
    `table` by ranks, or what a `reserve` for activations and CUDA graphs leaves (`lab/fit.py`).
    """

    release: str
    until: str = ""  # the first release that speaks otherwise, "" where none is known
    health: str = "/health"
    warm_up_pending: bool
    info: str
    flush: str = "/flush_cache"
    metrics: str = "/metrics"
    server_env: tuple[tuple[str, str], ...]
    probe_path: tuple[str, ...] = ("${LAB}/probe",)
    unknown_flags: tuple[str, ...] = ()
    on_cpu: tuple[tuple[str, str, str], ...] = ()
    requests_total: str = "num_requests_total"
    prompt_total: str = "prompt_tokens_total"
    cached_total: str = "cached_tokens_total"
    generated_total: str = "generation_tokens_total"
    evicted_total: str
    retracted_total: str
    records: Literal["export", "log"]
    static_share: Literal["table", "reserve"] = "reserve"
    bench: str = "sglang.bench_serving"
    preload: tuple[str, ...]
    datasets: tuple[str, ...]
    implied: tuple[tuple[str, str], ...] = ()
    added: tuple[str, ...] = ()
    bench_extra: int = 0
    silent: tuple[tuple[str, str], ...] = ()

    def client(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        """A client's command, written for the newest release, in this one's words.

        A flag of `implied` is left out, with its value if it has one. `LabError` when the value is not the implied one:
        this release cannot do what was asked for. The lab's own client programs are the same for every release.
        """
        if argv[:1] != ("-m",):
            return argv
        words = ["-m", self.bench]
        implied = dict(self.implied)
        rest = iter(argv[2:])
        for word in rest:
            if word not in implied:
                words.append(word)
            elif implied[word] and (value := next(rest, "")) != implied[word]:
                raise LabError(
                    f"bench_serving of SGLang {self.release} has no {word}, and {value} was asked for",
                    why=f"it always does what {word} {implied[word]} says",
                    fix=f"ask for {implied[word]}, or use a stack with a newer SGLang",
                )
        return (*words, *self.added)

    def extra_requests(self, dataset: str) -> int:
        """How many requests a load of this kind sends before those it was asked for."""
        return 0 if dataset == "chat" else self.bench_extra

    def refused(self, args: tuple[str, ...], *, device: str) -> tuple[str, ...]:
        """What a server of this release cannot do of these arguments on a "cpu" or "cuda" device, in words."""
        unknown = [f"no {word}" for word in args if word in self.unknown_flags]
        given = dict(pairwise(args))  # of a flag that is given twice, the last one counts
        limits = self.on_cpu if device == "cpu" else ()
        unable = [
            f"no {flag} {given[flag]} without a GPU: {why}"
            for flag, value, why in limits
            if given.get(flag, value) != value
        ]
        return (*unknown, *unable)


DIALECTS = (
    Dialect(
        release="0.4.6.post5",
        until="0.4.7",  # the text of a retraction changed there
        warm_up_pending=True,
        info="/get_server_info",
        # Log lines get milliseconds, and the process that wrote them: by itself this release prints whole seconds.
        server_env=(("SGLANG_LOGGING_CONFIG_PATH", "${LAB}/data/logging.json"),),
        probe_path=(
            "${LAB}/probe/startup",
            "${LAB}/probe",
        ),  # it has no plugins: Python itself loads the probe
        unknown_flags=(
            "--radix-eviction-policy",
            "--skip-server-warmup",
            "--export-metrics-to-file",
            "--export-metrics-to-file-dir",
            "--max-queued-requests",
            "--enable-deterministic-inference",
        ),
        on_cpu=(
            ("--tp-size", "1", "its all-reduce and all-gather need a GPU"),
            ("--tensor-parallel-size", "1", "its all-reduce and all-gather need a GPU"),
            ("--page-size", "1", "its paged allocator is a Triton kernel"),
            ("--attention-backend", "torch_native", "the others need a GPU"),
            ("--grammar-backend", "none", "a grammar's mask has no CPU version"),
        ),
        evicted_total="",
        retracted_total="",
        records="log",
        static_share="table",
        preload=("sglang", "sglang.bench_serving", "sglang.lang.backend.runtime_endpoint"),
        datasets=("random-ids", "generated-shared-prefix", "chat"),
        implied=(
            # The server's log has the cached tokens of each request.
            ("--cache-report", ""),
            # Prompts go as text: the server's count of tokens, which the tables use, may differ from what was asked.
            ("--tokenize-prompt", ""),
            ("--gsp-range-ratio", "1.0"),
        ),
        # --warmup-requests is parsed and not used: the first prompt is always sent once before. The flush takes it out of the
        # cache again; what it adds to the server's counters is taken off by the server's own record of it.
        added=("--flush-cache",),
        bench_extra=1,
        silent=(
            ("evicted_tokens", "it counts no evictions"),
            ("queue_ms", "neither its log nor its metrics have a request's time in the queue"),
            ("server_ttft_ms", "it has the time to first token only as a histogram over all requests"),
            ("retractions", "its log has how many requests were retracted, not which"),
        ),
    ),
    Dialect(
        release="0.5.21",
        warm_up_pending=False,
        info="/server_info",
        # The health endpoint would otherwise generate a token on every call, which puts a request of ours
        # into the cache and the counters; log lines get milliseconds.
        server_env=(("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "false"), ("SGLANG_LOG_MS", "1")),
        on_cpu=(
            ("--page-size", "1", "its paged allocator is a Triton kernel"),
            ("--attention-backend", "torch_native", "the others need a GPU, or Triton's interpreter"),
        ),
        evicted_total="evicted_tokens_total",
        retracted_total="num_retracted_requests_total",
        records="export",
        preload=("sglang", "sglang.benchmark.serving", "sglang.lang.backend.runtime_endpoint"),
        datasets=("random-ids", "generated-shared-prefix", "chat"),
    ),
)


def get_dialect(name: str) -> Dialect:
    """The dialect that a stack.toml names; `LabError` when there is none of that name."""
    found = next((dialect for dialect in DIALECTS if dialect.release == name), None)
    if found is None:
        raise unknown_name("dialect", name, [dialect.release for dialect in DIALECTS])
    return found


def dialect_of(release: str) -> Dialect:
    """What an SGLang of this release speaks, for runs whose stack is not at hand: the newest dialect that is not newer.

    `LabError` when the lab knows none for it.
    """
    try:
        version = Version(release)
    except InvalidVersion:
        version = Version("0")
    for dialect in reversed(DIALECTS):
        if Version(dialect.release) <= version and (not dialect.until or version < Version(dialect.until)):
            return dialect
    known = ", ".join(dialect.release for dialect in DIALECTS)
    raise LabError(
        f"the lab does not know how SGLang {release} speaks",
        why=f"lab/dialect.py describes {known}",
        fix="use one of these, or describe the release there; its tests tell what is wrong",
    )
