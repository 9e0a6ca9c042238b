"""The load of a trial, as data, and what it must do to a prefix cache.

A trial runs its workloads ("loads", for short) one after the other on one fresh server, each started from a
flushed cache. `argv()` is the exact client command, with `${NAME}` placeholders for what only
the running trial knows (see `plan.PLACEHOLDERS`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

from lab.errors import LabError, unknown_name

Role = Literal["warmup", "measure"]

DATASETS = ("random-ids", "generated-shared-prefix", "chat")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One client program run against the server.

    `concurrency` requests are in flight at once (closed loop); with `rate_per_s` the requests are sent at
    that mean rate instead (open loop, Poisson). Every request asks for an answer of exactly `output_tokens`.
    `variants` limits the load to those; empty means all. `small` names other numbers for machines that cannot serve
    the load as it is: fields of the load with their values there (see `scaled`).
    """

    name: str
    seed: int
    output_tokens: int
    role: Role = "measure"
    concurrency: int = 1
    rate_per_s: float | None = None
    variants: tuple[str, ...] = ()
    small: Mapping[str, float] = field(default_factory=dict)

    dataset = ""

    def scaled(self) -> Self:
        """The load with its small numbers."""
        return replace(self, **self.small, small={})  # type: ignore[arg-type]  # `check` has looked at names and types

    def said_scaled(self) -> str:
        """What the small load has other than this one, in words; empty for a load that is the same everywhere."""
        changes = [f"{key} {value:g} instead of {getattr(self, key):g}" for key, value in self.small.items()]
        return ", ".join(changes)

    def argv(self, repeat: int) -> tuple[str, ...]:
        """The client's command in repeat number `repeat`, without the interpreter."""
        raise NotImplementedError

    def requests(self) -> int:
        """How many requests the load sends."""
        raise NotImplementedError

    def hit_rate(self, *, cache_on: bool) -> float:
        """Cached over prompt tokens that an unbounded cache must show, from the planned lengths (0..1)."""
        raise NotImplementedError

    def working_set_tokens(self) -> int:
        """Distinct tokens the load leaves in an unbounded cache."""
        raise NotImplementedError

    def longest_tokens(self) -> int:
        """Tokens of the longest request, prompt and answer together, from the planned lengths."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise LabError for a dataset the lab has no program for, and for numbers that make no sense."""
        if self.dataset not in DATASETS:
            raise unknown_name("dataset", self.dataset, DATASETS)
        if self.concurrency < 1 or self.concurrency > 100_000:
            raise LabError(
                f"load {self.name!r}: concurrency is {self.concurrency}",
                why="it is the number of requests in flight",
                fix="use 1 to 100000",
            )
        if self.rate_per_s is not None and not 0 < self.rate_per_s <= 1_000_000:
            raise LabError(
                f"load {self.name!r}: rate_per_s is {self.rate_per_s}",
                why="it is a mean number of requests a second",
                fix="use a number above 0, or None for a closed loop",
            )

        self._check_small()

    def _check_small(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in fields(self)}
        allowed = [key for key, value in numbers.items() if isinstance(value, (int, float)) and key != "seed"]
        for key, value in self.small.items():
            if key not in allowed:
                raise unknown_name(f"number in small of load {self.name!r}:", key, allowed)
            if type(value) is not type(numbers[key]):
                raise LabError(
                    f"load {self.name!r}: small has {key}={value!r}",
                    why=f"the load itself has {numbers[key]!r}",
                    fix=f"use a number of the same kind, such as {numbers[key]!r}",
                )
        if self.small:
            self.scaled().check()

    def _lengths(self, **values: int) -> None:
        for key, value in values.items():
            if not 1 <= value <= 10_000_000:
                raise LabError(
                    f"load {self.name!r}: {key} is {value}",
                    why="counts and lengths are whole numbers of requests or tokens",
                    fix="use 1 to 10000000",
                )

    def _bench(self, repeat: int) -> tuple[str, ...]:
        """Arguments every bench_serving load gets; each is here because its default would spoil a trial.

        The seed moves with the repeat and not with the variant: repeats see different prompts, while the
        variants of one repeat see the same ones and can be compared in pairs.
        The warm-up request of bench_serving would put the first prompt into the cache, the default seed and
        range ratio differ between SGLang versions, and the output file is appended to.
        """
        rate = "inf" if self.rate_per_s is None else f"{self.rate_per_s:g}"
        limit = () if self.rate_per_s is not None else ("--max-concurrency", str(self.concurrency))
        return (
            *("-m", "sglang.bench_serving", "--backend", "sglang"),
            *("--host", "127.0.0.1", "--port", "${PORT}", "--model", "${MODEL}", "--tokenizer", "${MODEL}"),
            *("--dataset-name", self.dataset, "--seed", str(self.seed + repeat)),
            *("--request-rate", rate, *limit, "--warmup-requests", "0"),
            *("--output-file", "${LOAD}/bench.jsonl", "--output-details", "--cache-report", "--disable-tqdm"),
        )


