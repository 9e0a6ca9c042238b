"""What tests of the Docker runtime share: one test's folders, commands and leftovers, and small programs.

The leftovers are looked up with the docker client, apart from the code under test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fakerun

from lab.boxes import PLACES
from lab.container import PORT, RUN_LABEL, Setup
from lab.plan import LoadStep, Plan, Process, Trial
from lab.runtime.base import Command
from lab.runtime.docker import DockerRuntime
from lab.runtime.engine import Engine

ROOT = Path(__file__).parent.parent
ENV = (("PATH", os.defpath), ("HOME", "/scratch"), ("PYTHONUNBUFFERED", "1"))

# A server as far as the runtime can tell: does `work`, then answers every GET with `status`.
SERVER = """
import http.server, os, subprocess, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status}); self.end_headers()
    def log_message(self, *args): pass
print("loading")
{work}
http.server.HTTPServer(("0.0.0.0", {port}), Handler).serve_forever()
"""
# Takes memory until the kernel ends it.
HOG = "held = []\nwhile True: held.append(bytearray(8_000_000))"


def server_code(work: str = "", *, status: int = 200) -> str:
    """The server's program."""
    return SERVER.format(work=work, status=status, port=PORT)


class Bench:
    """One test at one engine: a run id, folders, commands. `docker` is the client to look with."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        image: str,
        docker: Callable[..., subprocess.CompletedProcess[str]],
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.docker = docker
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        self.run_ids = [self.run_id]
        self.said: list[str] = []
        for name in ("model", "lab", "trial", "scratch"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "model" / "config.json").write_text("{}")
        self.setup = Setup(
            image=image,
            image_name=image,
            model=str(folder / "model"),
            lab=str(folder / "lab"),
            jit=str(folder / "jit"),
            shm_gb=0.064,
            ulimits={},
        )

    @property
    def prefix(self) -> str:
        return f"sglang-lab-{self.run_id}"

    def with_setup(self, **changes: object) -> Bench:
        """The same, with another `Setup`."""
        self.setup = replace(self.setup, **changes)  # type: ignore[arg-type]
        return self

    def runtime(self, *, lost_s: float = 10.0, return_s: float = 5.0) -> DockerRuntime:
        return DockerRuntime(
            engine=self.engine,
            setup=self.setup,
            run_id=self.run_id,
            say=self.said.append,
            lost_s=lost_s,
            return_s=return_s,
        )

    def command(self, *argv: str, name: str = "server", port: int = 0, **fields: object) -> Command:
        made = Command(
            name=name,
            argv=argv,
            env=ENV,
            cwd=self.folder / "scratch",
            log=self.folder / "trial" / f"{name}.log",
            port=port,
        )
        return replace(made, **fields)  # type: ignore[arg-type]

    def python(self, code: str, *, name: str = "client", port: int = 0, **fields: object) -> Command:
        return self.command("python3", "-u", "-c", code, name=name, port=port, **fields)

    def server(self, work: str = "", *, status: int = 200, **fields: object) -> Command:
        return self.python(server_code(work, status=status), name="server", port=PORT, **fields)

    def log(self, name: str = "server") -> str:
        path = self.folder / "trial" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def left(self) -> list[str]:
        """Containers, networks and volumes of this test that are still there."""
        found = []
        for run_id in self.run_ids:
            only = ("--filter", f"label={RUN_LABEL}={run_id}", "--format")
            found += self.docker("ps", "--all", *only, "{{.Names}}").stdout.split()
            found += self.docker("network", "ls", *only, "{{.Name}}").stdout.split()
            found += self.docker("volume", "ls", *only, "{{.Name}}").stdout.split()
        return found

    def check_nothing_left(self) -> None:
        """Fail when something is left, after removing it, so that the next test is not disturbed."""
        left = self.left()
        for name in left:
            for kind in (("rm", "--force"), ("network", "rm"), ("volume", "rm")):
                self.docker(*kind, name, check=False)
        assert not left, f"the test left {left}"


def ended(done: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Return when `done` says so; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ---- whole trials

# As much of SGLang's server as a trial asks of one.
TRIAL_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(b"{{}}" if "info" in self.path else b"# TYPE up gauge\\nup 1.0\\n")
    do_POST = do_GET
    def log_message(self, *args): pass
print("loading")
{work}
http.server.HTTPServer(("0.0.0.0", {port}), Handler).serve_forever()
"""


def trial_plan(bench: Bench, *, work: str = "", load: str = "", trials: int = 1) -> Plan:
    """A plan of containers whose server does `work` before it answers, and whose only load is `load`."""
    (bench.folder / "model" / "load.py").write_text(load)
    client = Process(argv=("python3",), env=ENV, cpus=())
    code = TRIAL_SERVER.format(work=work, port=PORT)
    server = Process(argv=("python3", "-u", "-c", code), env=ENV, cpus=())
    step = LoadStep(
        name="one", dataset="none", role="load", argv=("${MODEL}/load.py",), requests=0, concurrency=1,
        rate_per_s=None, hit_rate=0, working_set_tokens=0,
    )  # fmt: skip
    plan = fakerun.make_fake_plan(fakerun.small(bench.folder), repeats=1)
    return replace(
        plan,
        runtime="docker",
        places=dict(PLACES),
        containers=bench.setup,
        preload=(),
        ready_s=30,
        load_s=60,
        stop_s=5,
        trials=tuple(
            Trial(
                index=i,
                name=f"{i:03d}-a-r{i}",
                variant="a",
                repeat=i,
                server=server,
                client=client,
                loads=(step,),
            )
            for i in range(trials)
        ),
    )


# ---- labs that are processes of their own

LAB = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from dockerbench import Bench
from lab.runtime.base import Terminated
from lab.runtime.engine import connect
bench = Bench(Path(sys.argv[1]), connect(), image=sys.argv[3], docker=None)
bench.run_id = sys.argv[2]
try:
    with bench.runtime(lost_s=float(sys.argv[4]), return_s=float(sys.argv[5])) as rt:
        values = rt.values(trial=bench.folder / "trial", scratch=bench.folder / "scratch", port=0)
        server = rt.start(bench.server())
        client = rt.start(bench.python("import time; time.sleep(100)"))
        port = rt.port_of(server)
        rt.wait_ready(server, url=f"http://127.0.0.1:{{port}}/health", deadline_s=30)
        print("ready", flush=True)
        sys.stdin.read()
    print(*bench.said, sep=chr(10))
except Terminated as error:
    sys.exit(128 + error.signum)
except KeyboardInterrupt:
    sys.exit(130)
"""


class OtherLab:
    """A lab in a process of its own, with a server and a client that run until it is told to end."""

    def __init__(self, bench: Bench, folder: Path, *, lost_s: float = 10, return_s: float = 5) -> None:
        folder.mkdir(exist_ok=True)
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        self.prefix = f"sglang-lab-{self.run_id}"
        self.said = ""
        bench.run_ids.append(self.run_id)
        code = LAB.format(tests=str(Path(__file__).parent))
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                code,
                str(folder),
                self.run_id,
                bench.setup.image,
                str(lost_s),
                str(return_s),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def wait_ready(self) -> OtherLab:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def end(self, signum: signal.Signals | None = signal.SIGINT) -> int:
        """Send a signal, or with None let it leave its block; the exit code. `said` is then what it said."""
        if signum is not None:
            self.process.send_signal(signum)
        self.said = self.process.communicate(timeout=60)[0]
        return self.process.returncode
