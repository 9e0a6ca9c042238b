"""Requests of both sides put together: by id, by order, by tokens or not at all; groups and predicted share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakerun import Request, export_line
from hypothesis import given
from hypothesis import strategies as st

from lab.read.requestlog import COLUMNS, client_frame, join
from lab.read.serverrecords import ServerRecord, export_records, server_frame
from lab.rundir import LoadFiles


def record(
    name: str,
    received: float,
    prompt: str | list[int],
    *,
    cached: int = 0,
    tokens: int | None = None,
    output: int = 4,
) -> ServerRecord:
    kind = "text" if isinstance(prompt, str) else "input_ids"
    return ServerRecord(
        id=name,
        request_received_ts=received,
        prompt_tokens=len(prompt) if tokens is None else tokens,
        completion_tokens=output,
        cached_tokens=cached,
        queue_time=0.002,
        first_token_latency=0.05,
        e2e_latency=0.09,
        request_parameters=json.dumps({kind: prompt, "sampling_params": {}}),
    )


def client(records: list[ServerRecord], *, rids: bool = False) -> pd.DataFrame:
    """What a client would say of these requests, in this order."""
    frame = pd.DataFrame(
        {
            "prompt_tokens": [float(r.prompt_tokens) for r in records],
            "completion_tokens": [float(r.completion_tokens) for r in records],
            "cached_tokens": [float(r.cached_tokens) for r in records],
            "ttft_ms": [52.0 for _ in records],
            "itl_ms": [10.0 for _ in records],
            "e2e_ms": [92.0 for _ in records],
            "success": [True for _ in records],
            "error": ["" for _ in records],
        }
    )
    if rids:
        frame.insert(0, "rid", [r.id for r in records])
    return frame


THREE = [
    record("a", 10.0, "x" * 100, cached=0),
    record("b", 11.0, "x" * 90 + "y" * 20, cached=90),
    record("c", 12.5, "z" * 70, cached=0),
]


# ---- joining


def test_by_rid_whatever_the_order() -> None:
    for order in ([0, 1, 2], [2, 0, 1]):
        joined = join(client([THREE[i] for i in order], rids=True), server_frame(THREE))
        assert list(joined.columns) == list(COLUMNS)
        assert set(joined["joined"]) == {"rid"}
        assert list(joined["received_s"]) == [[0.0, 1.0, 2.5][i] for i in order]
        assert list(joined["order"]) == [0, 1, 2]


def test_by_order_of_arrival_when_there_are_no_ids() -> None:
    joined = join(client(THREE), server_frame(THREE))
    assert set(joined["joined"]) == {"order"}
    assert list(joined["server_ttft_ms"]) == [50.0] * 3
    assert list(joined["queue_ms"]) == [2.0] * 3
    assert list(joined["cached_share"]) == pytest.approx([0, 90 / 110, 0])


def test_by_tokens_when_requests_overtook_each_other() -> None:
    """The client sent c first, the server saw it last; lengths tell them apart."""
    joined = join(client([THREE[2], THREE[0], THREE[1]]), server_frame(THREE))
    assert set(joined["joined"]) == {"tokens"}
    assert list(joined["received_s"]) == [2.5, 0.0, 1.0]


def test_a_request_the_server_does_not_know_is_kept_and_marked() -> None:
    stranger = record("d", 0, "q" * 33)
    joined = join(client([*THREE, stranger]), server_frame(THREE))
    assert list(joined["joined"]) == ["tokens", "tokens", "tokens", "no"]
    assert np.isnan(joined["server_ttft_ms"].iloc[3])
    assert joined["prompt_tokens"].iloc[3] == 33
    by_rid = join(client([*THREE, stranger], rids=True), server_frame(THREE))
    assert list(by_rid["joined"]) == ["rid", "rid", "rid", "no"]


def test_a_server_without_any_record() -> None:
    joined = join(client(THREE), server_frame([]))
    assert list(joined["joined"]) == ["no"] * 3
    assert list(joined["prompt_tokens"]) == [100, 110, 70]


def test_by_answer_when_the_server_has_the_answers() -> None:
    """In whatever order; the counts are then the server's, the client's are what it meant to send."""
    server = server_frame(THREE).assign(answer=["one", "two", "two"])
    sent = client([THREE[2], THREE[0], THREE[1]]).assign(answer=["two", "one", "two"])
    sent[["prompt_tokens", "cached_tokens"]] = [[64.0, np.nan]] * 3
    joined = join(sent, server)
    assert set(joined["joined"]) == {"answer"}
    assert joined["received_s"][1] == 0.0
    assert sorted(joined["received_s"]) == [0.0, 1.0, 2.5]
    assert joined["prompt_tokens"][1] == 100
    assert joined["cached_share"].sum() == pytest.approx(90 / 110)
    unknown = join(sent.assign(answer=["two", "three", "two"]), server)
    assert list(unknown["joined"]) == ["answer", "no", "answer"]
    assert unknown["prompt_tokens"][1] == 64
    nothing = server_frame([])
    nothing["answer"] = nothing["rid"].map({})
    assert list(join(sent, nothing)["joined"]) == ["no"] * 3


def test_answers_are_read_only_where_they_are_asked_for(tmp_path: Path) -> None:
    files = LoadFiles(tmp_path)
    bench = {"input_lens": [5], "output_lens": [4], "ttfts": [0.1], "itls": [[0.1]], "errors": [""]}
    files.bench.write_text(json.dumps({**bench, "generated_texts": ["yes"]}) + "\n")
    assert "answer" not in client_frame(files, dataset="random-ids")[0]
    frame, said = client_frame(files, dataset="random-ids", answers=True)
    assert (list(frame["answer"]), said) == (["yes"], [])
    files.bench.write_text(json.dumps({**bench, "generated_texts": ["yes", "no"]}) + "\n")
    frame, said = client_frame(files, dataset="random-ids", answers=True)
    assert frame.empty
    assert "lists have different lengths" in said[0]


def test_no_row_is_made_or_lost_by_equal_requests() -> None:
    """Five requests alike in every number, four seen by the server: four matched, one not, none twice."""
    same = [record(str(i), float(i), f"{i}" * 100, tokens=100) for i in range(5)]
    joined = join(client(same), server_frame(same[:4]))
    assert len(joined) == 5
    assert list(joined["joined"]) == ["tokens"] * 4 + ["no"]
    assert joined["received_s"].dropna().is_unique


def test_a_failed_request_stays_in_its_place(tmp_path: Path) -> None:
    """bench_serving writes a failed request as error, no output and TTFT 0."""
    bench = {
        "input_lens": [100, 100],
        "output_lens": [4, 0],
        "ttfts": [0.05, 0.0],
        "itls": [[0.01, 0.03, 0.02], []],
        "errors": ["", "Traceback ...\nConnectionError: refused\n"],
        "cached_tokens": [0, None],
    }
    files = LoadFiles(tmp_path)
    files.bench.write_text(json.dumps(bench) + "\n")
    frame, said = client_frame(files, dataset="random-ids")
    assert said == []
    assert list(frame["success"]) == [True, False]
    assert list(frame["error"]) == ["", "ConnectionError: refused"]
    assert frame["itl_ms"].iloc[0] == pytest.approx(20)
    assert frame["e2e_ms"].iloc[0] == pytest.approx(110)
    assert np.isnan(frame["itl_ms"].iloc[1])
    assert np.isnan(frame["cached_tokens"].iloc[1])


# ---- reading


def test_export_lines_and_what_is_wrong_with_the_others(tmp_path: Path) -> None:
    good = export_line(
        Request(rid="r1", prompt="abc", prompt_tokens=3, cached=1, output=2, received=5.0, ttft=0.1)
    )
    (tmp_path / "sglang-request-metrics-20260101_01.log").write_text(good + good[:200])
    (tmp_path / "sglang-request-metrics-20260101_02.log").write_text('{"id": "r2"}\n\n' + good)
    (tmp_path / "other.log").write_text("not ours\n")
    items = list(export_records(tmp_path))
    assert [r.id for r in items if not isinstance(r, str)] == ["r1", "r1"]
    said = [r for r in items if isinstance(r, str)]
    assert len(said) == 3
    assert said[0].startswith("sglang-request-metrics-20260101_01.log line 2: ")
    assert "_02.log line 1: " in said[1]
    assert "request_received_ts" in said[1] or "prompt_tokens" in said[1]


@pytest.mark.parametrize(("dataset", "name"), [("chat", "chat.jsonl"), ("random-ids", "bench.jsonl")])
def test_a_client_file_that_is_missing_or_cut(tmp_path: Path, dataset: str, name: str) -> None:
    frame, said = client_frame(LoadFiles(tmp_path), dataset=dataset)
    assert frame.empty
    assert said == [f"{name} is missing"]
    (tmp_path / name).write_text('{"input_lens": [1, 2')
    frame, said = client_frame(LoadFiles(tmp_path), dataset=dataset)
    assert frame.empty
    assert len(said) == 1
    assert said[0].startswith(f"{name} line 1: the file ends inside this line")


def test_a_chat_cut_in_its_last_line_keeps_the_others(tmp_path: Path) -> None:
    line = '{"rid": "a", "ttft_s": 0.1, "e2e_s": 0.2, "itls_s": [], "prompt_tokens": 3, "error": ""}\n'
    (tmp_path / "chat.jsonl").write_text(line + line.replace('"a"', '"b"') + line[:30])
    frame, said = client_frame(LoadFiles(tmp_path), dataset="chat")
    assert list(frame["rid"]) == ["a", "b"]
    assert list(frame["success"]) == [True, True]
    assert said[0].startswith("chat.jsonl line 3: the file ends inside this line")


# ---- groups and what a cache that never forgets must find


@pytest.mark.parametrize("ids", [False, True])
def test_groups_and_predicted_share(ids: bool) -> None:
    def prompt(text: str) -> str | list[int]:
        return [ord(c) for c in text] if ids else text

    p, q = "p" * 80, "q" * 80
    texts = (p + "1" * 20, q + "2" * 20, p + "3" * 20, p + "33" + "4" * 38, q + "5" * 80)
    frame = server_frame([record(str(i), float(i), prompt(t)) for i, t in enumerate(texts)])
    assert list(frame["group"]) == [0, 1, 0, 0, 1]
    assert list(frame["group_order"]) == [0, 0, 1, 2, 1]
    assert list(frame["predicted_share"]) == pytest.approx([0, 0, 80 / 100, 80 / 120, 80 / 160])


def test_prompts_that_differ_early_share_nothing() -> None:
    frame = server_frame([record("a", 0, "x" * 10 + "y" * 90), record("b", 1, "x" * 10 + "z" * 90)])
    assert list(frame["group"]) == [0, 1]
    assert list(frame["predicted_share"]) == [0, 0]


def test_a_prompt_that_cannot_be_read_is_a_group_of_its_own() -> None:
    odd = ServerRecord(id="odd", request_received_ts=1.5, prompt_tokens=3, request_parameters="{")
    frame = server_frame([*THREE, odd])
    group = frame.loc[frame["rid"] == "odd", "group"].item()
    assert (frame["group"] == group).sum() == 1


def test_an_empty_prompt_divides_by_nothing() -> None:
    frame = server_frame([record("a", 0, [], tokens=0), record("b", 1, "", tokens=0)])
    assert frame["predicted_share"].notna().all()
    joined = join(client([record("a", 0, [], tokens=0)]), server_frame([record("a", 0, [], tokens=0)]))
    assert joined["cached_share"].isna().all()


prompts = st.lists(
    st.tuples(st.sampled_from(["p" * 70, "q" * 70, "r" * 64]), st.text("abc", max_size=6)),
    min_size=1,
    max_size=12,
)


@given(prompts, st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_server_lines_does_not_matter(
    texts: list[tuple[str, str]], draw: object, rids: bool
) -> None:
    """Lines come in the order requests end; records are the same set whatever order they are read in."""
    records = [record(f"r{i}", float(i), a + b, cached=i) for i, (a, b) in enumerate(texts)]
    shuffled = list(records)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(server_frame(shuffled), server_frame(records))
    here = client(records, rids=rids)
    pd.testing.assert_frame_equal(join(here, server_frame(shuffled)), join(here, server_frame(records)))


@given(prompts)
def test_a_prediction_is_a_share_and_no_more_than_the_prompts_have_in_common(
    texts: list[tuple[str, str]],
) -> None:
    whole = [a + b for a, b in texts]
    frame = server_frame([record(str(i), float(i), t) for i, t in enumerate(whole)])
    assert frame["predicted_share"].between(0, 1).all()
    for group, part in frame.groupby("group"):
        mine = [whole[int(i)] for i in part["rid"]]
        common = min(len(t) for t in mine)
        while len({t[:common] for t in mine}) > 1:
            common -= 1
        later = part[part["group_order"] > 0]
        lengths = [len(whole[int(i)]) for i in later["rid"]]
        assert list(later["predicted_share"]) == pytest.approx([common / n for n in lengths]), group
