"""The process runtime with real processes and real signals: every way a program or the lab can end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from lab.errors import LabError
from lab.runtime import shm
from lab.runtime.base import (
    Command,
    DeadlinePassed,
    DiedUnderLoad,
    DiedWhileStarting,
    NeverReady,
    ProcessFault,
    StartFailed,
    Stopped,
    Terminated,
    Waiting,
)
from lab.runtime.ledger import Ledger
from lab.runtime.logtail import LogReader, last_lines
from lab.runtime.ports import free_port, holder, require_port
from lab.runtime.process import ProcessRuntime

ROOT = Path(__file__).parent.parent

# A server as far as the runtime can tell: says what it does, then answers /health.
SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status}); self.end_headers()
    def log_message(self, *args): pass
print("loading", flush=True)
time.sleep({delay})
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""

# Forks a child that does `code`, and notes the child's pid in the file `pids`.
FORK = """
import os, signal, sys, time
def note(): open({pids!r}, "a").write(str(os.getpid()) + chr(10))
def ignore(*signums): [signal.signal(signum, signal.SIG_IGN) for signum in signums]
def forked(work):
    pid = os.fork()
    if pid == 0:
        try: work()
        finally: os._exit(0)
    return pid
"""
SLEEP_BARE = "os.execve(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)'], {})"


class Bench:
    """One test's run id, folders and commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        self.state = folder / "state"
        self.pids = folder / "pids"

    def runtime(self, *, grace_s: float = 2.0) -> ProcessRuntime:
        return ProcessRuntime(ledger=Ledger(self.state), run_id=self.run_id, close_grace_s=grace_s)

    def command(
        self,
        *argv: str,
        name: str = "server",
        env: tuple[tuple[str, str], ...] = (("PATH", os.defpath),),
        cpus: tuple[int, ...] = (),
        stdin: bool = False,
    ) -> Command:
        log = self.folder / f"{name}.log"
        return Command(name=name, argv=argv, env=env, cwd=self.folder, log=log, cpus=cpus, stdin=stdin)

    def python(
        self, code: str, *, name: str = "server", cpus: tuple[int, ...] = (), stdin: bool = False
    ) -> Command:
        return self.command(sys.executable, "-u", "-c", code, name=name, cpus=cpus, stdin=stdin)

    def server(self, *, port: int, delay: float = 0.0, status: int = 200) -> Command:
        return self.python(SERVER.format(port=port, delay=delay, status=status))

    def forking(self, code: str) -> Command:
        return self.python(FORK.format(pids=str(self.pids)) + code)

    def noted(self, count: int) -> list[int]:
        """The pids that `count` children have noted."""
        until(lambda: self.pids.exists() and self.pids.read_text().count("\n") == count)
        return [int(line) for line in self.pids.read_text().split()]

    def log(self, name: str = "server") -> str:
        return (self.folder / f"{name}.log").read_text()

    def marked(self) -> list[psutil.Process]:
        """Live processes of this test, looked up apart from the code under test."""
        found = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("LAB_RUN", "")
            except psutil.Error:
                continue
            if mark.startswith(self.run_id + "/") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def ledger_files(self) -> list[Path]:
        return sorted(self.state.iterdir()) if self.state.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    left = made.marked()
    if made.pids.exists():
        left += [psutil.Process(pid) for pid in made.noted(made.pids.read_text().count("\n")) if alive(pid)]
    for process in left:
        process.kill()
    assert not left, f"the test left {left}"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(done: Callable[[], bool], *, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}/health"


# ---- what a program is given


def test_a_program_runs_and_its_output_is_kept_as_it_is(bench: Bench) -> None:
    code = (
        "import sys; print('out'); print('err', file=sys.stderr); print(repr(sys.stdin.read())); sys.exit(3)"
    )
    with bench.runtime() as rt:
        assert rt.wait(rt.start(bench.python(code)), deadline_s=10) == 3
    assert bench.log() == "out\nerr\n''\n"
    assert bench.ledger_files() == []


