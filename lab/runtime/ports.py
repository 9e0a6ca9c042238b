"""Ports on this machine's loopback: a free one for a server that is about to start, or a check of the one
that was asked for. A number goes out only once, also to other labs on the machine, until the lab that took it
ends."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from lab.errors import LabError

_LOOPBACK = "127.0.0.1"
_LOWEST = 20_000
_TRIES = 1_000
_claims: dict[int, socket.socket] = {}


def free_port() -> int:
    """A TCP port that nothing on the loopback uses, never the same twice.

    Taken from below the range that the kernel gives to outgoing connections where there is room, so that a
    client cannot take it as its own source port before the server has bound it.
    """
    low = _outgoing_low()
    for _ in range(_TRIES):
        port = _LOWEST + secrets.randbelow(low - _LOWEST) if low > _LOWEST + _TRIES else _any_port()
        if _can_bind(port) and _claim(port):
            return port
    raise LabError(
        f"no free port found in {_TRIES} tries",
        why="other programs use the ports of this machine's loopback",
        fix="end some of them; `ss -ltn` lists who listens",
    )


def require_port(port: int) -> None:
    """Take this port for the lab, or raise `LabError` that says who has it."""
    if not 1 <= port <= 65_535:
        raise LabError(
            f"port {port} does not exist", why="a TCP port is 1 to 65535", fix="choose another port"
        )
    if port not in _claims and not (_can_bind(port) and _claim(port)):
        owner = holder(port)
        who = describe(owner) if owner else "another lab, or a program that this user may not see"
        raise LabError(
            f"port {port} cannot be used", why=f"held by {who}", fix="end it, or choose another port"
        )


def holder(port: int) -> int | None:
    """The pid that listens on this TCP port, or None when nobody does or it is not visible to this user."""
    with contextlib.suppress(psutil.AccessDenied):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and port in connection.laddr and connection.pid:
                return connection.pid
    return None


def describe(pid: int) -> str:
    """A pid with its command line, as far as it can be seen."""
    try:
        command = " ".join(psutil.Process(pid).cmdline())[:200]
    except psutil.Error:
        command = ""
    return f"pid {pid} ({command or 'command not visible'})"


def loopback_port(url: str) -> int:
    """The port of an `http://` URL on this machine's loopback; `LabError` for any other URL."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or port is None or not _is_loopback(parts.hostname or ""):
        raise LabError(
            f"{url} is not on this machine's loopback",
            why="the lab talks only to servers that it started here, over http with an explicit port",
            fix=f"use http://{_LOOPBACK}:PORT/...",
        )
    return port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _outgoing_low() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 0


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        # as servers do: connections that have just ended do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True


def _claim(port: int) -> bool:
    """Mark the port as taken for all labs in this network namespace.

    An abstract Unix socket name (unix(7)) can be bound once, needs no file, and vanishes with the process.
    """
    if port in _claims:
        return False
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0sglang-lab/port/{port}")
    except OSError:
        claim.close()
        return False
    _claims[port] = claim
    return True
