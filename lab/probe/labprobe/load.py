"""The way in: `load` is what SGLang's plugin loader calls in each of its processes (and `startup/sitecustomize.py` for
releases without plugins). With LAB_PROBE_DIR set it puts the hooks in place, and the first scheduler made in this
process gets a file `events-<rank>-<pid>.jsonl` in that folder. It never raises."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from importlib import import_module

from labprobe import guard, memory, settings
from labprobe.observer import Observer, Pools, now
from labprobe.schema import SCHEMA
from labprobe.writer import Writer

# Releases by the start of their number, the first that fits; others are tried with the newest.
DIALECTS = (("0.4.6", "labprobe.sglang046"), ("", "labprobe.sglang05"))
_probe: Probe | None = None


def load() -> None:
    """Put the hooks in place, once in a process, if the environment asks for them."""
    global _probe
    try:
        asked = settings.read()
        if asked is not None and _probe is None:
            _probe = Probe(asked)
            _probe.install()
    except Exception as error:  # a probe that does not start is missed by the reader; the server goes on
        print(f"labprobe: not loaded: {error!r}", file=sys.stderr)


def release() -> str:
    """The version of SGLang in this environment, from its metadata: importing it here would be too early."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sglang")
    except PackageNotFoundError:
        return ""


class Probe:
    """The hooks of this process, their guards, and the file."""

    def __init__(self, asked: settings.Settings) -> None:
        self.settings = asked
        self.release = release()
        self.writer = Writer(limit=asked.queue_events, file_bytes=asked.file_bytes)
        self.observer = Observer(self.writer, level=asked.level, nvtx_on=asked.nvtx)
        self.guards: list[guard.Guard] = []
        self.state: dict[str, str] = {}
        self._device: int | None = None
        self._dialect: object = None

    def install(self) -> None:
        """Hook what is imported already, and the rest when it is."""
        module = next(name for start, name in DIALECTS if self.release.startswith(start))
        self._dialect = import_module(module)
        waiting: dict[str, list[guard.Hook]] = defaultdict(list)
        for hook in self._dialect.hooks(self.observer, self.start):
            self.state[hook.target] = "waits for its module"
            waiting[hook.module].append(hook)
        guard.after_import({name: partial(self._attach, hooks) for name, hooks in waiting.items()})

    def _attach(self, hooks: list[guard.Hook], module: object) -> None:
        for hook in hooks:
            one = guard.Guard(
                hook.name, report=self._report, fault=(self.settings.faults or {}).get(hook.name, 0)
            )
            try:
                status, detail = guard.attach(module, hook, one)
            except Exception as error:  # one hook that cannot be placed leaves the others
                status, detail = "missing", repr(error)
            self.guards.append(one)
            self.state[hook.target] = status
            if status != "on":
                self.writer.put(("hook", now(), hook.target, status, detail))
                if hook.name == "create":  # nothing else would open the file, and the reader must learn why
                    self._open({}, rank="unknown")

    def _report(self, name: str, detail: str) -> None:
        self.writer.put(("error", now(), name, detail))
        if any(one.name == name and one.errors >= guard.ERRORS_ALLOWED for one in self.guards):
            self.writer.put(("hook", now(), name, "off", f"{guard.ERRORS_ALLOWED} errors"))

    def start(self, scheduler: object) -> None:
        """There is a scheduler: open the file, and look at it from here on."""
        if self.observer.scheduler is not None:
            return
        tree = scheduler.tree_cache
        pools = Pools(
            scheduler.req_to_token_pool,
            scheduler.token_to_kv_pool_allocator,
            tree,
            kv_total=scheduler.max_total_num_tokens,
        )
        trees = frozenset(id(one) for one in (tree, getattr(tree, "inner", None)) if one is not None)
        policy = scheduler.policy.policy.value
        facts = self._dialect.facts(scheduler) | {"policy": policy, "tree": type(tree).__name__}
        self._device = facts.get("gpu") if facts.get("device") == "cuda" else None
        ranks = {
            name: facts[f"{name}_rank"]
            for name in ("dp", "pp", "tp")
            if facts.get(f"{name}_rank") is not None
        }
        self.observer.watch(scheduler, pools, trees=trees, policy=policy)
        self._open(facts, rank="-".join(f"{name}{number}" for name, number in ranks.items()) or "unknown")

    def _open(self, facts: Mapping[str, object], *, rank: str) -> None:
        os.makedirs(self.settings.folder, exist_ok=True)
        path = os.path.join(self.settings.folder, f"events-{rank}-{os.getpid()}.jsonl")
        self.writer.open(path, self._header(facts), tick=self._memory, errors=self._errors)

    def _header(self, facts: Mapping[str, object]) -> dict[str, object]:
        for target, status in self.state.items():
            if status == "waits for its module":
                detail = "its module is not imported by this server"
                self.writer.put(("hook", now(), target, "waits", detail))
        return {
            "e": "header",
            "t_ns": now(),
            "unix_ns": time.time_ns(),
            "schema": SCHEMA,
            "sglang": self.release,
            "python": sys.version.split()[0],
            "pid": os.getpid(),
            "level": self.settings.level,
            "queue_events": self.settings.queue_events,
            "nvtx": self.settings.nvtx,
            "hooks": [target for target, status in self.state.items() if status == "on"],
            "notes": list(self.settings.notes),
            **facts,
        }

    def _errors(self) -> int:
        return sum(one.errors for one in self.guards)

    def _memory(self) -> tuple[tuple[object, ...], ...]:
        return (("memory", now(), *memory.figures(self._device)),)
