"""A real SGLang server with the probe in it, for tests and benchmarks: started without the lab's runtime, on the nano
model, and ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from lab.stack import Stack

PROBE = Path(__file__).resolve().parent.parent / "lab" / "probe"
START_LIMIT_S = 240.0
READY_LINE = "The server is fired up and ready to roll!"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers; its log, and the folder of its events."""

    http: httpx.Client
    log: Path
    events: Path


def probe_env(folder: Path, *, level: str, plugins: bool = True) -> dict[str, str]:
    """What a server must be told to load the probe; releases before 0.5.11 have no plugins."""
    paths = [PROBE] if plugins else [PROBE / "startup", PROBE]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "LAB_PROBE_DIR": str(folder),
        "LAB_PROBE_LEVEL": level,
    }


@contextlib.contextmanager
def serving(
    stack: Stack, stack_dir: Path, model: Path, *, folder: Path, args: Sequence[str], env: Mapping[str, str]
) -> Iterator[Served]:
    """Start in `folder` with the stack's own arguments and environment, wait until it is ready, and end it."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [stack_dir / "bin" / "python", "-m", "sglang.launch_server", "--model-path", model]
    words += ["--host", "127.0.0.1", "--port", str(port), *stack.server_args, *args]
    base = {"PATH": f"{stack_dir / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "SGLANG_LOG_MS": "1"}
    log = folder / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            words,
            env=base | dict(stack.env) | dict(env),
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240) as http:
            _wait(process, log)
            yield Served(http=http, log=log, events=folder / "events")
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while READY_LINE not in log.read_text(errors="replace"):
        said = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"the server died:\n{said}"
        assert time.monotonic() < deadline, f"the server was not ready after {START_LIMIT_S} s:\n{said}"
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
