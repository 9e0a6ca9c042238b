"""The probe outside of a server: hooks that cannot harm, a writer that never waits, settings, what it imports."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from labprobe import guard, memory, nvtx, schema, settings
from labprobe.guard import ERRORS_ALLOWED, Guard, Hook, wrap
from labprobe.observer import Observer, Pools
from labprobe.writer import Writer

from lab.read.events import ProbeFile, read_file

PROBE = Path(__file__).resolve().parent.parent / "lab" / "probe"


def hook(before: object, after: object, *, parameters: tuple[str, ...] = ("self", "number")) -> Hook:
    return Hook("twice", "server", "Server.twice", parameters, before, after)


class Server:
    """What is hooked in these tests."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def twice(self, number: int, *, fail: bool = False) -> int:
        self.calls.append(number)
        if fail:
            raise ValueError("the server's own")
        return 2 * number


def reports() -> tuple[list[tuple[str, str]], Guard]:
    found: list[tuple[str, str]] = []
    return found, Guard("twice", report=lambda name, detail: found.append((name, detail)))


def fails(*args: object, **kwargs: object) -> object:
    raise KeyError("the body's own")


def nothing(*args: object, **kwargs: object) -> None:
    return None


# ---------------------------------------------------------------- guard


@pytest.mark.parametrize(("before", "after"), [(fails, nothing), (nothing, fails), (fails, fails)])
def test_a_body_that_raises_changes_nothing(before: object, after: object) -> None:
    found, one = reports()
    server = Server()
    wrapped = wrap(Server.twice, hook(before, after), one)
    assert [wrapped(server, n) for n in range(3)] == [0, 2, 4]
    assert server.calls == [0, 1, 2]
    assert one.errors == 3
    assert found == [("twice", 'KeyError: "the body\'s own"')]


def test_bodies_see_arguments_and_result_in_order() -> None:
    seen: list[object] = []

    def before(server: Server, number: int, **kwargs: object) -> str:
        seen.append(("before", number, kwargs))
        return "token"

    def after(token: str, result: int, server: Server, number: int, **kwargs: object) -> str:
        seen.append((token, result, number))
        return "not the result"

    server = Server()
    assert wrap(Server.twice, hook(before, after), reports()[1])(server, 4, fail=False) == 8
    assert seen == [("before", 4, {"fail": False}), ("token", 8, 4)]


def test_the_servers_own_error_passes_and_after_is_not_called() -> None:
    after: list[object] = []

    def note(*args: object, **kwargs: object) -> None:
        after.append(args)

    wrapped = wrap(Server.twice, hook(nothing, note), reports()[1])
    with pytest.raises(ValueError, match="the server's own"):
        wrapped(Server(), 1, fail=True)
    assert after == []


def test_a_body_that_always_fails_is_switched_off() -> None:
    found, one = reports()
    tries: list[int] = []

    def before(*args: object, **kwargs: object) -> None:
        tries.append(1)
        raise RuntimeError("each time")

    wrapped = wrap(Server.twice, hook(before, nothing), one)
    server = Server()
    for n in range(ERRORS_ALLOWED + 50):
        assert wrapped(server, n) == 2 * n
    assert (len(tries), one.errors, one.on, len(found)) == (ERRORS_ALLOWED, ERRORS_ALLOWED, False, 2)