def test_nothing_of_the_labs_environment_leaks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("LANG", "LC_ALL", "LC_CTYPE"):  # then Python would add LC_CTYPE for its children
        monkeypatch.delenv(name, raising=False)
    with bench.runtime() as rt:
        rt.wait(rt.start(bench.command("env", env=(("PATH", os.defpath), ("A", "b=c")))), deadline_s=10)
    names = dict(line.split("=", 1) for line in bench.log().splitlines())
    mark = names.pop("LAB_RUN")
    assert names == {"PATH": os.defpath, "A": "b=c", "SPT_NOENV": "1"}
    assert mark.startswith(f"{bench.run_id}/")


def test_it_leads_its_own_session_with_normal_signals(bench: Bench) -> None:
    code = """if True:
        import os
        print(os.getpid() == os.getpgrp() == os.getsid(0))
        """
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a background job of a script
    try:
        with bench.runtime() as rt:
            rt.wait(rt.start(bench.python(code)), deadline_s=10)
            rt.wait(
                rt.start(bench.command("grep", "SigIgn", "/proc/self/status", name="grep")), deadline_s=10
            )
    finally:
        signal.signal(signal.SIGINT, old)
    assert bench.log().startswith("True\n")
    assert bench.log("grep").split() == ["SigIgn:", "0" * 16]


def test_affinity_holds_for_the_program_and_its_children(bench: Bench) -> None:
    cpu = max(os.sched_getaffinity(0))
    code = """if True:
        import os, subprocess, sys
        print(os.sched_getaffinity(0))
        subprocess.run([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"])
        """
    mine = os.sched_getaffinity(0)
    with bench.runtime() as rt:
        assert rt.wait(rt.start(bench.python(code, cpus=(cpu,))), deadline_s=10) == 0
    assert bench.log() == f"{{{cpu}}}\n" * 2
    assert os.sched_getaffinity(0) == mine


def test_a_cpu_that_does_not_exist_is_said_in_the_log(bench: Bench) -> None:
    with bench.runtime() as rt:
        assert rt.wait(rt.start(bench.python("print('ran')", cpus=(1000,))), deadline_s=10) == 126
    assert bench.log() == "lab: cannot pin to CPUs 1000: Invalid argument\n"


@pytest.mark.parametrize("program", ["no-such-program", "./no-such-program", "/etc/passwd"])
def test_no_such_program(bench: Bench, program: str) -> None:
    with bench.runtime() as rt, pytest.raises(StartFailed, match="no program") as caught:
        rt.start(bench.command(program))
    assert caught.value.phase == "start"


def test_a_program_that_cannot_be_executed_says_so_in_its_log(bench: Bench) -> None:
    (bench.folder / "tool").write_text("#!/no/such/interpreter\n")
    (bench.folder / "tool").chmod(0o755)
    with bench.runtime() as rt:
        assert rt.wait(rt.start(bench.command("./tool")), deadline_s=10) == 127
    assert bench.log() == "lab: cannot start ./tool: No such file or directory\n"


def test_lines_go_to_a_program_that_reads_them(bench: Bench) -> None:
    code = "import sys\nfor line in sys.stdin: print('got', line.strip())"
    with bench.runtime() as rt:
        client = rt.start(bench.python(code, name="client", stdin=True))
        reader = LogReader(client.command.log)
        rt.send_line(client, "first")
        until(lambda: reader.new_lines() == ("got first",))
        rt.send_line(client, "second")
        until(lambda: reader.new_lines() == ("got second",))
        stopped = rt.stop(client)
        assert (stopped.how, stopped.exit_code) == ("EOF", 0)
        with pytest.raises(DiedUnderLoad, match="no longer reads its input"):
            rt.send_line(client, "third")


# ---- logs


