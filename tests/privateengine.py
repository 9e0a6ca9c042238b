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
import re
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
                # Told to have no bridge, or to have address pools of its own, an engine deletes docker0, which is
                # another's (configureNetworking in moby's daemon/daemon_unix.go).
                "bridge": _bridge(folder),
                "iptables": False,  # an engine with its own rules takes away another's
                "ip-forward": False,
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
    taken = {address for addresses in _addresses().values() for address in addresses}
    candidates = [ipaddress.IPv4Network(f"10.213.{n}.0/24") for n in range(256)]
    start = os.getpid() % 256  # so that two test runs do not choose the same
    for subnet in candidates[start:] + candidates[:start]:
        if not any(address in subnet for address in taken):
            return subnet
    raise AssertionError("no free subnet")


def _bridge(folder: Path) -> str:
    """The name of the engine's own bridge."""
    return f"lab-{folder.name[-8:]}"


# ---- the keeper


def _keep(folder: Path, subnet: ipaddress.IPv4Network) -> None:
    address = f"{subnet.network_address + 1}/{subnet.prefixlen}"
    for words in (
        ("link", "add", "name", _bridge(folder), "type", "bridge"),
        ("address", "add", address, "dev", _bridge(folder)),
        ("link", "set", _bridge(folder), "up"),
    ):
        subprocess.run(["ip", *words], check=True)
    try:
        _hold_namespace(folder)
    finally:
        for link in (_bridge(folder), *_bridges(folder)):
            subprocess.run(["ip", "link", "delete", link], check=False, stderr=subprocess.DEVNULL)
        _remove_cgroups(folder.name)
        shutil.rmtree(folder, ignore_errors=True)


def _hold_namespace(folder: Path) -> None:
    """Until the test closes the pipe."""
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


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _bridges(folder: Path) -> set[str]:
    """The bridges of networks that the engine ever had, from its own notes."""
    notes = folder / "root" / "network" / "files" / "local-kv.db"
    content = notes.read_bytes() if notes.exists() else b""
    return {name.decode() for name in re.findall(rb"br-[0-9a-f]{12}", content)}


def _addresses() -> dict[str, list[ipaddress.IPv4Address]]:
    """The addresses of each of this machine's network interfaces."""
    words = ["ip", "-json", "-4", "address"]
    links = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return {
        link["ifname"]: [ipaddress.IPv4Address(a["local"]) for a in link["addr_info"]]
        for link in links
        if link  # ip prints {} for what it leaves out
    }


def _remove_cgroups(name: str) -> None:
    for top in [*CGROUPS.glob(f"*/{name}"), CGROUPS / name]:
        folders = [top, *(p for p in top.rglob("*") if p.is_dir())]
        for folder in sorted(folders, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):  # also where the controller is linked under two names
                folder.rmdir()


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), ipaddress.IPv4Network(sys.argv[2]))