def test_an_interrupt_in_a_body_is_not_swallowed() -> None:
    def before(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrap(Server.twice, hook(before, nothing), reports()[1])(Server(), 1)


def module_with(**names: object) -> types.ModuleType:
    module = types.ModuleType("server")
    vars(module).update(names)
    return module


def test_a_hook_point_is_checked_before_it_is_used() -> None:
    class Fresh(Server):
        def twice(self, number: int, *, fail: bool = False) -> int:
            return super().twice(number, fail=fail)

    class Heir(Server):
        pass

    good = hook(nothing, nothing)
    one = reports()[1]
    assert guard.attach(module_with(Server=Fresh), good, one) == ("on", "")
    assert Fresh().twice(3) == 6
    assert hasattr(Fresh.twice, "__wrapped__")
    assert guard.attach(module_with(), good, one)[0] == "missing"
    assert guard.attach(module_with(Server=Heir), good, one)[0] == "missing"
    other = hook(nothing, nothing, parameters=("self", "count"))
    status, detail = guard.attach(module_with(Server=Server), other, one)
    assert (status, detail) == ("changed", "expected (self, count), found (self, number, fail)")
    assert not hasattr(Server.twice, "__wrapped__")


def test_modules_are_told_of_now_or_right_after_their_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe_early.py").write_text("value = 1\n")
    (tmp_path / "probe_late.py").write_text("value = 2\n")
    (tmp_path / "probe_never.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.import_module("probe_early")
    told: list[tuple[str, int]] = []
    calls = {
        name: lambda module: told.append((module.__name__, module.value))
        for name in ("probe_early", "probe_late", "probe_never")
    }
    guard.after_import(calls)
    assert told == [("probe_early", 1)]
    late = importlib.import_module("probe_late")
    importlib.reload(late)
    assert told[:2] == [("probe_early", 1), ("probe_late", 2)]
    assert late.__spec__.loader.get_source("probe_late") == "value = 2\n"


# ---------------------------------------------------------------- writer

HEADER = {
    "e": "header",
    "t_ns": 1,
    "unix_ns": 1_000_000_001,
    "schema": schema.SCHEMA,
    "pid": 7,
    "level": "batches",
}


def flush_event(number: int) -> tuple[object, ...]:
    return ("flush", number, True)


def read(path: Path) -> ProbeFile:
    found = read_file(path)
    assert isinstance(found, ProbeFile), found
    return found


def test_events_before_the_file_is_open_are_kept(tmp_path: Path) -> None:
    writer = Writer(limit=100, file_bytes=10**6)
    for number in range(1, 11):
        writer.put(flush_event(number))
    writer.open(str(tmp_path / "events-tp0-7.jsonl"), HEADER)
    writer.put(flush_event(11))
    writer.close()
    file = read(tmp_path / "events-tp0-7.jsonl")
    assert [row["t_ns"] for row in file.events["flush"]] == list(range(1, 12))
    assert (file.complete, file.dropped, file.problems) == (True, 0, ())
    assert file.events["counters"][-1]["written"] == 11


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    writer = Writer(limit=100, file_bytes=10**6)
    for number in range(250):
        writer.put(flush_event(number))
    writer.open(str(tmp_path / "events-tp0-7.jsonl"), HEADER)
    writer.close()
    file = read(tmp_path / "events-tp0-7.jsonl")
    assert [row["t_ns"] for row in file.events["flush"]] == list(range(100))
    assert file.dropped == 150
    assert file.events["counters"][-1]["queue_peak"] == 100


def test_a_full_disk_drops_and_counts(tmp_path: Path) -> None:
    one = len('{"e":"flush","t_ns":0,"done":true}\n')
    writer = Writer(limit=10**4, file_bytes=60 * one)
    for _ in range(150):
        writer.put(flush_event(0))
    path = tmp_path / "events-tp0-7.jsonl"
    writer.open(str(path), HEADER)
    writer.close()
    file = read(path)
    assert (len(file.events["flush"]), file.dropped, file.complete) == (50, 100, True)


def test_a_disk_that_refuses_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of a line fails; the next line begins on its own."""
    path = tmp_path / "events-tp0-7.jsonl"
    real, left = os.write, [False]

    def write(file: int, data: bytes) -> int:
        if b'"flush"' in data and not left[0]:
            left[0] = True
            return real(file, data[:5])
        if left == [True] and b"counters" not in data:
            raise OSError(28, "No space left on device")
        return real(file, data)

    writer = Writer(limit=100, file_bytes=10**6)
    writer.put(flush_event(1))
    monkeypatch.setattr(os, "write", write)
    writer.open(str(path), HEADER)
    writer.close()
    file = read(path)
    assert (file.dropped, len(file.problems), file.complete) == (1, 1, True)


def test_an_event_that_does_not_fit_its_schema_is_lost_alone(tmp_path: Path) -> None:
    writer = Writer(limit=100, file_bytes=10**6)
    writer.put(("flush", 1))
    writer.put(("no such kind", 2, 3))
    writer.put(flush_event(4))
    writer.open(str(tmp_path / "events-tp0-7.jsonl"), HEADER, tick=fails)
    writer.close()
    file = read(tmp_path / "events-tp0-7.jsonl")
    assert ([row["t_ns"] for row in file.events["flush"]], file.dropped) == ([4], 2)


def test_put_never_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = os.write

    def write(file: int, data: bytes) -> int:
        gate.wait(20)
        return real(file, data)

    writer = Writer(limit=50, file_bytes=10**6, interval_s=0.001)
    writer.open(str(tmp_path / "events-tp0-7.jsonl"), HEADER)
    monkeypatch.setattr(os, "write", write)
    for number in range(1000):
        writer.put(flush_event(number))
    stuck = writer.dropped
    gate.set()
    writer.close()
    file = read(tmp_path / "events-tp0-7.jsonl")
    assert stuck >= 1000 - 3 * 50
    assert len(file.events["flush"]) + file.dropped == 1000


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from labprobe.writer import Writer
writer = Writer(limit=10**6, file_bytes=10**9, interval_s=0.001)
writer.open(sys.argv[1], {header!r})
print("open", flush=True)
{then}
"""
THEN_EXIT = "for number in range(500): writer.put(('flush', number, True))"
THEN_FOREVER = """
number = 0
while True:
    number += 1
    writer.put(("flush", number, True))
    if not number % 2000: time.sleep(0.001)
"""


def child(path: Path, then: str) -> subprocess.Popen[str]:
    text = CHILD.format(header=HEADER, then=then)
    command = [sys.executable, "-I", "-c", text, str(path), str(PROBE)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_thread_ends_with_the_process_and_writes_everything(tmp_path: Path) -> None:
    process = child(tmp_path / "events-tp0-7.jsonl", THEN_EXIT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    file = read(tmp_path / "events-tp0-7.jsonl")
    assert (len(file.events["flush"]), file.complete, file.dropped) == (500, True, 0)


def test_killed_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "events-tp0-7.jsonl"
    process = child(path, THEN_FOREVER)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while path.stat().st_size < 200_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    file = read(path)
    times = [row["t_ns"] for row in file.events["flush"]]
    assert times == list(range(1, len(times) + 1))
    assert len(times) > 1000
    assert not file.complete
    assert len(file.problems) <= 1


# ---------------------------------------------------------------- settings, observer, memory


def test_without_a_folder_there_is_no_probe() -> None:
    assert settings.read({}) is None
    assert settings.read({settings.LEVEL: "cache"}) is None


def test_the_cheapest_level_is_the_default() -> None:
    found = settings.read({settings.FOLDER: "/somewhere"})
    assert found is not None
    assert (found.level, found.nvtx, found.notes) == ("batches", False, ())


def test_bad_values_are_noted_and_defaults_taken() -> None:
    environment = {
        settings.FOLDER: "x",
        settings.LEVEL: "all",
        settings.QUEUE: "-3",
        settings.MEGABYTES: "many",
    }
    found = settings.read(environment)
    assert found is not None
    assert (found.level, found.queue_events) == ("batches", settings.QUEUE_EVENTS)
    assert [note.split("=")[0] for note in found.notes] == [
        settings.LEVEL,
        settings.QUEUE,
        settings.MEGABYTES,
    ]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"NVTX_INJECTION64_PATH": "/x"}, True),
        ({"LAB_PROBE_NVTX": "1"}, True),
        ({"NVTX_INJECTION64_PATH": "/x", "LAB_PROBE_NVTX": "0"}, False),
    ],
)
def test_nvtx_only_when_somebody_listens(environment: dict[str, str], expected: bool) -> None:
    found = settings.read({settings.FOLDER: "x", **environment})
    assert found is not None
    assert found.nvtx is expected


