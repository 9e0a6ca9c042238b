"""The server's log as its record of requests: the lines of a real 0.4.6.post5, and lines that are cut, foreign or odd."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.read.requestecho import Echo, Tokens, read_echo

START = 1_795_451_000.0  # 2026-11-23 16:23:20 UTC
# As SGLang 0.4.6.post5 wrote them, through lab/data/logging.json.
REQUEST = (
    "GenerateReqInput(text={text!r}, input_ids={ids}, input_embeds=None, image_data=None, audio_data=None, "
    "sampling_params={{'temperature': 0.0, 'max_new_tokens': 4, 'ignore_eos': True}}, rid={rid!r}, return_logprob=False, "
    "logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None, return_text_in_logprobs=True, stream=True, "
    "log_metrics=True, modalities=[], lora_path=None, session_params=None, custom_logit_processor=None, "
    "return_hidden_states=False, bootstrap_host=None, bootstrap_room=None)"
)
FINISH = (
    ", out={{'text': {answer!r}, 'meta_info': {{'id': {rid!r}, 'finish_reason': {{'type': 'length', 'length': 4}}, "
    "'prompt_tokens': {prompt}, 'completion_tokens': 4, 'cached_tokens': {cached}, 'e2e_latency': {e2e}}}}}"
)


def receive(rid: str, text: str | None, *, at: float, ids: list[int] | None = None) -> str:
    said = REQUEST.format(text=text, ids=ids, rid=rid)
    return f"[2026-11-23 16:23:{20 + at:06.3f} PID7] Receive: obj={said}\n"


def finish(
    rid: str, text: str | None, answer: str, *, cached: int = 0, prompt: int = 9, ids: list[int] | None = None
) -> str:
    said = REQUEST.format(text=text, ids=ids, rid=rid)
    rest = FINISH.format(answer=answer, rid=rid, prompt=prompt, cached=cached, e2e=0.0625)
    return f"[2026-11-23 16:23:50.000 PID7] Finish: obj={said}{rest}\n"


def read(tmp_path: Path, *lines: str, extra: int = 0) -> Echo:
    log = tmp_path / "server.log"
    log.write_text("".join(lines), encoding="utf-8")
    return read_echo(log, {"load": (START, START + 10)}, extra={"load": extra})


def test_a_request_as_the_export_would_have_it(tmp_path: Path) -> None:
    found = read(tmp_path, receive("a", "one two", at=1.25), finish("a", "one two", "yes", cached=3))
    assert found.unread == []
    (row,) = found.frames["load"].to_dict("records")
    assert (row["rid"], row["answer"]) == ("a", "yes")
    assert row["received"] == START + 1.25
    assert (row["server_prompt"], row["server_completion"], row["server_cached"]) == (9, 4, 3)
    assert row["server_e2e_ms"] == 62.5
    for silent in ("server_ttft_ms", "queue_ms", "retractions"):
        assert row[silent] != row[silent], silent  # not a number


def test_order_and_groups_go_by_arrival_not_by_the_end(tmp_path: Path) -> None:
    shared = "the same beginning " * 5
    lines = [receive("a", f"{shared}A", at=1), receive("b", "other", at=2), receive("c", f"{shared}C", at=3)]
    ends = [finish("c", f"{shared}C", "3"), finish("b", "other", "2"), finish("a", f"{shared}A", "1")]
    frame = read(tmp_path, *lines, *ends).frames["load"]
    assert list(frame["rid"]) == ["a", "b", "c"]
    assert list(frame["group"]) == [0, 1, 0]
    assert list(frame["group_order"]) == [0, 0, 1]
    assert frame["predicted_share"][2] == pytest.approx(len(shared) / (len(shared) + 1))


def test_token_ids_instead_of_a_text(tmp_path: Path) -> None:
    a, b = [1, 2, 3] * 30, [*([1, 2, 3] * 30)[:80], 9, 9]
    lines = [receive("a", None, ids=a, at=1), receive("b", None, ids=b, at=2)]
    frame = read(tmp_path, *lines, finish("a", None, "x", ids=a), finish("b", None, "y", ids=b)).frames[
        "load"
    ]
    assert list(frame["group"]) == [0, 0]
    assert frame["predicted_share"][1] == pytest.approx(80 / 82)


def test_the_first_requests_of_a_load_can_be_set_apart(tmp_path: Path) -> None:
    """They are in the counters, and no part of the load: not even the beginning of a group."""
    lines = [receive("w", "prompt", at=1), finish("w", "prompt", "x", cached=2)]
    lines += [receive("a", "prompt", at=2), finish("a", "prompt", "x"), receive("b", "prompt", at=3)]
    found = read(tmp_path, *lines, finish("b", "prompt", "x", cached=8), extra=1)
    assert list(found.frames["load"]["rid"]) == ["a", "b"]
    assert list(found.frames["load"]["group_order"]) == [0, 1]
    assert found.apart == {"load": Tokens(prompt=9, cached=2, generated=4)}


@pytest.mark.parametrize("at", [-0.001, 10.001])
def test_what_came_outside_of_a_load_is_of_none(tmp_path: Path, at: float) -> None:
    """The server's own warm-up."""
    found = read(tmp_path, receive("a", "x", at=at), finish("a", "x", "y"), extra=1)
    assert found.frames["load"].empty
    assert (found.apart, found.unread) == ({}, [])


