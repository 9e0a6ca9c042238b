"""The server log's reader: real and hand-written samples, cut lines, torn lines, and any text at all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import LabError
from lab.read import prom, serverlog
from lab.read.serverlog import LogRecords

LOGS = Path(__file__).parent / "data" / "logs"
REAL = ("0.5.21-retraction", "0.5.21-two-ranks-killed", "0.5.21-dies-at-start")
SAMPLES = (*REAL, "0.4.6.post5", "0.5.10", "0.5.23")

DECODE = (
    "[2026-11-23 09:23:44] Decode batch, #running-req: 12, #token: 1790, token usage: 0.44, cpu graph: False"
    ", gen throughput (token/s): 2126.19, #queue-req: 317\n"
)
PREFILL = (
    "[2026-11-23 09:23:44.396 DP0 TP1] Prefill batch [31], #new-seq: 13, #new-token: 611, #cached-token: 168"
    ", token usage: 0.04, #running-req: 10, #queue-req: 20, #pending-token: 30, cpu graph: True, "
    "input throughput (token/s): 25.95\n"
)
RETRACT = (
    "[2026-11-23 09:23:44] KV cache pool is full. Retract requests. #retracted_reqs: 12, "
    "#new_tokens_gained: 128, #new_token_ratio: 0.0064 -> 0.6992\n"
)
KV_CACHE = (
    "[2026-11-23 09:23:44] KV Cache is allocated. dtype: torch.float32, #tokens: 65536, "
    "K size: 0.02 GB, V size: 0.02 GB\n"
)
LIMITS = (
    "[2026-11-23 09:23:44] max_total_num_tokens=65536, chunked_prefill_size=2048, max_prefill_tokens=16384, "
    "max_running_requests=2048, context_len=16384, available_cpu_mem=21.66 GB\n"
)
CRASH = (
    "[2026-11-23 09:23:44] Subprocess scheduler_0 (pid=7934) crashed with exit code -9. "
    "Triggering SIGQUIT for cleanup...\n"
)
KNOWN = (DECODE, PREFILL, RETRACT, KV_CACHE, LIMITS, CRASH)


def counted(records: LogRecords) -> int:
    return (
        len(records.batches)
        + len(records.retractions)
        + len(records.facts)
        + len(records.unreadable)
        + records.other
    )


def line_numbers(records: LogRecords) -> list[int]:
    kinds = (records.batches, records.retractions, records.facts, records.unreadable)
    return [row.line for kind in kinds for row in kind]


def only_reason(line: str) -> str:
    records = serverlog.parse([line])
    assert counted(records) == 1
    (unreadable,) = records.unreadable
    assert unreadable.line == 1
    return unreadable.reason


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_line_of_a_sample_is_counted_once_and_all_are_read(sample: str) -> None:
    path = LOGS / f"{sample}.log"
    records = serverlog.read(path)
    assert records.lines == path.read_bytes().count(b"\n") == counted(records)
    assert len(set(line_numbers(records))) == len(line_numbers(records))
    assert records.unreadable == ()


def test_batches_of_0_5_21() -> None:
    decode, prefill = serverlog.parse([DECODE, PREFILL]).batches
    assert decode._asdict() == {
        "line": 1,
        "time": "2026-11-23 09:23:44",
        "rank": "",
        "iteration": None,
        "kind": "decode",
        "new_seqs": None,
        "new_tokens": None,
        "cached_tokens": None,
        "pending_tokens": None,
        "running_reqs": 12,
        "queued_reqs": 317,
        "used_tokens": 1790,
        "token_usage_share": 0.44,
        "graph": False,
        "graph_label": "cpu graph",
        "input_throughput_tok_s": None,
        "gen_throughput_tok_s": 2126.19,
        "accept_len_tokens": None,
        "extra": "",
    }
    assert prefill._asdict() == {
        "line": 2,
        "time": "2026-11-23 09:23:44.396",
        "rank": "DP0 TP1",
        "iteration": 31,
        "kind": "prefill",
        "new_seqs": 13,
        "new_tokens": 611,
        "cached_tokens": 168,
        "pending_tokens": 30,
        "running_reqs": 10,
        "queued_reqs": 20,
        "used_tokens": None,
        "token_usage_share": 0.04,
        "graph": True,
        "graph_label": "cpu graph",
        "input_throughput_tok_s": 25.95,
        "gen_throughput_tok_s": None,
        "accept_len_tokens": None,
        "extra": "",
    }


def test_0_4_6_post5() -> None:
    records = serverlog.read(LOGS / "0.4.6.post5.log")
    prefill, decode, speculative = records.batches
    assert (prefill.kind, prefill.new_seqs, prefill.new_tokens, prefill.cached_tokens) == (
        "prefill",
        2,
        300,
        200,
    )
    assert (prefill.rank, prefill.running_reqs, prefill.queued_reqs) == ("TP0", 0, 5)
    # This version prints neither: they are missing, not zero.
    assert (prefill.pending_tokens, prefill.graph, prefill.graph_label) == (None, None, "")
    assert prefill.input_throughput_tok_s is None
    assert (decode.used_tokens, decode.graph, decode.gen_throughput_tok_s) == (4096, True, 812.5)
    assert (decode.accept_len_tokens, speculative.accept_len_tokens) == (None, 2.75)
    (retraction,) = records.retractions
    assert retraction[3:] == ("pool_full", 3, None, 0.1474, 0.1845, "")
    assert [fact.name for fact in records.facts] == ["server_args", "kv_cache", "limits", "ready"]
    kv_cache = records.first("kv_cache")
    assert kv_cache is not None
    assert kv_cache.values == {
        "dtype": None,
        "tokens": 451200,
        "k_gib": 27.54,
        "v_gib": 27.54,
        "kv_gib": 55.08,
    }


def test_0_5_10() -> None:
    records = serverlog.read(LOGS / "0.5.10.log")
    prefill, decode, hybrid = records.batches
    assert (prefill.input_throughput_tok_s, prefill.graph, prefill.pending_tokens) == (1234.56, False, None)
    assert (decode.accept_len_tokens, decode.extra) == (2.1, "accept rate: 0.53")
    assert (hybrid.iteration, hybrid.time) == (12, "2026-03-01 10:00:03.250")
    assert (hybrid.token_usage_share, hybrid.extra) == (None, "full token usage: 0.20, swa token usage: 0.05")
    assert records.retractions[0][2:] == ("DP1 TP0", "pool_full", 2, 256, 0.3, 0.9, "")
    kv_cache = records.first("kv_cache")
    assert kv_cache is not None
    assert (kv_cache.values["kv_gib"], kv_cache.values["k_gib"]) == (5.5, None)


def test_0_5_23() -> None:
    records = serverlog.read(LOGS / "0.5.23.log")
    prefill, decode = records.batches
    assert (prefill.pending_tokens, prefill.graph_label) == (1500, "cuda graph")
    assert prefill.extra == "#replay-token: 7, fwd occupancy: 91.20%, fwd+idle occupancy: 99.00%"
    assert decode.gen_throughput_tok_s == 2222.22
    assert records.retractions[0][3:] == ("testing", 1, 16, None, None, "")
    assert [(fact.name, dict(fact.values)) for fact in records.facts] == [
        (
            "kv_cache",
            {"dtype": "torch.bfloat16", "tokens": 120000, "k_gib": None, "v_gib": None, "kv_gib": 7.25},
        ),
        ("tree_cache", {"implementation": "UnifiedRadixCache"}),
    ]


def test_real_log_agrees_with_the_servers_own_counters() -> None:
    records = serverlog.read(LOGS / "0.5.21-retraction.log")
    after = prom.read(LOGS / "0.5.21-retraction-after.prom")
    prefills = [batch for batch in records.batches if batch.kind == "prefill"]
    new = sum(batch.new_tokens or 0 for batch in prefills)
    cached = sum(batch.cached_tokens or 0 for batch in prefills)
    realtime = "sglang:realtime_tokens_total"
    assert new == prom.value(after, realtime, where={"mode": "prefill_compute"}) == 694
    assert cached == prom.value(after, realtime, where={"mode": "prefill_cache"}) == 400
    # The one retracted request was prefilled again, 116 new and 64 cached. The requests' own counters leave
    # that out: 64 prompt tokens and the 116 it had already produced.
    again = prefills[-1]
    assert (again.new_tokens, again.cached_tokens) == (116, 64)
    assert cached - 64 == prom.value(after, "sglang:cached_tokens_total") == 336
    assert new + cached - 64 - 116 == prom.value(after, "sglang:prompt_tokens_total") == 914
    (retraction,) = records.retractions
    assert retraction.retracted_reqs == prom.value(after, "sglang:num_retracted_requests_total") == 1
    assert retraction.gained_tokens == prom.value(after, "sglang:num_retracted_output_tokens_total") == 116
    assert (retraction.ratio_before, retraction.ratio_after) == (0.0058, 1.0)


def test_real_log_of_two_ranks_agrees_with_the_counters_and_prints_retractions_twice() -> None:
    records = serverlog.read(LOGS / "0.5.21-two-ranks-killed.log")
    after = prom.read(LOGS / "0.5.21-two-ranks-after.prom")
    prefills = [batch for batch in records.batches if batch.kind == "prefill"]
    realtime = "sglang:realtime_tokens_total"
    assert {batch.rank for batch in records.batches} == {"TP0"}
    assert all(batch.iteration is not None for batch in records.batches)
    compute = prom.value(after, realtime, where={"mode": "prefill_compute"})
    cache = prom.value(after, realtime, where={"mode": "prefill_cache"})
    assert sum(batch.new_tokens or 0 for batch in prefills) == compute == 674
    assert sum(batch.cached_tokens or 0 for batch in prefills) == cache == 930
    per_rank = Counter[str]()
    for retraction in records.retractions:
        per_rank[retraction.rank] += retraction.retracted_reqs
    counter = "sglang:num_retracted_requests_total"
    assert per_rank == {"TP0": 6, "TP1": 6}
    assert prom.value(after, counter, where={"tp_rank": "0"}) == 6
    assert prom.value(after, counter) == 12


def test_facts_of_a_real_log_and_a_normal_stop_is_no_crash() -> None:
    records = serverlog.read(LOGS / "0.5.21-retraction.log")
    names = [fact.name for fact in records.facts]
    assert names[:6] == ["server_args", "kv_cache", "limits", "radix_cache", "tree_cache", "ready"]
    assert names[6:] == ["stopping", "stopping", "crash"]
    limits, core = records.first("limits"), records.first("radix_cache")
    assert limits is not None
    assert core is not None
    assert limits.values == {
        "max_total_num_tokens": 1024,
        "chunked_prefill_size": 2048,
        "max_prefill_tokens": 16384,
        "max_running_requests": 512,
        "context_len": 16384,
        "available_cpu_mem_gib": 21.8,
    }
    assert core.values == {"core": "RustUnifiedTreeCore"}
    assert records.facts[-1].values == {"process": "scheduler_0", "pid": 7934, "exit_code": -9}
    assert records.crashes() == ()


@pytest.mark.parametrize("sample", ["0.5.21-two-ranks-killed", "0.5.21-dies-at-start"])
def test_a_real_crash_is_one(sample: str) -> None:
    records = serverlog.read(LOGS / f"{sample}.log")
    crash = records.crashes()[0]
    assert crash.rank == "TP1"
    assert crash.values == {"text": "Scheduler hit an exception: Traceback (most recent call last):"}
    assert (records.first("ready") is None) == (sample == "0.5.21-dies-at-start")


def test_subprocess_crash_before_the_stop_counts() -> None:
    assert [fact.values["exit_code"] for fact in serverlog.parse([CRASH]).crashes()] == [-9]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (DECODE.replace("12,", "1x2,"), "'#running-req' holds '1x2', not a whole number"),
        (DECODE.replace("317", ""), "'#queue-req' holds '', not a whole number"),
        (DECODE.replace("0.44", "0.4"), "not a number with two decimals"),
        (DECODE.replace("False", "Fal"), "'cpu graph' holds 'Fal', not True or False once"),
        (DECODE.replace("#queue-req: 317", "#queue-req: 3, #queue-req: 4"), "'#queue-req' stands twice"),
        (DECODE.replace(", #queue-req: 317", ""), "no '#queue-req'"),
        (DECODE.replace("#token: 1790", "garbage"), "no 'key: value' in 'garbage'"),
        (DECODE.replace("batch,", "batch;"), "spelled in an unknown way"),
        (DECODE.replace("317", "9" * 5000), "not a whole number"),
        (DECODE[:-1] + PREFILL, "'#queue-req' holds"),
        (PREFILL.replace("#new-seq: 13, ", ""), "no '#new-seq'"),
        (RETRACT.replace("0.6992", "0.69"), "not two numbers with four decimals once"),
        (RETRACT.replace(", #new_token_ratio: 0.0064 -> 0.6992", ""), "no '#new_token_ratio'"),
        ("[2026-11-23 09:23:44] Testing retraction. #new_tokens_gained: 1\n", "no '#retracted_reqs'"),
        (KV_CACHE.replace("#tokens: 65536", "#tokens:"), "the size of the KV cache is cut"),
        (LIMITS.replace("2048,", "20q8,", 1), "no 'name=number' in 'chunked_prefill_size=20q8'"),
        (CRASH.replace("-9", ""), "the end of a process, cut"),
        ("[2026-11-23 09:23:44] server_args={'model_path': 'na\n", "the server's arguments are cut"),
        ("[2026-11-23 09:23:44] Prefill ba\n", "the message is cut"),
        ("10%|#    | 1/10 " + DECODE, "other text stands before the record's timestamp"),
        ("[2026-11-23 09:23:44 TP1] Load wei" + PREFILL, "other text stands before the record's timestamp"),
        ("ode batch, #running-req: 12, #token: 1790\n", "fields of a record without its beginning"),
    ],
)
def test_a_garbled_line_is_reported_with_its_reason(line: str, reason: str) -> None:
    assert reason in only_reason(line)


def test_a_request_that_quotes_a_log_line_is_not_a_record() -> None:
    quoted = DECODE.strip()
    records = serverlog.parse([f"[2026-11-23 09:23:44] Receive: obj=GenerateReqInput(text='{quoted}')\n"])
    assert (records.other, counted(records)) == (1, 1)


def test_a_newer_field_is_kept_as_text_and_a_trailing_comma_is_no_field() -> None:
    line = DECODE.replace(", #queue-req: 317", ", #new-thing: 4.5e3, #queue-req: 317,")
    (batch,) = serverlog.parse([line]).batches
    assert (batch.extra, batch.queued_reqs) == ("#new-thing: 4.5e3", 317)


def test_the_servers_arguments_are_never_repeated() -> None:
    line = "[2026-11-23 09:23:44] server_args={'api_key': 'hush'"
    assert serverlog.parse([line]).unreadable[0].text == "[2026-11-23 09:23:44] server_args=..."
    whole = serverlog.parse([line + "}\n"]).facts[0]
    assert "hush" not in repr(whole)


@pytest.mark.parametrize("line", KNOWN, ids=["decode", "prefill", "retract", "kv", "limits", "crash"])
def test_a_line_cut_at_any_byte_is_unreadable_never_wrong(line: str) -> None:
    assert serverlog.parse([line]).unreadable == ()
    before = PREFILL
    for end in range(1, len(line)):
        records = serverlog.parse([before, line[:end]])
        assert counted(records) == records.lines == 2
        assert [u.line for u in records.unreadable] == [2], line[:end]
        assert len(records.batches) == 1


@pytest.mark.parametrize("line", [PREFILL, DECODE, RETRACT], ids=["prefill", "decode", "retract"])
@given(data=st.data())
def test_a_line_torn_by_another_is_unreadable(line: str, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(line) - 1))
    other = data.draw(st.sampled_from(KNOWN))
    records = serverlog.parse([line[:end] + other])
    assert counted(records) == 1
    assert len(records.unreadable) == 1


@given(st.lists(st.one_of(st.text(), st.sampled_from(KNOWN)), max_size=20))
def test_any_line_is_in_exactly_one_kind(texts: list[str]) -> None:
    lines = [text.replace("\n", "") + "\n" for text in texts]
    records = serverlog.parse(lines)
    assert counted(records) == records.lines == len(lines)
    numbers = line_numbers(records)
    assert len(set(numbers)) == len(numbers)
    known = sum(text in KNOWN for text in texts)
    assert len(records.batches) + len(records.retractions) + len(records.facts) >= known


@given(st.sampled_from(KNOWN), st.data())
def test_one_changed_character_never_raises(line: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(line) - 2))
    changed = line[:position] + data.draw(st.characters(exclude_characters="\n")) + line[position + 1 :]
    assert counted(serverlog.parse([changed])) == 1


def test_lines_must_keep_their_ends() -> None:
    with pytest.raises(ValueError, match="line 1 has no line end"):
        serverlog.parse([DECODE.strip(), PREFILL])


def test_read_takes_undecodable_bytes_and_names_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(b"\xff\xfe broken\n" + DECODE.encode() + b"a bar\ra bar\n" + DECODE[:80].encode())
    records = serverlog.read(path)
    assert (records.lines, records.other, len(records.batches)) == (4, 2, 1)
    assert records.unreadable[0].line == 4
    with pytest.raises(LabError, match="cannot read"):
        serverlog.read(tmp_path / "none.log")


def test_empty_log() -> None:
    records = serverlog.parse([])
    assert (records.lines, counted(records)) == (0, 0)


def test_batches_become_a_frame() -> None:
    records = serverlog.read(LOGS / "0.5.21-retraction.log")
    frame = pd.DataFrame(records.batches, columns=list(serverlog.BATCH_COLUMNS))
    assert len(frame) == 60
    prefills = frame[frame["kind"] == "prefill"]
    assert prefills["new_tokens"].sum() == 694
    assert prefills["gen_throughput_tok_s"].isna().all()
    assert pd.to_datetime(frame["time"]).is_monotonic_increasing