def test_levels_contain_each_other() -> None:
    batches, requests, cache = (schema.wanted(level) for level in schema.LEVELS)
    assert batches < requests < cache == frozenset(schema.EVENTS)


class Pool:
    def __init__(self, size: int, free: int) -> None:
        self.size, self.free = size, free

    def available_size(self) -> int:
        return self.free

    def evictable_size(self) -> int:
        return 30

    def protected_size(self) -> int:
        return 20


def observed(
    monkeypatch: pytest.MonkeyPatch, *, nvtx_on: bool = False, level: str = "requests"
) -> tuple[Observer, list[tuple[object, ...]]]:
    writer = Writer(limit=100, file_bytes=1)
    events: list[tuple[object, ...]] = []
    monkeypatch.setattr(writer, "put", events.append)
    observer = Observer(writer, level=level, nvtx_on=nvtx_on)
    pools = Pools(Pool(8, 5), Pool(100, 40), Pool(0, 0), kv_total=100)
    observer.watch(object(), pools, trees=frozenset(), policy="lpm")
    return observer, events


def fields(event: tuple[object, ...]) -> dict[str, object]:
    return dict(zip(("e", "t_ns", *schema.EVENTS[str(event[0])][1]), event, strict=True))


def run(observer: Observer, forward: int) -> None:
    observer.form_ends(observer.form_begins(), found=True, running=3, waiting=2)
    observer.run_ends(
        observer.run_begins(), forward=forward, mode="prefill", requests=1, new=9, cached=4, chunked=False
    )


