"""The Docker runtime with a real engine: what a container is given, and every way a lab can end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import dockerparts
import httpx
import psutil
import pytest
from dockerbench import Bench, OtherLab, ended
from parts import need

from lab.container import OWNER_LABEL, PORT, PROFILER_CAPABILITIES, RUN_LABEL
from lab.runtime.base import DiedWhileStarting, NeverReady, StartFailed, Waiting
from lab.runtime.contained import Contained
from lab.runtime.docker import sweep
from lab.runtime.engine import Thing, connect
from lab.runtime.owner import Owner, me


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    image = dockerparts.base_image()
    made = Bench(tmp_path, connect(), image=image, docker=dockerparts.docker)
    yield made
    made.check_nothing_left()


def inspected(program: Contained) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(dockerparts.docker("inspect", program.id).stdout)[0]
    return found


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}/health"


# ---- what a program is given


def test_inspect_shows_what_was_asked_for(bench: Bench) -> None:
    """Server and client of a trial, as `docker inspect` tells of them while they run."""
    bench.with_setup(memory_gb=0.5, shm_gb=0.128, ulimits={"stack": 8_388_608})
    cpus = sorted(os.sched_getaffinity(0))
    with bench.runtime() as rt:
        values = rt.values(trial=bench.folder / "trial", scratch=bench.folder / "scratch", port=0)
        server = rt.start(bench.server(cpus=(cpus[0],), mems=(0,)))
        client = rt.start(bench.python("import time; time.sleep(60)", cpus=(cpus[-1],), mems=(0,)))
        port = rt.port_of(server)
        seconds = rt.wait_ready(server, url=url(port), deadline_s=30)
        boxes = {program.name: inspected(program) for program in (server, client)}
        networks = dockerparts.docker("network", "inspect", bench.prefix).stdout
        server_id = server.id
        stopped = rt.stop(server)
    assert values == {"TRIAL": "/trial", "SCRATCH": "/scratch", "PORT": str(PORT)}
    assert 0 < seconds < 30
    assert (stopped.name, stopped.how, stopped.exit_code, stopped.left) == ("server", "SIGINT", -2, ())

    for name, box in boxes.items():
        config, host = box["Config"], box["HostConfig"]
        assert config["User"] == f"{os.getuid()}:{os.getgid()}"
        assert config["Labels"] == {RUN_LABEL: bench.run_id, OWNER_LABEL: me().label()}
        assert (host["Privileged"], host["CapAdd"] or [], host["CapDrop"]) == (False, [], ["ALL"])
        assert (host["Init"], host["SecurityOpt"]) == (True, ["no-new-privileges"])
        assert host["CpusetMems"] == "0"
        assert host["ShmSize"] == 128_000_000
        assert host["Ulimits"] == [{"Name": "stack", "Soft": 8_388_608, "Hard": 8_388_608}]
        assert not host["DeviceRequests"]
        assert not host["Devices"]
        assert "NVIDIA_VISIBLE_DEVICES=void" in config["Env"], f"{name} must not get GPUs unasked"
        mounts = {m["Destination"]: (m["Type"], m["RW"]) for m in box["Mounts"]}  # type: ignore[attr-defined]
        assert mounts == {
            "/trial": ("bind", True),
            "/scratch": ("bind", True),
            "/lab": ("bind", False),
            "/model": ("volume", False),
            "/jit": ("volume", True),
        }
        assert "docker.sock" not in json.dumps(box["Mounts"])
    host = boxes["server"]["HostConfig"]
    assert host["CpusetCpus"] == str(cpus[0])
    assert (host["Memory"], host["MemorySwap"]) == (500_000_000, 500_000_000)
    assert host["NetworkMode"] == bench.prefix
    assert host["PortBindings"] == {f"{PORT}/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}
    ports = boxes["server"]["NetworkSettings"]["Ports"]
    assert ports == {f"{PORT}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
    host = boxes["client"]["HostConfig"]
    assert host["CpusetCpus"] == str(cpus[-1])
    assert (host["Memory"], host["PortBindings"] or {}) == (0, {})
    assert host["NetworkMode"] == f"container:{server_id}"
    assert json.loads(networks)[0]["Driver"] == "bridge"
    assert bench.said == []


def test_what_a_program_sees(bench: Bench) -> None:
    """CPUs, user, folders, environment and streams, from within."""
    (bench.folder / "lab" / "text").write_text("the lab's")
    cpu = max(os.sched_getaffinity(0))
    code = """if True:
        import os, sys
        from pathlib import Path
        def may(path):
            try: Path(path, "new").write_text("x"); return True
            except OSError: return False
        names = "CpuEff", "CapEff", "CapPrm", "NoNewPrivs", "Cpus_allowed_list", "Mems_allowed_list"
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(status["Cpus_allowed_list"].strip(), status["Mems_allowed_list"].strip(), int(status["CapEff"], 16))
        print(status["NoNewPrivs"].strip(), os.getuid(), os.getgid(), os.getcwd())
        print([may(path) for path in ("/trial", "/scratch", "/jit", "/model", "/lab")])
        print(Path("/lab/text").read_text(), os.listdir("/model"), os.environ["NVIDIA_VISIBLE_DEVICES"])
        print("to stderr", file=sys.stderr)
        """
    with bench.runtime() as rt:
        program = rt.start(bench.python(code, cpus=(cpu,), mems=(0,)))
        ended(lambda: program.exit_code() is not None)
        assert rt.stop(program).how == "already"
    assert bench.log("client").splitlines() == [
        f"{cpu} 0 0",
        f"1 {os.getuid()} {os.getgid()} /scratch",
        "[True, True, True, False, False]",
        "the lab's ['config.json'] void",
        "to stderr",
    ]
    for file in (bench.folder / "trial" / "new", bench.folder / "jit" / "new"):
        assert (file.stat().st_uid, file.stat().st_gid) == (os.getuid(), os.getgid())


def test_the_client_reaches_the_server_over_loopback(bench: Bench) -> None:
    code = f"""if True:
        import urllib.request
        print(urllib.request.urlopen("http://127.0.0.1:{PORT}/health").status)
        """
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server())
        rt.wait_ready(server, url=url(rt.port_of(server)), deadline_s=30)
        client = rt.start(bench.python(code))
        ended(lambda: client.exit_code() is not None)
    assert bench.log("client") == "200\n"


def test_the_port_is_open_on_loopback_only(bench: Bench) -> None:
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server())
        port = rt.port_of(server)
        rt.wait_ready(server, url=url(port), deadline_s=30)
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port}
    assert listening == {"127.0.0.1"}


def test_nsys_needs_nothing_and_counters_one_capability(bench: Bench) -> None:
    held = {}
    with bench.runtime() as rt:
        for profiler in PROFILER_CAPABILITIES:
            name = profiler or "none"
            program = rt.start(bench.command("sleep", "60", name=name, profiler=profiler))
            host = inspected(program)["HostConfig"]
            assert host["Privileged"] is False
            held[profiler] = host["CapAdd"] or []
            rt.stop(program, grace_s=0.5)
    # an engine may write CAP_ before the name
    assert {key: [str(c).removeprefix("CAP_") for c in caps] for key, caps in held.items()} == {  # type: ignore[attr-defined]
        "": [],
        "nsys": [],
        "nsys-gpu-metrics": ["SYS_ADMIN"],
        "ncu": ["SYS_ADMIN"],
    }


def as_user(uid: int, gid: int, work: Callable[[], None]) -> int:
    """Do `work` in a forked child that is another user, who may use the engine's socket; its exit code."""
    socket_gid = Path("/var/run/docker.sock").stat().st_gid
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([socket_gid])
            os.setgid(gid)
            os.setuid(uid)
            work()
            code = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_files_belong_to_whoever_runs_the_lab(bench: Bench) -> None:
    need(os.getuid() == 0, "only root can become another user")
    need("DOCKER_HOST" not in os.environ, "the engine on its usual socket")
    uid, gid = 12_345, 23_456
    code = "open('/trial/written', 'w').write('x'); open('/jit/written', 'w').write('x')"
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        folder = Path(name)
        other = Bench(folder, bench.engine, image=bench.setup.image, docker=bench.docker)
        bench.run_ids += other.run_ids
        for place in (folder, folder / "trial", folder / "scratch"):
            os.chown(place, uid, gid)

        def work() -> None:
            with other.runtime() as rt:
                program = rt.start(other.python(code))
                ended(lambda: program.exit_code() is not None)
                assert program.exit_code() == 0, program.log_end()

        assert as_user(uid, gid, work) == 0
        for file in ("trial/written", "trial/client.log", "jit/written"):
            status = (folder / file).stat()
            assert (status.st_uid, status.st_gid) == (uid, gid), file


