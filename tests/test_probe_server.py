"""The probe in a real server: what its events add up to is what the server itself counted and logged, to the token."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from parts import need
from probeserver import Served, probe_env, serving

from lab import places
from lab.errors import LabError
from lab.probe.labprobe.schema import EVENTS
from lab.read import prom, serverlog
from lab.read.events import ProbeFile, Totals, frame, read_events, totals
from lab.stack import Stack, load_stack
from lab.stacks.build import ensure

# Releases without a counter or a log field for something are held to what they have.
STACKS = [name for name in ("cpu", "cpu046") if (places.ROOT / "containers" / name).is_dir()]
# A pool for about six of the requests, and an order not to keep room for their answers: some are put back.
ARGS = ("--max-total-tokens", "1024", "--schedule-conservativeness", "0.01", "--chunked-prefill-size", "256")
OBSERVE = ("--enable-metrics", "--enable-cache-report", "--decode-log-interval", "1", "--random-seed", "1")
CROWD, PREFIX, TAIL, ANSWER = 14, 40, 44, 120


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the server and the probe said of the same requests."""

    metrics: prom.Snapshot
    log: serverlog.LogRecords
    file: ProbeFile
    sums: Totals
    sent: int
    new: bool
    """SGLang 0.5: it counts evictions, retractions and the tokens of batches, and aligns its chunks otherwise."""


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(6, 8000) for _ in range(count)]


def generate(served: Served, prompt: list[int], *, output: int, rid: str) -> dict[str, object]:
    sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    body = {"rid": rid, "input_ids": prompt, "sampling_params": sampling}
    answer = served.http.post("/generate", json=body).raise_for_status().json()
    meta = answer["meta_info"]
    assert isinstance(meta, dict)
    return meta


def crowd(served: Served, prefixes: list[list[int]], *, name: str, draw: random.Random) -> None:
    """Requests that arrive together and that the pool cannot hold to their end."""
    sampling = {"temperature": 0, "max_new_tokens": ANSWER, "ignore_eos": True}
    body = {
        "rid": [f"{name}-{n:02d}" for n in range(CROWD)],
        "input_ids": [prefixes[n % 3] + ids(draw, TAIL) for n in range(CROWD)],
        "sampling_params": [sampling] * CROWD,
    }
    served.http.post("/generate", json=body).raise_for_status()


def drive(served: Served) -> int:
    """Hits, a prompt in chunks, crowds that the pool cannot hold, a request that is called off. How many that were."""
    draw = random.Random(5)
    prefixes = [ids(draw, PREFIX) for _ in range(3)]
    for number in range(4):
        generate(served, prefixes[number % 2] + ids(draw, TAIL), output=8, rid=f"alone-{number}")
    generate(served, ids(draw, 600), output=4, rid="long")
    crowds = 0
    while crowds < 6 and (crowds == 0 or "#retracted_reqs" not in served.log.read_text()):
        crowd(served, prefixes, name=f"crowd{crowds}", draw=draw)
        crowds += 1
    runner = threading.Thread(
        target=generate, args=(served, ids(draw, 20)), kwargs={"output": 900, "rid": "called-off"}
    )
    runner.start()
    time.sleep(0.3)
    served.http.post("/abort_request", json={"rid": "called-off"}).raise_for_status()
    runner.join()
    return 4 + 1 + crowds * CROWD + 1


def built(name: str) -> tuple[Stack, Path]:
    """The stack and its folder, built on first use; the test is skipped, or fails, where it cannot be."""
    try:
        stack = load_stack(name, root=places.ROOT)
        return stack, ensure(stack, cache=places.cache(), say=print)
    except LabError as error:
        need(False, f"the {name} stack: {error}")
        raise