def test_a_program_that_writes_a_lot_is_never_held_up(bench: Bench) -> None:
    with bench.runtime() as rt:
        talker = rt.start(bench.python("for i in range(50_000): print(i, 'x' * 100)"))
        assert rt.wait(talker, deadline_s=20) == 0
    assert bench.log().count("\n") == 50_000
    assert len(last_lines(bench.folder / "server.log")) == 20
    assert last_lines(bench.folder / "server.log")[-1].startswith("49999 x")


def test_a_cut_last_line_is_part_of_the_last_lines(bench: Bench) -> None:
    code = "import os; os.write(1, b'10%\\r20%\\r\\n\\nbad \\xff byte\\nhalf a li'); os.kill(os.getpid(), 9)"
    with bench.runtime() as rt:
        server = rt.start(bench.python(code))
        with pytest.raises(DiedWhileStarting) as caught:
            rt.wait_ready(server, url=url(free_port()), deadline_s=30)
    assert caught.value.last_lines == ("10%", "20%", "bad \N{REPLACEMENT CHARACTER} byte", "half a li")
    assert caught.value.reason.startswith("was ended by SIGKILL")
    assert LogReader(bench.folder / "server.log").new_lines()[-1].startswith("bad")
    assert last_lines(bench.folder / "none.log") == ()


# ---- readiness


def test_ready_with_progress_then_stopped_in_order(bench: Bench) -> None:
    said: list[Waiting] = []
    port = free_port()
    with bench.runtime() as rt:
        server = rt.start(bench.server(port=port, delay=0.5))
        seconds = rt.wait_ready(server, url=url(port), deadline_s=20, say=said.append)
        assert 0.4 < seconds < 10
        assert holder(port) == server.pid
        stopped = rt.stop(server)
        assert rt.stop(server) is stopped
    assert said[-1].last_line == "loading"
    assert said[-1].elapsed_s <= seconds
    assert (stopped.how, stopped.exit_code, stopped.survivors_killed) == ("SIGINT", -signal.SIGINT, ())
    assert stopped.seconds < 5


def test_death_while_starting_is_noticed_at_once(bench: Bench) -> None:
    code = (
        "import sys, time\nfor i in range(30): print('line', i)\ntime.sleep(0.3); sys.exit('no such model')"
    )
    began = time.monotonic()
    with bench.runtime() as rt:
        server = rt.start(bench.python(code))
        with pytest.raises(DiedWhileStarting) as caught:
            rt.wait_ready(server, url=url(free_port()), deadline_s=60)
    fault = caught.value
    assert time.monotonic() - began < 5
    assert (fault.name, fault.phase, fault.reason) == (
        "server",
        "start",
        "ended with exit code 1 before it was ready",
    )
    assert fault.last_lines == (*(f"line {i}" for i in range(11, 30)), "no such model")
    assert "  | no such model" in str(fault)


def test_death_with_a_request_hanging_is_noticed_at_once(bench: Bench) -> None:
    port = free_port()
    code = f"""if True:
        import os, socket, time
        listener = socket.create_server(("127.0.0.1", {port}))
        connection, _ = listener.accept()
        time.sleep(0.3)
        os._exit(7)
        """
    began = time.monotonic()
    with bench.runtime() as rt:
        server = rt.start(bench.python(code))
        with pytest.raises(DiedWhileStarting, match="exit code 7"):
            rt.wait_ready(server, url=url(port), deadline_s=60)
    assert time.monotonic() - began < 4


def test_never_ready(bench: Bench) -> None:
    port = free_port()
    with bench.runtime() as rt:
        server = rt.start(bench.server(port=port, status=503))
        with pytest.raises(NeverReady, match=r"not ready after 1.5 s; .* HTTP 503") as caught:
            rt.wait_ready(server, url=url(port), deadline_s=1.5)
        assert alive(server.pid)
        sleeper = rt.start(bench.command("sleep", "60", name="sleeper"))
        with pytest.raises(NeverReady, match="ConnectError"):
            rt.wait_ready(sleeper, url=url(free_port()), deadline_s=0.5)
    assert caught.value.last_lines == ("loading",)


