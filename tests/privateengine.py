"""Docker engines of a test's own, which it may kill: beside the machine's engine, and gone with the test.

An engine and all its containers live in a PID and mount namespace that a keeper process holds. The keeper reads from
the test until the pipe closes, be it because the test is done or because somebody killed it; then it ends the
namespace and removes what is left outside: bridges, cgroups, the folder. Only root can do that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("dockerd", "containerd", "runc", "docker-init", "unshare", "nsenter", "ip")
# Where engines keep sockets and mounts whatever they are told; in the namespace each has its own.
SHARED_FOLDERS = ("/run/containerd", "/run/docker")
CGROUPS = Path("/sys/fs/cgroup")


class PrivateEngine:
    """An engine below `folder`, with its socket, images, networks and containers; `pid` is the namespace's first."""

    def __init__(self, folder: Path, *, pid: int, settings: dict[str, object], path: str) -> None:
        self.folder = folder
        self.host = f"unix://{folder}/docker.sock"
        self.settings = settings
        self._pid = pid
        self._path = path
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        (self.folder / "pid").unlink(missing_ok=True)  # pids of the namespace come again
        (self.folder / "daemon.json").write_text(json.dumps(self.settings))
        words = ["nsenter", "--target", str(self._pid), "--pid", "--mount", "--"]
        words += ["dockerd", "--config-file", str(self.folder / "daemon.json")]
        with (self.folder / "dockerd.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                words, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PATH": self._path}
            )
        until(lambda: self.docker("version", check=False).returncode == 0, seconds=60, what=self.log_end)

    def kill(self) -> None:
        """SIGKILL the engine; its containers run on."""
        assert self._daemon is not None
        children = Path(f"/proc/{self._daemon.pid}/task/{self._daemon.pid}/children").read_text().split()
        for child in children:  # nsenter's child is dockerd
            os.kill(int(child), signal.SIGKILL)
        self._daemon.wait(timeout=30)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def docker(
        self, *words: str, check: bool = True, stdin: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the docker client against it."""
        env = {**os.environ, "DOCKER_HOST": self.host}
        return subprocess.run(
            ["docker", *words], env=env, stdin=stdin, capture_output=True, text=True, check=check
        )

    def load(self, image: str) -> None:
        """Copy an image of the machine's engine."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saving:
            assert saving.stdout is not None
            self.docker("load", stdin=saving.stdout.fileno())

    def log_end(self) -> str:
        """The end of its log."""
        return (self.folder / "dockerd.log").read_text()[-2000:]


@contextmanager
def private_engine(
    *, image: str = "", path: tuple[Path, ...] = (), **settings: object
) -> Iterator[PrivateEngine]:
    """A started engine that has `image`; `settings` join its daemon.json, `path` its program search path."""
    folder = Path(tempfile.mkdtemp(prefix="lab-engine-"))
    subnet = _free_subnet()
    keeper = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(subnet)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the test; the keeper ends after it
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        engine = PrivateEngine(
            folder,
            pid=int(keeper.stdout.readline()),
            settings={
                "data-root": str(folder / "root"),
                "exec-root": str(folder / "exec"),
                "pidfile": str(folder / "pid"),
                "hosts": [f"unix://{folder}/docker.sock"],
                "bridge": "none",
                "iptables": False,  # an engine with its own rules takes away another's
                "ip-forward": False,
                "default-address-pools": [{"base": str(subnet), "size": 27}],
                "cgroup-parent": f"/{folder.name}",
                "log-level": "warn",
                "shutdown-timeout": 2,
                **settings,
            },
            path=os.pathsep.join((*map(str, path), os.environ.get("PATH", os.defpath), "/usr/sbin")),
        )
        engine.start()
        if image:
            engine.load(image)
        yield engine
    finally:
        keeper.stdin.close()
        keeper.wait(timeout=60)
        keeper.stdout.close()


def missing() -> str:
    """What this machine lacks for a private engine, in words; empty when it has everything."""
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    absent = [tool for tool in TOOLS if shutil.which(tool, path=search) is None]
    if absent:
        return f"no {', '.join(absent)}"
    if os.getuid() != 0:
        return "only root can start an engine in a namespace"
    words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(words, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


def until(
    done: Callable[[], bool], *, seconds: float = 20.0, what: Callable[[], str] = lambda: "waited in vain"
) -> None:
    """Return when `done` says so; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


def _free_subnet() -> ipaddress.IPv4Network:
    """A /24 that no interface of this machine has."""
    text = subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, text=True, check=True).stdout
    taken = {ipaddress.ip_address(a["local"]) for link in json.loads(text) for a in link["addr_info"]}
    candidates = [ipaddress.IPv4Network(f"10.213.{n}.0/24") for n in range(256)]
    start = os.getpid() % 256  # so that two test runs do not choose the same
    for subnet in candidates[start:] + candidates[:start]:
        if not any(address in subnet for address in taken):
            return subnet
    raise AssertionError("no free subnet")


# ---- the keeper


def _keep(folder: Path, subnet: str) -> None:
    mounts = [f"mkdir -p {place} && mount -t tmpfs tmpfs {place}" for place in SHARED_FOLDERS]
    script = " && ".join([*mounts, "exec docker-init -- sleep infinity"])
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--propagation", "slave", "--kill-child"]
    with (
        (folder / "keeper.log").open("wb") as log,
        subprocess.Popen([*words, "sh", "-c", script], stdin=subprocess.DEVNULL, stderr=log) as namespace,
    ):
        children = Path(f"/proc/{namespace.pid}/task/{namespace.pid}/children")
        until(lambda: bool(children.read_text().split()))
        first = int(children.read_text().split()[0])
        until(lambda: _name(first) == "docker-init")
        print(first, flush=True)
        sys.stdin.read()
        os.kill(first, signal.SIGKILL)  # and the kernel everything else in there, before this is reaped
    for link in _bridges(ipaddress.IPv4Network(subnet)):
        subprocess.run(["ip", "link", "delete", link], check=False)
    _remove_cgroups(folder.name)
    shutil.rmtree(folder, ignore_errors=True)


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _bridges(subnet: ipaddress.IPv4Network) -> list[str]:
    text = subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, text=True, check=True).stdout
    return [
        link["ifname"]
        for link in json.loads(text)
        if link["ifname"].startswith("br-")
        and any(ipaddress.ip_address(a["local"]) in subnet for a in link["addr_info"])
    ]


def _remove_cgroups(name: str) -> None:
    for top in [*CGROUPS.glob(f"*/{name}"), CGROUPS / name]:
        folders = [top, *(p for p in top.rglob("*") if p.is_dir())]
        for folder in sorted(folders, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):  # also where the controller is linked under two names
                folder.rmdir()


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), sys.argv[2])