# ---- ending


def test_a_program_that_ignores_signals_is_killed(bench: Bench) -> None:
    code = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('on'); time.sleep(60)"
    with bench.runtime() as rt:
        program = rt.start(bench.python(code))
        ended(lambda: bench.log("client") == "on\n")
        stopped = rt.stop(program, grace_s=0.3)
        assert rt.stop(program) is stopped
        assert bench.left() == [bench.prefix, f"{bench.prefix}-jit", f"{bench.prefix}-model"]
    assert (stopped.how, stopped.exit_code, stopped.left) == ("SIGKILL", -9, ())


def test_children_end_with_their_program(bench: Bench) -> None:
    """Also those that left its session: the container's first process is an init, and its end the end of all."""
    marker = f"{uuid.uuid4().int % 10**12}"
    code = f"import subprocess, time; subprocess.Popen(['sleep', '{marker}'], start_new_session=True); time.sleep(60)"

    def sleepers() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]

    with bench.runtime() as rt:
        program = rt.start(bench.python(code))
        ended(lambda: bool(sleepers()))
        assert rt.stop(program).how == "SIGINT"
        ended(lambda: sleepers() == [], seconds=5)


def test_exit_codes_and_signals_in_words(bench: Bench) -> None:
    with bench.runtime() as rt:
        three = rt.start(bench.python("raise SystemExit(3)", name="three"))
        killed = rt.start(bench.python("import os; os.kill(os.getpid(), 9)", name="killed"))
        absent = rt.start(bench.command("/no/such/program", name="absent"))
        for program in (three, killed, absent):
            ended(lambda program=program: program.exit_code() is not None)  # type: ignore[misc]
    assert (three.exit_code(), three.ending()) == (3, "ended with exit code 3")
    assert (killed.exit_code(), killed.ending()) == (-9, "was ended by signal 9")
    assert absent.exit_code() == 127
    assert "/no/such/program" in absent.log_end()[-1]