def test_a_stranger_that_answers_is_not_taken_for_the_server(bench: Bench) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as stranger, bench.runtime() as rt:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        server = rt.start(bench.command("sleep", "60"))
        with pytest.raises(NeverReady, match=f"answered by pid {os.getpid()} "):
            rt.wait_ready(server, url=url(stranger.server_port), deadline_s=10)
        stranger.shutdown()


@pytest.mark.parametrize(
    "wrong",
    [
        "http://10.0.0.1:80/",
        "https://127.0.0.1:80/",
        "http://127.0.0.1/",
        "http://127.0.0.1.example:80/",
        "http://[::1]:x/",
    ],
)
def test_only_the_loopback_is_asked(bench: Bench, wrong: str) -> None:
    with bench.runtime() as rt, pytest.raises(LabError, match="loopback"):
        rt.wait_ready(rt.start(bench.command("sleep", "60")), url=wrong, deadline_s=10)


def test_a_server_that_closes_its_output_is_still_served(bench: Bench) -> None:
    port = free_port()
    with bench.runtime() as rt:
        closing = "import os; os.close(1); os.close(2)\n"
        code = SERVER.format(port=port, delay=0, status=200).replace('print("loading", flush=True)', closing)
        server = rt.start(bench.python(code))
        rt.wait_ready(server, url=url(port), deadline_s=20)
        assert rt.stop(server).how == "SIGINT"
    assert bench.log() == ""


# ---- under load


def test_death_of_a_watched_program_under_load(bench: Bench) -> None:
    began = time.monotonic()
    with bench.runtime() as rt:
        server = rt.start(bench.python("import time; print('batch'); time.sleep(0.3); 1 / 0"))
        client = rt.start(bench.command("sleep", "60", name="client"))
        with pytest.raises(DiedUnderLoad) as caught:
            rt.wait(client, deadline_s=60, watch=(server,))
    fault = caught.value
    assert time.monotonic() - began < 5
    assert (fault.name, fault.phase) == ("server", "load")
    assert fault.reason == "ended with exit code 1 while client depended on it"
    assert fault.last_lines[-1] == "ZeroDivisionError: division by zero"


def test_a_client_that_fails_just_before_its_server_dies_is_not_blamed(bench: Bench) -> None:
    with bench.runtime() as rt:
        server = rt.start(bench.python("import time; time.sleep(1); raise SystemExit(4)"))
        client = rt.start(bench.command("false", name="client"))
        with pytest.raises(DiedUnderLoad, match="exit code 4"):
            rt.wait(client, deadline_s=60, watch=(server,))


def test_a_client_that_fails_beside_a_healthy_server(bench: Bench) -> None:
    with bench.runtime() as rt:
        server = rt.start(bench.command("sleep", "60"))
        client = rt.start(bench.command("false", name="client"))
        assert rt.wait(client, deadline_s=60, watch=(server,)) == 1
        stopped = rt.stop(client)
        assert stopped == Stopped(name="client", how="already", seconds=stopped.seconds, exit_code=1)
        assert alive(server.pid)


def test_the_deadline_of_the_load(bench: Bench) -> None:
    said: list[Waiting] = []
    with bench.runtime() as rt:
        client = rt.start(bench.command("sh", "-c", "echo 3 of 9 requests; exec sleep 60", name="client"))
        with pytest.raises(DeadlinePassed, match=r"not done after 1 s") as caught:
            rt.wait(client, deadline_s=1, say=said.append)
    assert caught.value.last_lines == ("3 of 9 requests",)
    assert caught.value.phase == "load"
    assert said[-1].last_line == "3 of 9 requests"


# ---- ending


