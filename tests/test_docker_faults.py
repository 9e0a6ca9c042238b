"""What goes wrong in containers, on real engines: memory, disk, limits, and the engine itself.

The machine's engine is left alone; what is done to an engine is done to one that the tests start.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import dockerparts
import httpx
import privateengine
import pytest
from dockerbench import HOG, Bench, OtherLab, ended, trial_plan
from parts import need
from privateengine import PrivateEngine, private_engine
from rich.console import Console

from lab import places, prepare
from lab.container import PORT, Container
from lab.errors import LabError
from lab.execute import Outcome, execute
from lab.plan import Plan
from lab.progress import Progress
from lab.rundir import Run
from lab.runtime.base import DiedWhileStarting, NeverReady, StartFailed
from lab.runtime.docker import sweep
from lab.runtime.engine import EngineError, EngineGone, Thing, accepted_ulimits, connect

MEMORY = "the kernel killed a process of its container for want of memory"
HOG_CHILD = "child = subprocess.run([sys.executable, '-c', '''" + HOG + "'''])"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    image = dockerparts.base_image()
    made = Bench(tmp_path, connect(), image=image, docker=dockerparts.docker)
    yield made
    made.check_nothing_left()


@pytest.fixture(scope="module")
def private() -> Iterator[PrivateEngine]:
    image = dockerparts.base_image()
    lacks = privateengine.missing()
    need(not lacks, f"an engine of the test's own: {lacks}")
    with private_engine(image=image) as engine:
        yield engine


@pytest.fixture
def alone(private: PrivateEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench at the private engine."""
    monkeypatch.setenv("DOCKER_HOST", private.host)
    made = Bench(tmp_path, connect(), image=dockerparts.base_image(), docker=private.docker)
    yield made
    made.check_nothing_left()


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}/health"


def executed(
    bench: Bench, plan: Plan, run: Path | None = None
) -> tuple[Outcome, list[dict[str, object]], str]:
    """Execute the plan: its outcome, each trial's status, and what was said."""
    bench.with_setup(lab=str(places.PACKAGE))
    found = Run(run or bench.folder / "run")
    text = io.StringIO()
    with Progress(Console(file=text, width=500)) as progress:
        outcome = execute(plan, found, runtime=bench.runtime(), progress=progress)
    statuses = [json.loads(found.trial(trial.name).status.read_text()) for trial in plan.trials]
    return outcome, statuses, text.getvalue()


# ---- a trial in order, to compare with


def test_a_trial_in_containers(bench: Bench) -> None:
    load = "from pathlib import Path; print(Path('/model/config.json').read_text())"
    plan = trial_plan(bench, load=load, trials=2)
    outcome, statuses, _ = executed(bench, plan)
    assert outcome == Outcome(ok=2, failed=0, not_run=0)
    for status in statuses:
        assert (status["status"], status["phase"], status["listens"]) == ("ok", "done", PORT)
        assert [stop["how"] for stop in status["stopped"]] == ["SIGINT", "SIGINT"]  # type: ignore[attr-defined]
    log = bench.folder / "run" / "trials" / plan.trials[0].name / "loads" / "one" / "client.log"
    assert log.read_text() == "{}\n"


def test_a_server_that_ends_when_it_is_asked_for_metrics(bench: Bench) -> None:
    """The first sign of it is an answer that does not come; the reason is its end."""
    flag = "open('/trial/asked', 'w')"
    hook = """
metrics = Handler.do_GET
def do_GET(self):
    if self.path == "/metrics" and __import__("os").path.exists("/trial/asked"): __import__("os")._exit(3)
    metrics(self)
Handler.do_GET = do_GET
"""
    _, (status,), _ = executed(bench, trial_plan(bench, work=hook, load=flag))
    assert (status["phase"], status["reason"]) == ("load one", "server: ended with exit code 3")


# ---- memory


def test_server_out_of_memory(bench: Bench) -> None:
    bench.with_setup(memory_gb=0.05)
    outcome, (status,), _ = executed(bench, trial_plan(bench, work=HOG))
    assert outcome == Outcome(ok=0, failed=1, not_run=0)
    assert (status["status"], status["phase"]) == ("failed", "start")
    assert status["reason"] in (
        f"server: was ended by signal 9; {MEMORY} before it was ready",
        f"server: was ended by signal 9; {MEMORY}",
    )
    assert status["last_lines"] == ["loading"]


