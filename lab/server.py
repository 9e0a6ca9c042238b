"""What the lab says to a running SGLang server over HTTP, in its dialect: flush, metrics, server_info. Loopback only."""

from __future__ import annotations

import json
import time

import httpx

from lab.dialect import Dialect
from lab.read import prom

FLUSH_WAIT_S = 30.0
COUNTERS_SETTLE_S = 5.0


class ServerError(Exception):
    """The server did not do what a trial needs; it fails the trial, not the run."""


class Server:
    """A running server at `http://127.0.0.1:port`, of a release that speaks `dialect`."""

    def __init__(self, port: int, *, dialect: Dialect) -> None:
        self._dialect = dialect
        self.url = f"http://127.0.0.1:{port}"
        # trust_env off: a proxy of the user's must never see or answer these calls.
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def close(self) -> None:
        self._http.close()

    def metrics(self) -> str:
        """The Prometheus text of `/metrics`."""
        return self._get(self._dialect.metrics).text

    def settled_metrics(self, *, before: str, requests: int) -> str:
        """The metrics once every request is counted; the server counts a moment after it has answered."""
        deadline = time.monotonic() + COUNTERS_SETTLE_S
        start = self.counted(before)
        while True:
            text = self.metrics()
            if self.counted(text) - start >= requests or time.monotonic() > deadline:
                return text
            time.sleep(0.05)

    def info(self) -> dict[str, object]:
        """The server's own arguments and state."""
        path = self._dialect.info
        response = self._get(path)
        try:
            value = response.json()
        except json.JSONDecodeError as error:
            raise ServerError(f"{path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ServerError(f"{path} is not a JSON object")
        return value

    def counted(self, text: str) -> float:
        """How many requests the server had counted when it gave this text of its metrics."""
        return prom.value(prom.parse(text), f"sglang:{self._dialect.requests_total}", default=0)

    def wait_warm(self, *, deadline_s: float) -> None:
        """Wait until the server's own warm-up request is done, where its health does not say so.

        The first request that is counted is that one. Raises `ServerError` after `deadline_s` seconds.
        """
        deadline = time.monotonic() + deadline_s
        while self._dialect.warm_up_pending:
            page = self.metrics()  # empty until something was measured
            if page.strip() and self.counted(page) >= 1:
                return
            if time.monotonic() > deadline:
                raise ServerError(f"the server's warm-up request was not done after {deadline_s:.0f} s")
            time.sleep(0.1)

    def flush(self) -> None:
        """Empty the radix cache. The server refuses with 400 while requests run, so this waits for idleness."""
        deadline = time.monotonic() + FLUSH_WAIT_S
        while True:
            response = self._call("POST", self._dialect.flush)
            if response.status_code == 200:
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self._dialect.flush} answered {response.status_code} for {FLUSH_WAIT_S:.0f} s: {response.text[:200]}"
                )
            time.sleep(0.1)

    def _get(self, path: str) -> httpx.Response:
        response = self._call("GET", path)
        if response.status_code != 200:
            raise ServerError(f"{path} answered {response.status_code}: {response.text[:200]}")
        return response

    def _call(self, method: str, path: str) -> httpx.Response:
        try:
            return self._http.request(method, path)
        except httpx.HTTPError as error:
            raise ServerError(f"{path} did not answer: {error!r}") from error