def test_a_batch_in_overlap_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result comes after the next launch; each keeps its own times and levels."""
    observer, events = observed(monkeypatch)
    observer.form_ends(observer.form_begins(), found=False, running=0, waiting=0)
    run(observer, 1)
    run(observer, 2)
    assert events == []
    assert observer.done_ends(observer.done_begins(), forward=1) == 1
    assert observer.done_ends(observer.done_begins(), forward=None) == 2
    first, second = map(fields, events)
    assert (first["forward"], first["idle_turns"], second["forward"], second["idle_turns"]) == (1, 1, 2, 0)
    assert (first["slots_used"], first["kv_used"], first["kv_free"], first["kv_protected"]) == (3, 30, 40, 20)
    moments = [second[name] for name in ("formed_at_ns", "run_at_ns", "done_at_ns", "t_ns")]
    assert moments == sorted(moments)
    assert first["formed_at_ns"] < second["formed_at_ns"] < first["done_at_ns"]


@pytest.mark.parametrize(("level", "expected"), [("batches", 1), ("requests", 9)])
def test_pools_are_read_now_and_then_unless_more_is_asked(
    monkeypatch: pytest.MonkeyPatch, level: str, expected: int
) -> None:
    observer, events = observed(monkeypatch, level=level)
    monkeypatch.setattr(
        "labprobe.observer.now", itertools.count(0, 100_000).__next__
    )  # 0.1 ms a look at the clock
    for forward in range(9):
        run(observer, forward)
        observer.done_ends(observer.done_begins(), forward=forward)
    assert sum(fields(event)["kv_free"] == 40 for event in events) == expected
    assert sum(fields(event)["kv_free"] is None for event in events) == 9 - expected


def test_batches_whose_results_never_come_are_written_without_their_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observer, events = observed(monkeypatch)
    for forward in range(20):
        run(observer, forward)
    written = [fields(event) for event in events]
    assert [event["forward"] for event in written] == list(range(12))
    assert {event["done_ns"] for event in written} == {None}


def test_ranges_for_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    names = types.SimpleNamespace(range_push=calls.append, range_pop=lambda: calls.append("end"))
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(nvtx=names))
    monkeypatch.setitem(sys.modules, "torch", torch)
    observer, _ = observed(monkeypatch, nvtx_on=True)
    calls.clear()
    run(observer, 1)
    observer.done_ends(observer.done_begins(), forward=1)
    assert calls == ["lab.form", "end", "lab.run", "end", "lab.result", "end"]


def test_ranges_without_cuda_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = types.SimpleNamespace(range_push=fails, range_pop=fails)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(nvtx=names)))
    assert nvtx.ranges() == nvtx.NOTHING


def test_memory_of_this_process_grows_when_it_allocates() -> None:
    before = fields(("memory", 0, *memory.figures(None)))
    block = bytearray(200_000_000)
    after = fields(("memory", 0, *memory.figures(None)))
    assert before["source"] == after["source"] == "malloc"
    for name in ("rss_bytes", "allocated_bytes", "reserved_bytes"):
        assert after[name] - before[name] > 0.9 * len(block), name


def test_torchs_figures_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 5, "reserved_bytes.all.current": 8, "allocated_bytes.all.peak": 6}
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True, memory_stats=lambda device: {**stats, "num_ooms": device}
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert memory.figures(3)[0] == "cuda"
    assert memory.figures(3)[2:] == (5, 8, 6, None, 3)


# ---------------------------------------------------------------- how it is found


def test_it_needs_nothing_but_python_and_the_server() -> None:
    for path in PROBE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top in ("labprobe", "sglang"), f"{path.name}: {name}"


def test_the_folder_on_the_path_is_enough_for_the_plugin_loader() -> None:
    (found,) = [e for e in entry_points(group="sglang.srt.plugins") if e.name == "labprobe"]
    assert found.load().__module__ == "labprobe.load"


def test_a_start_without_plugins_loads_it_and_the_one_it_hides(tmp_path: Path) -> None:
    """As on SGLang 0.4.6: through `sitecustomize`; a folder that cannot be made is no reason to fail."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.was_run = __name__\n")
    paths = [str(PROBE / "startup"), str(PROBE), str(tmp_path)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "LAB_PROBE_DIR": "/proc/no/such"}
    code = "import sys; print('labprobe.load' in sys.modules, getattr(sys, 'was_run', None))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "sitecustomize"], done.stderr
    del environment["LAB_PROBE_DIR"]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "sitecustomize"], done.stderr


def test_every_event_can_be_written() -> None:
    from labprobe.writer import line

    for kind, (_, names) in schema.EVENTS.items():
        row = json.loads(line((kind, 1, *range(len(names)))))
        assert list(row) == ["e", "t_ns", *names]
