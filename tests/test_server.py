"""What is said to a server over HTTP, to one that answers as 0.4.6.post5 and 0.5.21 do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from lab.dialect import DIALECTS, Dialect, get_dialect
from lab.server import Server, ServerError

OLD, NEW = get_dialect("0.4.6.post5"), get_dialect("0.5.21")


class Pages:
    """Answers by path; a list is given out one by one, its last entry again and again. Notes what was asked."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                pages = outer.answers.get(self.path)
                body = b"" if not pages else (pages.pop(0) if len(pages) > 1 else pages[0]).encode()
                self.send_response(200 if pages else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_port


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages({})
    thread = Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def page(requests: int) -> str:
    line = f'sglang:num_requests_total{{model_name="m"}} {requests}.0\n' if requests else ""
    return f"# TYPE sglang:num_requests_total counter\n{line}# TYPE sglang:token_usage gauge\nsglang:token_usage 0.0\n"


def test_the_warm_up_of_an_older_release_is_waited_for(pages: Pages) -> None:
    """Its metrics are empty first, then without the counter, then with it."""
    pages.answers["/metrics"] = ["\n", page(0), page(1)]
    Server(pages.port, dialect=OLD).wait_warm(deadline_s=30)
    assert pages.asked == ["GET /metrics"] * 3


def test_a_warm_up_that_never_ends_is_a_fault(pages: Pages) -> None:
    pages.answers["/metrics"] = [page(0)]
    with pytest.raises(ServerError, match="warm-up request was not done after 0 s"):
        Server(pages.port, dialect=OLD).wait_warm(deadline_s=0)


def test_a_newer_release_is_not_asked(pages: Pages) -> None:
    Server(pages.port, dialect=NEW).wait_warm(deadline_s=0)
    assert pages.asked == []


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.release)
def test_each_release_is_asked_at_its_own_paths(pages: Pages, dialect: Dialect) -> None:
    pages.answers.update({dialect.info: [json.dumps({"version": "x"})], dialect.flush: ["flushed"]})
    server = Server(pages.port, dialect=dialect)
    assert server.info() == {"version": "x"}
    server.flush()
    assert pages.asked == [f"GET {dialect.info}", f"POST {dialect.flush}"]


def test_a_server_of_another_release_is_named_by_the_path(pages: Pages) -> None:
    pages.answers["/server_info"] = ["{}"]
    with pytest.raises(ServerError, match="/get_server_info answered 404"):
        Server(pages.port, dialect=OLD).info()


def test_the_metrics_are_taken_once_all_requests_are_counted(pages: Pages) -> None:
    pages.answers["/metrics"] = [page(3), page(4), page(5), page(6)]
    server = Server(pages.port, dialect=OLD)
    assert server.settled_metrics(before=page(2), requests=3) == page(5)
    assert server.counted(page(0)) == 0