def test_server_out_of_memory_under_load(bench: Bench) -> None:
    bench.with_setup(memory_gb=0.05)
    hog = f"import threading\ndef hog():\n  import time; time.sleep(2)\n  exec({HOG!r})\nthreading.Thread(target=hog).start()"
    plan = trial_plan(bench, work=hog, load="import time; time.sleep(60)")
    _, (status,), _ = executed(bench, plan)
    assert (status["status"], status["phase"]) == ("failed", "load one")
    assert status["reason"] == f"server: was ended by signal 9; {MEMORY}"


def test_only_a_child_of_the_server_out_of_memory(bench: Bench) -> None:
    """The server itself ends with a code of its own, as SGLang does when its scheduler is gone."""
    bench.with_setup(memory_gb=0.05)
    plan = trial_plan(
        bench, work=f"import subprocess\n{HOG_CHILD}\nsys.exit('scheduler: %d' % child.returncode)"
    )
    _, (status,), _ = executed(bench, plan)
    assert status["phase"] == "start"
    assert str(status["reason"]).startswith(f"server: ended with exit code 1; {MEMORY}")
    assert status["last_lines"] == ["loading", "scheduler: -9"]


def test_a_server_that_waits_for_a_child_out_of_memory(bench: Bench) -> None:
    """It never becomes ready, and the reason says what happened all the same."""
    bench.with_setup(memory_gb=0.05)
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server(f"{HOG_CHILD}; print('child', child.returncode); time.sleep(60)"))
        with pytest.raises(NeverReady, match="not ready after 4 s") as caught:
            rt.wait_ready(server, url=url(rt.port_of(server)), deadline_s=4)
    assert caught.value.reason.endswith(f"; {MEMORY}")
    assert caught.value.last_lines == ("loading", "child -9")


def test_client_out_of_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab limits servers only; here the client has a limit of its own, as where somebody set one for all."""
    create = bench.engine.create
    monkeypatch.setattr(bench.engine, "create", lambda box: create(replace(box, memory_bytes=50_000_000)))
    _, (status,), _ = executed(bench, trial_plan(bench, load=HOG))
    assert (status["status"], status["phase"]) == ("failed", "load one")
    assert status["reason"] == "the client of load 'one' ended with exit code 137"
    with bench.runtime() as rt:
        client = rt.start(bench.python(HOG))
        ended(lambda: client.exit_code() is not None)
    assert client.ending() == f"was ended by signal 9; {MEMORY}"


# ---- disk


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    need(done.returncode == 0, f"to mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


WRITE_ALL = "file = open('/trial/big', 'wb', buffering=0)\nwhile True: file.write(bytes(50_000))"
FULL = r"the disk with the run is full"


@pytest.mark.parametrize("who", ["server", "client"])
def test_disk_full(bench: Bench, who: str) -> None:
    """Whoever fills it, the lab says so and what to do, and leaves nothing; with room again, the trial runs."""
    flag = bench.folder / "model" / "fill"
    flag.touch()
    fill = f"import os\nif os.path.exists('/model/fill'): exec({WRITE_ALL!r})"
    plan = trial_plan(bench, work=fill if who == "server" else "", load=fill if who == "client" else "")
    with small_disk(bench.folder / "disk") as disk:
        with pytest.raises(LabError, match=FULL) as caught:
            executed(bench, plan, run=disk / "run")
        assert "No space left on device" in caught.value.why
        assert "invoke exp.small --resume" in caught.value.fix
        assert bench.left() == []
        (disk / "run" / "trials" / plan.trials[0].name / "big").unlink()
        flag.unlink()
        outcome, (status,), _ = executed(bench, plan, run=disk / "run")
        assert outcome == Outcome(ok=1, failed=0, not_run=0)
        assert status["status"] == "ok"


# ---- limits that the engine refuses


def test_ulimits_that_the_engine_refuses(bench: Bench) -> None:
    """They are left out and said; one that was not tried first fails the start, in the engine's words."""

    def probe(wanted: dict[str, int]) -> Container:
        return prepare._probe(bench.setup.image, ulimits=wanted)

    wanted = {"memlock": -1, "stack": 1_048_576}
    accepted, why = accepted_ulimits(bench.engine, wanted=wanted, probe=probe)
    assert accepted["stack"] == 1_048_576
    assert "stack" not in why
    bench.with_setup(ulimits={"memlock": -1})
    with bench.runtime() as rt:
        if "memlock" in accepted:
            assert why == ""
            rt.start(bench.command("true"))
        else:
            assert re.fullmatch(
                r"the engine refuses the limit memlock=-1 \(.*operation not permitted.*\)", why
            )
            with pytest.raises(StartFailed, match="rlimit"):
                rt.start(bench.command("true"))