def test_progress_is_told_while_waiting(bench: Bench) -> None:
    said: list[Waiting] = []
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server("time.sleep(0.5)"))
        rt.wait_ready(server, url=url(rt.port_of(server)), deadline_s=30, say=said.append)
    assert said[-1].last_line == "loading"


# ---- a start that fails


@pytest.mark.parametrize("then", ["asked for its port", "joined"])
def test_server_exits_at_once(bench: Bench, then: str) -> None:
    """Whatever is asked of the engine next fails, and the reason is the server's end all the same."""
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.python("raise SystemExit('no such model')", name="server", port=PORT))
        state = "{{.State.Running}}"
        ended(lambda: dockerparts.docker("inspect", "--format", state, server.id).stdout == "false\n")
        client = bench.command("true", name="client")
        asked = {"asked for its port": lambda: rt.port_of(server), "joined": lambda: rt.start(client)}
        with pytest.raises(DiedWhileStarting) as caught:
            asked[then]()
    fault = caught.value
    assert (fault.name, fault.phase) == ("server", "start")
    assert fault.reason == "ended with exit code 1 before it was ready"
    assert fault.last_lines == ("no such model",)


def test_server_exits_while_it_is_waited_for(bench: Bench) -> None:
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        code = "import time; print('loading'); time.sleep(1); raise SystemExit(4)"
        server = rt.start(bench.python(code, name="server", port=PORT))
        port = rt.port_of(server)
        with pytest.raises(DiedWhileStarting, match="ended with exit code 4 before it was ready") as caught:
            rt.wait_ready(server, url=url(port), deadline_s=30)
    assert caught.value.last_lines == ("loading",)


def test_server_is_never_healthy(bench: Bench) -> None:
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server(status=503))
        with pytest.raises(NeverReady, match=r"not ready after 2 s; .* HTTP 503") as caught:
            rt.wait_ready(server, url=url(rt.port_of(server)), deadline_s=2)
        assert server.exit_code() is None
    assert (caught.value.phase, caught.value.last_lines) == ("start", ("loading",))