def test_a_health_check_and_other_lines_are_no_requests(tmp_path: Path) -> None:
    rid = "HEALTH_CHECK_1795451001.5"
    others = (
        '[2026-11-23 16:23:21] INFO:     127.0.0.1:1 - "POST /generate HTTP/1.1" 200 OK\n\nReceive: obj=\n'
    )
    found = read(tmp_path, receive(rid, None, ids=[0], at=1), finish(rid, None, "y", ids=[0]), others)
    assert found.frames["load"].empty
    assert found.unread == []


def test_a_request_that_never_ended_is_not_there(tmp_path: Path) -> None:
    found = read(tmp_path, receive("a", "x", at=1))
    assert found.frames["load"].empty
    assert found.unread == []


def test_a_log_cut_inside_a_line_names_it(tmp_path: Path) -> None:
    whole = finish("a", "x", "y")
    for length in (len(whole) - 30, whole.index("'meta_info'"), whole.index("rid=")):
        found = read(tmp_path, receive("a", "x", at=1), whole[:length])
        assert found.frames["load"].empty
        assert found.unread == ["server.log line 2: a finished request without its counts"]
    cut = receive("a", "x" * 50, at=1)[:-400]
    assert "without a prompt or an id" in read(tmp_path, cut[: cut.index("x" * 50) + 9]).unread[0]


def test_an_end_without_its_beginning_and_several_prompts_at_once_are_named(tmp_path: Path) -> None:
    several = receive("a", "x", at=1).replace("text='x'", "text=['x', 'y']")
    found = read(tmp_path, finish("z", "x", "y"), several)
    assert found.unread == [
        "server.log line 1: request z is finished and was never received",
        "server.log line 2: a request without a prompt or an id, or one of several prompts",
    ]


NASTY = "', input_ids=None, 'meta_info': {'id': 'a', 'prompt_tokens': 1, out={'text': 'no', rid='b', \\ \" \n\r\u2028 \x00 é"


TEXTS = st.text() | st.sampled_from([NASTY, NASTY.replace('"', ""), NASTY.replace("'", '"')])


@given(prompt=TEXTS, answer=TEXTS)
@settings(deadline=None)
def test_any_text_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, answer: str
) -> None:
    """A prompt may quote a log line, and an answer too."""
    folder = tmp_path_factory.mktemp("log")
    found = read(folder, receive("a", prompt, at=1), finish("a", prompt, answer, cached=5))
    assert found.unread == []
    (row,) = found.frames["load"].to_dict("records")
    assert (row["rid"], row["answer"], row["server_cached"], row["server_prompt"]) == ("a", answer, 5, 9)