def test_a_limit_that_no_engine_accepts(bench: Bench) -> None:
    """More open files than the kernel allows anybody (fs.nr_open)."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    accepted, why = accepted_ulimits(
        bench.engine,
        wanted={"nofile": most + 1, "core": 0},
        probe=lambda wanted: prepare._probe(bench.setup.image, ulimits=wanted),
    )
    assert accepted == {"core": 0}
    assert why.startswith(f"the engine refuses the limit nofile={most + 1} (")


# ---- no engine, or a wrong one


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(LabError, match="no Docker engine answers") as caught:
        connect()
    assert "No such file" in caught.value.why
    assert "--runtime process" in caught.value.fix


def test_a_socket_that_nobody_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/dead.sock")
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/dead.sock")
        with pytest.raises(LabError, match="no Docker engine answers") as caught:
            connect()
    assert "refused" in caught.value.why


def test_something_else_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rewriting_proxy(
        tmp_path / "proxy.sock", lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    ) as host:
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(LabError, match="no Docker engine answers"):
            connect()


@pytest.mark.parametrize("host", ["tcp://10.0.0.1:2375", "ssh://box", "http://box:2375"])
def test_an_engine_on_another_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(LabError, match=f"DOCKER_HOST is {host}, an engine on another machine"):
        connect()


@contextmanager
def rewriting_proxy(path: Path, change: Callable[[bytes], bytes]) -> Iterator[str]:
    """The machine's engine behind another socket, with its answers changed on the way; the DOCKER_HOST for it."""
    real = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as engine:
                engine.connect(real)
                engine.settimeout(0.5)
                while request := self.request.recv(65_536):
                    engine.sendall(request)
                    answer = b""
                    try:
                        while part := engine.recv(65_536):
                            answer += part
                    except TimeoutError:
                        pass
                    self.request.sendall(change(answer))

    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"unix://{path}"
        server.shutdown()


def test_an_engine_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dockerparts.engine()
    real = connect().version
    old = "19.03.15".ljust(len(real), "0")[: len(real)]
    change = lambda answer: answer.replace(f'"Version":"{real}"'.encode(), f'"Version":"{old}"'.encode())  # noqa: E731
    with rewriting_proxy(tmp_path / "proxy.sock", change) as host:
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(LabError, match=r"the Docker engine is 19.03.* the lab needs 20.10 or newer"):
            connect()


# ---- an engine that dies


def test_the_machines_engine_is_left_alone(private: PrivateEngine, bench: Bench) -> None:
    """Bridges and firewall are the machine's, not an engine's: one that starts can take away another's."""
    where = ("info", "--format", "{{.DockerRootDir}}")
    assert private.docker(*where).stdout != dockerparts.docker(*where).stdout
    private.restart()
    dockerparts.docker("run", "--rm", bench.setup.image, "true")  # on the default bridge
    private.docker("run", "--rm", bench.setup.image, "true")
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server())
        rt.wait_ready(server, url=url(rt.port_of(server)), deadline_s=30)


def test_engine_dies_and_returns_under_load(alone: Bench, private: PrivateEngine) -> None:
    """Its containers die with it; the trial is reported, the next one runs, and nothing is left."""
    slow = alone.folder / "model" / "slow"
    slow.touch()
    load = (
        "import os, time\nprint('running', flush=True)\nwhile os.path.exists('/model/slow'): time.sleep(0.1)"
    )
    plan = trial_plan(alone, load=load, trials=2)
    log = alone.folder / "run" / "trials" / plan.trials[0].name / "loads" / "one" / "client.log"

    def kill() -> None:
        ended(log.exists)
        private.restart()
        slow.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    outcome, statuses, text = executed(alone, plan)
    killer.join()
    assert outcome == Outcome(ok=1, failed=1, not_run=0), text
    first, second = statuses
    assert (first["status"], first["phase"]) == ("failed", "load one")
    assert "the Docker engine was away meanwhile" in str(first["reason"])
    assert second["status"] == "ok"
    assert alone.left() == []