@pytest.mark.parametrize(
    ("setup", "fields", "reason"),
    [
        ({"image": "sglang-lab/none:0"}, {}, r"the image sglang-lab/none:0 is not there; build it: invoke"),
        ({}, {"cpus": (4095,)}, r"the site's file names CPUs that this machine lacks .*4095"),
        ({}, {"mems": (1023,)}, r"the site's file names NUMA nodes that this machine lacks .*1023"),
        (
            {"gpu_request": "nvidia"},
            {"gpus": ("GPU-1",)},
            r"the engine has no NVIDIA container toolkit: see invoke doctor",
        ),
        ({"lab": "/no/such/folder"}, {}, r"the engine did not start it: .*/no/such/folder"),
    ],
    ids=["image", "cpus", "mems", "toolkit", "folder"],
)
def test_what_the_engine_refuses(
    bench: Bench, setup: dict[str, object], fields: dict[str, object], reason: str
) -> None:
    bench.with_setup(**setup)
    with bench.runtime() as rt:
        with pytest.raises(StartFailed, match=reason) as caught:
            rt.start(bench.command("true", **fields))
        assert not any(name.startswith(f"{bench.prefix}-0") for name in bench.left()), "no container is left"
    assert (caught.value.name, caught.value.phase) == ("server", "start")


def test_a_name_that_is_taken(bench: Bench) -> None:
    taken = f"{bench.prefix}-000-server"
    image = bench.setup.image
    dockerparts.docker("create", "--name", taken, "--network", "none", image, "true")
    try:
        with bench.runtime() as rt:
            with pytest.raises(StartFailed, match="a container of that name exists: see docker ps --all"):
                rt.start(bench.command("true"))
            assert taken in dockerparts.docker("ps", "--all", "--format", "{{.Names}}").stdout
    finally:
        dockerparts.docker("rm", taken)