@pytest.mark.parametrize(
    ("ignored", "how", "code"),
    [("", "SIGINT", -2), ("SIGINT", "SIGTERM", -15), ("SIGINT SIGTERM", "SIGKILL", -9)],
)
def test_escalation(bench: Bench, ignored: str, how: str, code: int) -> None:
    ignoring = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN);" for name in ignored.split())
    with bench.runtime() as rt:
        server = rt.start(bench.python(f"import signal, time; {ignoring} print('set'); time.sleep(60)"))
        until(lambda: bench.log().startswith("set"))
        stopped = rt.stop(server, grace_s=0.5)
    assert (stopped.how, stopped.exit_code, stopped.survivors_killed, stopped.left) == (how, code, (), ())
    assert 0.5 * len(ignored.split()) <= stopped.seconds < 0.5 * len(ignored.split()) + 3


ESCAPES = {
    "in the session, marked": "forked(lambda: (note(), time.sleep(60)))",
    "in the session, no mark": f"forked(lambda: (note(), {SLEEP_BARE}))",
    "own session, marked, orphan": "forked(lambda: (os.setsid(), forked(lambda: (note(), time.sleep(60)))))",
    "own session, no mark, parent lives": f"forked(lambda: (os.setsid(), note(), {SLEEP_BARE}))",
    "ignores all it can": "forked(lambda: (ignore(1, 2, 15), note(), time.sleep(60)))",
}


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_grandchildren_do_not_survive_sigkill(bench: Bench, escape: str) -> None:
    stubborn = "\nignore(2, 15); note(); time.sleep(60)"
    with bench.runtime() as rt:
        server = rt.start(bench.forking(escape + stubborn))
        pids = bench.noted(2)
        stopped = rt.stop(server, grace_s=0.1)
    assert stopped.how == "SIGKILL"
    assert {*stopped.survivors_killed, server.pid} == set(pids)


def test_grandchildren_that_outlive_their_leader_are_killed(bench: Bench) -> None:
    """Once the leader is dead the parents are no help: what counts is the session and the mark."""
    ways = [way for name, way in ESCAPES.items() if "parent lives" not in name]
    with bench.runtime() as rt:
        server = rt.start(bench.forking("\n".join(ways)))
        pids = bench.noted(len(ways))
        assert rt.wait(server, deadline_s=10) == 0
        assert all(map(alive, pids))
        stopped = rt.stop(server)
    assert stopped.how == "already"
    assert sorted(stopped.survivors_killed) == sorted(pids)
    assert 2.0 <= stopped.seconds < 6


def test_a_helper_that_ends_by_itself_is_given_the_time(bench: Bench) -> None:
    with bench.runtime() as rt:
        server = rt.start(bench.forking("forked(lambda: (note(), time.sleep(0.5), print('done')))"))
        bench.noted(1)
        stopped = rt.stop(server)
    assert stopped.survivors_killed == ()
    assert bench.log() == "done\n"


def test_a_process_that_keeps_forking_away_is_caught(bench: Bench) -> None:
    hop = "for _ in range(60):\n  time.sleep(0.1)\n  if os.fork(): os._exit(0)\n  os.setsid()"
    with bench.runtime() as rt:
        server = rt.start(bench.forking(f"print('hop')\n{hop}"))
        assert rt.wait(server, deadline_s=10) == 0
        assert rt.stop(server).left == ()
        assert bench.marked() == []