def test_engine_dies_and_does_not_return(alone: Bench, private: PrivateEngine) -> None:
    """The lab gives up in bounded time and says so; once the engine is back, a sweep removes what was left."""
    lab = OtherLab(alone, alone.folder / "other", lost_s=1, return_s=2).wait_ready()
    private.kill()
    try:
        assert lab.end(None) == 0
        assert "left behind at the engine: the Docker engine does not answer" in lab.said
        assert "once it answers: invoke clean" in lab.said
        assert sweep(alone.engine, alone.said.append) == ()
        assert "could not look for what killed labs left" in alone.said[0]
    finally:
        private.start()
    assert len(alone.left()) == 5
    removed = sweep(alone.engine, alone.said.append)
    assert {thing.kind for thing in removed} == {"container", "network", "volume"}
    assert alone.left() == []


def test_a_lost_program_says_so(alone: Bench, private: PrivateEngine) -> None:
    with alone.runtime(lost_s=0.5, return_s=30) as rt:
        program = rt.start(alone.python("import time; print('on'); time.sleep(100)"))
        ended(lambda: alone.log("client") == "on\n")
        private.kill()
        ended(lambda: program.exit_code() is not None)
        assert program.ending().startswith("was lost: the Docker engine does not answer")
        assert program.log_end() == ("on",), "the log is a file of ours"
        with pytest.raises(StartFailed, match="does not answer"):
            rt.start(alone.command("true"))
        starting = threading.Thread(target=private.start)
        starting.start()
    starting.join()
    assert alone.left() == [], "the clean-up waited for it"
    assert alone.said == []


def test_a_program_outlives_an_engine_with_live_restore(alone: Bench, private: PrivateEngine) -> None:
    private.settings["live-restore"] = True
    private.restart()
    try:
        with alone.runtime() as rt:
            rt.values(trial=alone.folder, scratch=alone.folder, port=0)
            server = rt.start(alone.server())
            port = rt.port_of(server)
            rt.wait_ready(server, url=url(port), deadline_s=30)
            private.restart()
            ended(lambda: _answers(port))
            assert server.exit_code() is None
            stopped = rt.stop(server)
        assert (stopped.how, stopped.exit_code) == ("SIGINT", -2)
        assert server.ending() == "was ended by signal 2; the Docker engine was away meanwhile"
    finally:
        private.settings.pop("live-restore")
        private.restart()
    # An engine that took over running containers may think that their volumes are in use until its next start.
    for line in alone.said:
        assert re.fullmatch(r"could not remove volume \S+: .*volume has active mounts", line)
    if alone.said:
        private.docker("volume", "rm", f"{alone.prefix}-model", f"{alone.prefix}-jit")


def _answers(port: int) -> bool:
    try:
        return httpx.get(url(port), trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_container_that_somebody_removes(bench: Bench) -> None:
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server("time.sleep(60)"))
        port = rt.port_of(server)
        dockerparts.docker("rm", "--force", server.id)
        with pytest.raises(DiedWhileStarting, match=r"somebody removed its container|was ended by signal 9"):
            rt.wait_ready(server, url=url(port), deadline_s=30)
        assert rt.stop(server).how == "already"


def test_faults_of_the_engine_are_its_reason_only(alone: Bench, private: PrivateEngine) -> None:
    private.kill()
    try:
        thing = Thing(kind="network", id="x", name="x", labels={})
        for ask in (
            lambda: alone.engine.remove(thing),
            lambda: alone.engine.image("x"),
            lambda: alone.engine.state("x"),
        ):
            with pytest.raises(EngineGone, match=r"the Docker engine does not answer: .+"):
                ask()
    finally:
        private.start()
    with pytest.raises(EngineError):
        alone.engine.start("x")
    assert alone.engine.image("sglang-lab/none:0") is None
    assert alone.engine.state("x") is None
