"""What the lab says to a running SGLang server over HTTP: flush, metrics, server_info. Loopback only."""

from __future__ import annotations

import json
import time

import httpx

from lab.read import prom

FLUSH_WAIT_S = 30.0
COUNTERS_SETTLE_S = 5.0
COUNTER = "sglang:num_requests_total"


class ServerError(Exception):
    """The server did not do what a trial needs; it fails the trial, not the run."""


class Server:
    """A running server at `http://127.0.0.1:port`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        # trust_env off: a proxy of the user's must never see or answer these calls.
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def close(self) -> None:
        self._http.close()

    def metrics(self) -> str:
        """The Prometheus text of `/metrics`."""
        return self._get("/metrics").text

    def settled_metrics(self, *, before: str, requests: int) -> str:
        """The metrics once every request is counted; the server counts a moment after it has answered."""
        deadline = time.monotonic() + COUNTERS_SETTLE_S
        start = prom.value(prom.parse(before), COUNTER, default=0)
        while True:
            text = self.metrics()
            counted = prom.value(prom.parse(text), COUNTER, default=0) - start
            if counted >= requests or time.monotonic() > deadline:
                return text
            time.sleep(0.05)

    def info(self) -> dict[str, object]:
        """The server's own arguments and state: `/server_info`, before 0.5.6 `/get_server_info`."""
        response = self._call("GET", "/server_info")
        if response.status_code == 404:
            response = self._get("/get_server_info")
        try:
            value = response.json()
        except json.JSONDecodeError as error:
            raise ServerError(f"/server_info is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ServerError("/server_info is not a JSON object")
        return value

    def flush(self) -> None:
        """Empty the radix cache. The server refuses with 400 while requests run, so this waits for idleness."""
        deadline = time.monotonic() + FLUSH_WAIT_S
        while True:
            response = self._call("POST", "/flush_cache")
            if response.status_code == 200:
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"/flush_cache answered {response.status_code} for {FLUSH_WAIT_S:.0f} s: {response.text[:200]}"
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