LEAVES_MEMORY = """
import sys, time
from multiprocessing import get_context, resource_tracker, shared_memory
block = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(block._name, "shared_memory")
lock = get_context("spawn").Lock()
resource_tracker.unregister(lock._semlock.name, "semaphore")
print(block.name, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("ends", ["is stopped", "dies after it was ready"])
def test_shared_memory_that_a_program_leaves_is_removed(bench: Bench, ends: str) -> None:
    def entries() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-"))}  # noqa: PTH208

    before = entries()
    stranger = shared_memory.SharedMemory(create=True, size=64)
    try:
        with bench.runtime() as rt:
            program = rt.start(bench.python(LEAVES_MEMORY))
            until(lambda: len(entries() - before) == 3)
            if ends == "dies after it was ready":
                program.shared |= shm.mapped(program.members())  # as wait_ready does
                program.popen.kill()
                rt.wait(program, deadline_s=5)
            else:
                assert "\n" in bench.log()
            rt.stop(program)
        assert entries() - before == {stranger.name}
    finally:
        stranger.close()
        stranger.unlink()


def test_it_works_where_python_has_no_pidfd(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with bench.runtime() as rt:
        server = rt.start(
            bench.forking("forked(lambda: (ignore(2, 15), note(), time.sleep(60)))\ntime.sleep(60)")
        )
        (helper,) = bench.noted(1)
        stopped = rt.stop(server)
    assert (stopped.how, stopped.survivors_killed) == ("SIGINT", (helper,))


def test_ending_one_program_leaves_the_others(bench: Bench) -> None:
    with bench.runtime() as rt:
        server = rt.start(bench.command("sleep", "60"))
        client = rt.start(bench.command("sleep", "60", name="client"))
        rt.stop(client)
        assert not alive(client.pid)
        assert alive(server.pid)
    assert not alive(server.pid)


def test_an_error_in_the_block_ends_everything(bench: Bench) -> None:
    with pytest.raises(ZeroDivisionError), bench.runtime() as rt:  # noqa: PT012 - the block's end is tested
        server = rt.start(bench.command("sleep", "60"))
        _ = 1 / 0
    assert server.stopped is not None
    assert bench.marked() == []
    assert bench.ledger_files() == []


def test_ctrl_c_while_the_block_closes_in_order_is_not_lost(bench: Bench) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), bench.runtime(grace_s=30) as rt:  # noqa: PT012 - the block's end raises
        rt.start(
            bench.python(
                "import signal, time; signal.signal(2, signal.SIG_IGN); print('set'); time.sleep(60)"
            )
        )
        until(lambda: bench.log().startswith("set"))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert time.monotonic() - began < 8
    assert before == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_misuse_is_a_bug_not_a_lab_error(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match="with"):
        bench.runtime().start(bench.command("true"))
    caught: list[Exception] = []

    def enter() -> None:
        try:
            bench.runtime().__enter__()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


# ---- the lab itself ends

# A lab of its own: starts a program (code in the file argv[3]), says so, and waits for it.
DRIVER = """
import os, sys
from pathlib import Path
from lab.runtime.base import Command, Terminated
from lab.runtime.ledger import Ledger
from lab.runtime.process import ProcessRuntime
folder, run_id, code, grace_s = Path(sys.argv[1]), sys.argv[2], open(sys.argv[3]).read(), float(sys.argv[4])
command = Command(name="server", argv=(sys.executable, "-u", "-c", code), env=(("PATH", os.defpath),),
                  cwd=folder, log=folder / "driver-server.log")
try:
    with ProcessRuntime(ledger=Ledger(folder / "state"), run_id=run_id, close_grace_s=grace_s) as rt:
        server = rt.start(command)
        print(server.pid, flush=True)
        rt.wait(server, deadline_s=60)
except Terminated as error:
    sys.exit(128 + error.signum)
except KeyboardInterrupt:
    sys.exit(130)