@pytest.fixture(scope="module", params=STACKS)
def seen(request: pytest.FixtureRequest, nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """One run at the finest level, in which a hook's body raises once."""
    stack, stack_dir = built(request.param)
    folder = tmp_path_factory.mktemp("probed")
    new = not stack.sglang.startswith("0.4")
    env = {**probe_env(folder / "events", level="cache", plugins=new), "LAB_PROBE_FAULT": "arrive:2"}
    with serving(stack, stack_dir, nano, folder=folder, args=(*ARGS, *OBSERVE), env=env) as served:
        sent = drive(served)
        time.sleep(1.5)  # the scheduler writes its gauges, the probe its events and counters
        metrics = prom.parse(served.http.get("/metrics").text)
        served.http.post("/flush_cache", params={"timeout": 10}).raise_for_status()
        time.sleep(1.5)
        text = served.log.read_text()
    files, empty = read_events(folder / "events")
    assert (len(files), empty) == (1, ())
    log = serverlog.parse(text.splitlines(keepends=True))
    return Seen(metrics=metrics, log=log, file=files[0], sums=totals(files[0]), sent=sent, new=new)


def counter(seen: Seen, name: str, **labels: str) -> float:
    """The sum over all series of that name whose labels are these; a counter never used is absent."""
    wanted = set(labels.items())
    found = [
        n for (key, has), n in seen.metrics.counters.items() if key == f"sglang:{name}" and wanted <= set(has)
    ]
    return sum(found)


def test_requests_and_their_tokens(seen: Seen) -> None:
    sums = seen.sums
    assert sums.requests == counter(seen, "num_requests_total")
    assert sums.prompt_tokens == counter(seen, "prompt_tokens_total")
    assert sums.output_tokens == counter(seen, "generation_tokens_total")
    assert sums.cached_tokens == counter(seen, "cached_tokens_total")
    # the server warms itself up with one request
    assert sums.requests == seen.sent + 1
    assert sums.cached_tokens is not None
    assert sums.cached_tokens >= 2 * PREFIX + (CROWD - 3) * PREFIX


def test_prefill_batches_are_those_of_the_log(seen: Seen) -> None:
    events = frame((seen.file,), "batch").query("mode != 'decode'")
    lines = [batch for batch in seen.log.batches if batch.kind == "prefill"]
    assert [(b.new_tokens, b.cached_tokens, b.new_seqs) for b in lines] == list(
        events[["new_tokens", "cached_tokens", "requests"]].itertuples(index=False, name=None)
    )
    assert [batch.running_reqs for batch in lines] == events["running"].tolist()
    assert seen.sums.computed_tokens == sum(batch.new_tokens or 0 for batch in lines)
    if seen.new:
        assert seen.sums.computed_tokens == counter(seen, "realtime_tokens_total", mode="prefill_compute")
        assert seen.sums.found_tokens == counter(seen, "realtime_tokens_total", mode="prefill_cache")
    assert events["chunked"].sum() >= 2


def test_decode_batches(seen: Seen) -> None:
    if seen.new:
        assert seen.sums.decoded_tokens == counter(seen, "realtime_tokens_total", mode="decode")
    events = frame((seen.file,), "batch").query("mode == 'decode'")
    lines = [batch for batch in seen.log.batches if batch.kind == "decode"]
    assert len(events) == len(lines)


def test_evicted_tokens(seen: Seen) -> None:
    assert seen.sums.evicted_tokens > 0
    if seen.new:
        assert seen.sums.evicted_tokens == counter(seen, "evicted_tokens_total")
    assert frame((seen.file,), "evict_node")["tokens"].sum() == seen.sums.evicted_tokens


def test_retractions(seen: Seen) -> None:
    sums = seen.sums
    assert sums.retracted_requests > 0
    events = frame((seen.file,), "retraction")
    assert [line.retracted_reqs for line in seen.log.retractions] == events["requests"].tolist()
    if seen.new:
        assert [line.gained_tokens for line in seen.log.retractions] == events["freed_tokens"].tolist()
        assert sums.retracted_requests == counter(seen, "num_retracted_requests_total")
        assert sums.retracted_prompt_tokens == counter(seen, "num_retracted_input_tokens_total")
        assert sums.retracted_output_tokens == counter(seen, "num_retracted_output_tokens_total")
    back = frame((seen.file,), "retracted")
    assert len(back) == sums.retracted_requests
    finished = frame((seen.file,), "finished").set_index("rid")
    assert dict(Counter(back["rid"])) == finished["retractions"][lambda times: times > 0].to_dict()


def test_the_life_of_each_request(seen: Seen) -> None:
    """Arrived, queued, scheduled, first token, finished, in this order; a prompt in chunks is scheduled in parts."""
    wanted = {f"crowd0-{n:02d}" for n in range(CROWD)} | {"long"}
    kinds = ("arrived", "queued", "scheduled", "first_token", "finished")
    first = {kind: frame((seen.file,), kind).groupby("rid")["t_ns"].min() for kind in kinds}
    for rid in wanted:
        moments = [first[kind][rid] for kind in kinds]
        assert moments == sorted(moments), rid
    finished = frame((seen.file,), "finished").set_index("rid")
    assert finished.loc["crowd0-00", ["prompt_tokens", "output_tokens"]].tolist() == [PREFIX + TAIL, ANSWER]
    parts = frame((seen.file,), "scheduled").query("rid == 'long'")
    assert parts["new_tokens"].sum() == 600
    assert parts["cached_tokens"].sum() == 0
    assert parts["more"].tolist() == [True] * (len(parts) - 1) + [False]


def test_what_was_called_off(seen: Seen) -> None:
    (row,) = frame((seen.file,), "aborted").itertuples()
    assert (row.rid, row.where, row.prompt_tokens) == ("called-off", "running", 20)
    assert 0 < row.output_tokens < 900


def test_the_tree_grows_and_shrinks_by_what_the_events_say(seen: Seen) -> None:
    grown = frame((seen.file,), "insert")["new_tokens"].sum() - seen.sums.evicted_tokens
    last = frame((seen.file,), "insert").iloc[-1]
    after = frame((seen.file,), "evict").query("t_ns > @last.t_ns")["tokens"].sum()
    assert grown + after == last.kv_evictable + last.kv_protected > 0


def test_a_requests_match_is_what_was_scheduled(seen: Seen) -> None:
    """For those that were scheduled once and whole."""
    matches = frame((seen.file,), "match").query("why == 'schedule'").groupby("rid")["hit_tokens"].last()
    parts = frame((seen.file,), "scheduled").groupby("rid").filter(lambda group: len(group) == 1)
    cached = parts.set_index("rid")["cached_tokens"]
    assert len(cached) > CROWD / 2
    assert matches[cached.index].to_dict() == cached.to_dict()


def test_both_pools_add_up_at_every_batch(seen: Seen) -> None:
    batches = frame((seen.file,), "batch")
    assert set(batches["slots_used"] + batches["slots_free"]) == {seen.file.header["slots_total"]}
    assert set(batches["kv_used"] + batches["kv_free"] + batches["kv_evictable"]) == {1024}
    assert seen.file.header["kv_total"] == 1024
    assert (batches["kv_protected"] <= batches["kv_used"]).all()
    decodes = batches.query("mode == 'decode'")
    assert (decodes["slots_used"] >= decodes["requests"]).all()


def test_times_of_a_batch_are_in_order(seen: Seen) -> None:
    batches = frame((seen.file,), "batch")
    assert (batches["formed_at_ns"] + batches["form_ns"] <= batches["run_at_ns"]).all()
    assert (batches["run_at_ns"] + batches["run_ns"] <= batches["done_at_ns"]).all()
    assert (batches["done_at_ns"] + batches["done_ns"] <= batches["t_ns"]).all()
    assert batches["forward"].tolist() == list(range(1, len(batches) + 1))


def test_a_body_that_raised_did_not_harm_the_server(seen: Seen) -> None:
    assert seen.file.errors == 1
    (error,) = seen.file.events["error"]
    assert error["hook"] == "arrive"
    assert "this fault was asked for" in str(error["detail"])
    assert not seen.log.crashes()


def test_everything_was_hooked_and_nothing_lost(seen: Seen) -> None:
    file = seen.file
    assert (file.not_hooked, file.dropped, file.problems, file.backwards) == ((), 0, (), 0)
    assert [row["done"] for row in file.events["flush"]] == [True]
    assert {kind for kind, rows in file.events.items() if rows} == set(EVENTS) - {"hook"}