def test_a_fixed_port_that_is_in_use(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, bench.runtime() as rt:
        port = listener.getsockname()[1]
        rt.values(trial=bench.folder, scratch=bench.folder, port=port)
        with pytest.raises(StartFailed, match=f"port {port} .* is in use") as caught:
            rt.start(bench.server())
        assert caught.value.phase == "start"


def test_a_fixed_port_that_is_free(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=port)
        server = rt.start(bench.server())
        assert rt.port_of(server) == port
        rt.wait_ready(server, url=url(port), deadline_s=30)


# ---- a lab that ends


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_end_the_lab_leaves_nothing(bench: Bench, signum: signal.Signals, code: int) -> None:
    lab = OtherLab(bench, bench.folder / "other").wait_ready()
    assert len(bench.left()) == 5
    assert lab.end(signum) == code
    assert bench.left() == []


@pytest.mark.timeout(30)
def test_a_second_ctrl_c_does_not_wait_for_the_grace_period(bench: Bench) -> None:
    """There are two of 20 s each."""
    code = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('on'); time.sleep(100)"
    stopped = []

    def interrupted() -> None:
        with bench.runtime() as rt:
            program = rt.start(bench.python(code))
            stopped.append(program)
            ended(lambda: bench.log("client") == "on\n")
            again = f"sleep 1; kill -INT {os.getpid()}"
            stopped.append(subprocess.Popen(["sh", "-c", again]))
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the first one was not heard")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    program, again = stopped
    assert again.wait() == 0
    assert program.stopped.how == "SIGKILL"


def test_two_labs_at_once_and_a_sweep_after_kill_9(bench: Bench) -> None:
    """The sweep removes what the dead lab left, and nothing of the living one."""
    first, second = OtherLab(bench, bench.folder / "a"), OtherLab(bench, bench.folder / "b")
    try:
        for lab in (first, second):
            lab.wait_ready()
        assert len(bench.left()) == 10
        assert first.end(signal.SIGKILL) == -9
        assert len(bench.left()) == 10, "nobody was there to remove it"
        removed = {thing.name for thing in sweep(bench.engine, bench.said.append)}
        names = {f"{first.prefix}{end}" for end in ("", "-000-server", "-001-client", "-model", "-jit")}
        assert names <= removed
        assert not any(name.startswith(second.prefix) for name in removed)
        assert {name for name in bench.left() if name.startswith(first.prefix)} == set()
        assert len(bench.left()) == 5
        folder = bench.folder / "b" / "trial" / "client.log"
        assert folder.parent.exists(), "a volume that is a folder goes without it"
    finally:
        assert second.end() == 130
    assert bench.said == []


def volume(label: str | None, name: str) -> str:
    words = () if label is None else ("--label", f"{OWNER_LABEL}={label}")
    dockerparts.docker("volume", "create", "--label", f"{RUN_LABEL}=x", *words, name)
    return name


def test_a_sweep_takes_only_what_is_known_to_be_dead(bench: Bench) -> None:
    here = me()
    with subprocess.Popen(["true"]) as ended_process:
        pid = ended_process.pid

    def owner(**changes: object) -> str:
        fields = {"pid": pid, "start": 1, "host": here.host, "boot": here.boot}
        fields |= {"pid_namespace": here.pid_namespace}
        return Owner(**{**fields, **changes}).label()  # type: ignore[arg-type]

    mark = uuid.uuid4().hex[:8]
    stays = {
        "no-owner": None,
        "not-a-label": "me",
        "lives": here.label(),
        "another-host": owner(host="elsewhere", boot="another"),
        "another-namespace": owner(pid_namespace="pid:[1]"),
    }
    goes = {"dead": owner(), "pid-in-use-again": owner(pid=here.pid), "rebooted": owner(boot="before")}
    made = {key: volume(label, f"lab-sweep-{mark}-{key}") for key, label in {**stays, **goes}.items()}
    try:
        sweep(bench.engine, bench.said.append)
        text = dockerparts.docker("volume", "ls", "--format", "{{.Name}}").stdout.split()
        assert {key for key, name in made.items() if name in text} == set(stays)
    finally:
        dockerparts.docker("volume", "rm", "--force", *made.values())
    assert bench.said == []


def test_what_cannot_be_removed_is_said(bench: Bench) -> None:
    """A volume that a container of somebody else uses."""
    with subprocess.Popen(["true"]) as gone:
        here = me()
        dead = Owner(pid=gone.pid, start=1, host=here.host, boot=here.boot, pid_namespace=here.pid_namespace)
    name = volume(dead.label(), f"lab-sweep-{uuid.uuid4().hex[:8]}")
    user = dockerparts.docker(
        "create", "--network", "none", "--mount", f"type=volume,source={name},target=/x",
        bench.setup.image, "true",
    ).stdout.strip()  # fmt: skip
    try:
        assert name not in {thing.name for thing in sweep(bench.engine, bench.said.append)}
        assert f"could not remove volume {name}" in bench.said[0]
        assert "in use" in bench.said[0]
    finally:
        dockerparts.docker("rm", user)
        dockerparts.docker("volume", "rm", name)


def test_a_lab_with_no_server_yet_leaves_nothing(bench: Bench) -> None:
    def broken() -> None:
        with bench.runtime():
            assert len(bench.left()) == 3
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        broken()
    assert bench.left() == []


def test_a_model_that_is_not_there(bench: Bench) -> None:
    """The engine notices when a container wants the volume; the block still leaves nothing."""
    bench.with_setup(model=str(bench.folder / "no-model"))
    with bench.runtime() as rt, pytest.raises(StartFailed, match="no-model"):
        rt.start(bench.command("true"))


def test_the_published_port_answers_from_here(bench: Bench) -> None:
    with bench.runtime() as rt:
        rt.values(trial=bench.folder, scratch=bench.folder, port=0)
        server = rt.start(bench.server())
        port = rt.port_of(server)
        rt.wait_ready(server, url=url(port), deadline_s=30)
        assert httpx.get(url(port), trust_env=False).status_code == 200
        client = rt.start(bench.command("true", name="client"))
        ended(lambda: client.exit_code() == 0)


@pytest.mark.parametrize("kind", ["container", "network", "volume"])
def test_what_is_gone_already_is_no_error(bench: Bench, kind: str) -> None:
    """Two labs that sweep at once both look at the same thing, and one of them removes it first."""
    bench.engine.remove(Thing(kind=kind, id="sglang-lab-gone", name="sglang-lab-gone", labels={}))


def test_a_signal_for_who_has_ended_is_no_error(bench: Bench) -> None:
    bench.engine.signal("sglang-lab-gone", "SIGINT")
    with bench.runtime() as rt:
        program = rt.start(bench.python("pass"))
        assert program.ended.wait(30)
        bench.engine.signal(program.id, "SIGINT")
    assert bench.engine.said("sglang-lab-gone") == ""