"""


def drive(bench: Bench, code: str, *, grace_s: float = 2.0) -> tuple[subprocess.Popen[str], int]:
    """Start another lab that runs `code`: (the lab, the pid of its program)."""
    program = bench.folder / f"program-{uuid.uuid4().hex}.py"
    program.write_text(FORK.format(pids=str(bench.pids)) + code)
    lab = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(bench.folder), bench.run_id, str(program), str(grace_s)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert lab.stdout is not None
    with lab.stdout:
        return lab, int(lab.stdout.readline())


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_asked_to_end_the_lab_ends_everything(bench: Bench, signum: signal.Signals, code: int) -> None:
    helper = ESCAPES["own session, marked, orphan"] if signum == signal.SIGINT else "note()"
    lab, _ = drive(bench, helper + "\nnote(); time.sleep(60)")
    bench.noted(2)
    lab.send_signal(signum)
    assert lab.wait(timeout=10) == code
    assert bench.marked() == []
    assert bench.ledger_files() == []


def test_a_second_ctrl_c_does_not_wait_for_the_grace_period(bench: Bench) -> None:
    lab, _ = drive(bench, "ignore(2, 15); note(); time.sleep(60)", grace_s=60)
    bench.noted(1)
    began = time.monotonic()
    lab.send_signal(signal.SIGINT)
    time.sleep(0.5)
    lab.send_signal(signal.SIGINT)
    assert lab.wait(timeout=10) == 130
    assert time.monotonic() - began < 5
    assert bench.marked() == []


def test_kill_9_of_the_lab_then_the_next_start(bench: Bench) -> None:
    """The kernel ends the leader at once; what had left the leader's side is ended by the next sweep."""
    lab, server = drive(bench, ESCAPES["own session, marked, orphan"] + "\nnote(); time.sleep(60)")
    escaped = next(pid for pid in bench.noted(2) if pid != server)
    lab.kill()
    lab.wait(timeout=10)
    until(lambda: not alive(server), seconds=3)
    assert alive(escaped)
    said: list[str] = []
    (swept,) = Ledger(bench.state).sweep(said.append)
    assert (swept.run_id, swept.owner_pid, swept.killed, swept.left) == (
        bench.run_id,
        lab.pid,
        (escaped,),
        (),
    )
    assert said == [f"ended 1 processes left by run {bench.run_id}, whose lab is dead"]
    assert not alive(escaped)
    assert bench.ledger_files() == []
    assert Ledger(bench.state).sweep(said.append) == ()


def test_kill_9_with_a_program_that_shed_mark_and_death_signal(bench: Bench) -> None:
    """Then it is found by the ledger's pid and start time, and its children by its session."""
    shed = f"""
import ctypes
if os.environ:
    os.execve(sys.executable, [sys.executable, "-c", open({str(bench.folder / "again.py")!r}).read()], {{}})
"""
    again = f"""{FORK.format(pids=str(bench.pids))}
import ctypes
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
forked(lambda: (note(), time.sleep(60)))
note(); time.sleep(60)
"""
    (bench.folder / "again.py").write_text(again)
    lab, server = drive(bench, shed)
    pids = bench.noted(2)
    assert bench.marked() == []
    lab.kill()
    lab.wait(timeout=10)
    time.sleep(0.2)
    assert all(map(alive, pids))
    assert server in pids
    (swept,) = Ledger(bench.state).sweep(print)
    assert sorted(swept.killed) == sorted(pids)


def test_a_sweep_leaves_a_living_lab_alone(bench: Bench) -> None:
    lab, server = drive(bench, "note(); time.sleep(60)")
    with bench.runtime() as rt:
        mine = rt.start(bench.command("sleep", "60"))
        assert Ledger(bench.state).sweep(print) == ()
        assert alive(server)
        assert alive(mine.pid)
        assert len(bench.ledger_files()) == 2
    assert alive(server)
    lab.send_signal(signal.SIGTERM)
    assert lab.wait(timeout=10) == 143


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    ) as process:
        yield process
        process.kill()


def ledger_file(bench: Bench, **place: str) -> dict[str, object]:
    """A file as the lab writes it, but its owner is dead: another process has the owner's pid now."""
    with bench.runtime() as rt:
        rt.start(bench.command("true"))
        content: dict[str, object] = json.loads(bench.ledger_files()[0].read_text())
    content["owner"] = {"pid": os.getpid(), "start": 1}
    content["place"] = {**content["place"], **place}  # type: ignore[dict-item]
    return content