@dataclass(frozen=True, kw_only=True)
class RandomIds(Workload):
    """Unrelated prompts of random token ids: nothing to share, so nothing a prefix cache could help."""

    prompts: int
    input_tokens: int

    dataset = "random-ids"

    def check(self) -> None:
        super().check()
        self._lengths(prompts=self.prompts, input_tokens=self.input_tokens, output_tokens=self.output_tokens)

    def argv(self, repeat: int) -> tuple[str, ...]:
        return (
            *self._bench(repeat),
            *("--num-prompts", str(self.prompts)),
            *("--random-input-len", str(self.input_tokens), "--random-output-len", str(self.output_tokens)),
            *("--random-range-ratio", "1.0", "--tokenize-prompt"),
        )

    def requests(self) -> int:
        return self.prompts

    def hit_rate(self, *, cache_on: bool) -> float:  # noqa: ARG002  random prompts share nothing either way
        return 0.0

    def working_set_tokens(self) -> int:
        return self.prompts * self.longest_tokens()

    def longest_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class SharedPrefix(Workload):
    """bench_serving's generated-shared-prefix: `prompts_per_group` questions to each of `groups` prefixes."""

    groups: int
    prompts_per_group: int
    prefix_tokens: int
    question_tokens: int

    dataset = "generated-shared-prefix"

    def check(self) -> None:
        super().check()
        self._lengths(
            groups=self.groups,
            prompts_per_group=self.prompts_per_group,
            prefix_tokens=self.prefix_tokens,
            question_tokens=self.question_tokens,
            output_tokens=self.output_tokens,
        )

    def argv(self, repeat: int) -> tuple[str, ...]:
        return (
            *self._bench(repeat),
            *("--num-prompts", str(self.requests())),
            *("--gsp-num-groups", str(self.groups), "--gsp-prompts-per-group", str(self.prompts_per_group)),
            *("--gsp-system-prompt-len", str(self.prefix_tokens)),
            *("--gsp-question-len", str(self.question_tokens)),
            *("--gsp-output-len", str(self.output_tokens), "--gsp-range-ratio", "1.0"),
        )

    def requests(self) -> int:
        return self.groups * self.prompts_per_group

    def hit_rate(self, *, cache_on: bool) -> float:
        """Every request but a group's first finds the prefix: (k-1)·prefix / k·(prefix+question)."""
        if not cache_on:
            return 0.0
        k = self.prompts_per_group
        return (k - 1) * self.prefix_tokens / (k * (self.prefix_tokens + self.question_tokens))

    def working_set_tokens(self) -> int:
        own = self.prompts_per_group * (self.question_tokens + self.output_tokens)
        return self.groups * (self.prefix_tokens + own)

    def longest_tokens(self) -> int:
        return self.prefix_tokens + self.question_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Chat(Workload):
    """Questions asked one by one under one long system prompt, by a program written with `sgl.function`.

    `system_chars` of the handbook in lab/data become the system prompt, about `system_tokens` tokens of
    the model's tokenizer; the prediction uses the tokens, the requests table shows what they really were.
    """

    questions: tuple[str, ...]
    system_chars: int
    system_tokens: int

    dataset = "chat"

    def check(self) -> None:
        super().check()
        self._lengths(
            questions=len(self.questions),
            system_chars=self.system_chars,
            system_tokens=self.system_tokens,
            output_tokens=self.output_tokens,
        )

    def argv(self, repeat: int) -> tuple[str, ...]:  # noqa: ARG002  the program draws nothing at random
        asked = tuple(word for question in self.questions for word in ("--question", question))
        return (
            *("${LAB}/load/chat.py", "--url", "http://127.0.0.1:${PORT}"),
            *("--system-file", "${LAB}/data/handbook.md", "--system-chars", str(self.system_chars)),
            *("--max-tokens", str(self.output_tokens), "--output-file", "${LOAD}/chat.jsonl", *asked),
        )

    def requests(self) -> int:
        return len(self.questions)

    def hit_rate(self, *, cache_on: bool) -> float:
        """All but the first question find the system prompt; questions are short beside it and left out."""
        k = len(self.questions)
        return (k - 1) / k if cache_on else 0.0

    def working_set_tokens(self) -> int:
        return self.system_tokens + len(self.questions) * self.output_tokens

    def longest_tokens(self) -> int:
        """Questions are short beside the system prompt, and left out."""
        return self.system_tokens + self.output_tokens