def write(bench: Bench, content: object) -> Path:
    path = bench.state / "lab-0.json"
    path.write_text(json.dumps(content))
    return path


def test_a_sweep_leaves_a_stranger_with_a_reused_pid_alone(
    bench: Bench, stranger: subprocess.Popen[bytes]
) -> None:
    content = ledger_file(bench)
    path = write(bench, {**content, "processes": [{"name": "server", "pid": stranger.pid, "start": 12345}]})
    (swept,) = Ledger(bench.state).sweep(print)
    assert (swept.killed, swept.left) == ((), ())
    assert alive(stranger.pid)
    assert not path.exists()


@pytest.mark.parametrize(
    ("place", "stays"),
    [
        ({"boot": "before"}, False),
        ({"boot": "b", "host": "elsewhere"}, True),
        ({"pid_namespace": "pid:[1]"}, True),
    ],
)
def test_pids_of_another_place_mean_nothing(
    bench: Bench, stranger: subprocess.Popen[bytes], place: dict[str, str], stays: bool
) -> None:
    start = int(Path(f"/proc/{stranger.pid}/stat").read_text().split()[21])
    content = ledger_file(bench, **place)
    path = write(bench, {**content, "processes": [{"name": "server", "pid": stranger.pid, "start": start}]})
    Ledger(bench.state).sweep(print)
    assert alive(stranger.pid)
    assert path.exists() is stays


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}', "\udcff"])
def test_a_file_that_cannot_be_read_is_said_and_left(bench: Bench, text: str) -> None:
    bench.state.mkdir()
    path = bench.state / "lab-0.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    said: list[str] = []
    assert Ledger(bench.state).sweep(said.append) == ()
    assert "lab-0.json is not a process list of this version" in said[0]
    assert path.exists()


def test_an_empty_or_missing_folder_needs_no_sweep(bench: Bench) -> None:
    assert Ledger(bench.state).sweep(print) == ()


def test_a_ledger_that_cannot_be_written_is_the_users_to_mend(bench: Bench) -> None:
    bench.state.write_text("a file where the folder should be")
    with pytest.raises(LabError, match="cannot be written"), bench.runtime():
        pytest.fail("the block must not be entered")


def test_two_labs_at_once_do_not_disturb_each_other(bench: Bench) -> None:
    first, server_1 = drive(bench, "note(); time.sleep(60)")
    second, server_2 = drive(bench, "note(); time.sleep(60)")
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=10) == 130
    assert not alive(server_1)
    assert alive(server_2)
    assert len(bench.ledger_files()) == 1
    second.kill()
    second.wait(timeout=10)
    Ledger(bench.state).sweep(print)
    assert not alive(server_2)


# ---- ports


def test_free_ports_are_free_and_never_the_same() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


def test_free_ports_where_nearly_all_are_for_outgoing_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.runtime.ports._outgoing_low", lambda: 1024)
    assert len({free_port() for _ in range(50)}) == 50


def test_a_port_in_use_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(LabError, match=f"port {port} cannot be used") as caught:
            require_port(port)
        assert f"held by pid {os.getpid()} (" in str(caught.value)
    require_port(port)
    require_port(port)


def test_a_port_that_one_lab_has_taken_is_not_given_to_another() -> None:
    port = free_port()
    code = f"from lab.runtime.ports import require_port; require_port({port})"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert other.returncode == 1
    assert f"LabError: port {port} cannot be used" in other.stderr
    assert "another lab" in other.stderr


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_a_port_that_does_not_exist(port: int) -> None:
    with pytest.raises(LabError, match="does not exist"):
        require_port(port)


def test_faults_are_one_family() -> None:
    for kind in (DiedWhileStarting, NeverReady, StartFailed, DiedUnderLoad, DeadlinePassed):
        assert issubclass(kind, ProcessFault)
        assert not issubclass(kind, LabError)
    assert issubclass(Terminated, KeyboardInterrupt)
