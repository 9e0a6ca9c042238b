"""Rows on what the system allows: hardware counters for profilers, locked memory, CPUs and memory nodes of the cgroup, ports,
access to models. Everything is read under a root that may be any folder; no secret is ever read into a row."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab.doctor.finding import Finding, finding, text_of, value_of
from lab.hardware.model import Hardware
from lab.hardware.sysfs import format_list
from lab.models import Model
from lab.runtime.ports import describe, holder
from lab.stack import Stack
from lab.weights import hub_cache, snapshots

SYS_ADMIN, PERFMON = 21, 38  # bits of CapEff, by include/uapi/linux/capability.h
PARANOID_LIMIT = 2  # above, perf_event_open is closed to users: Documentation/admin-guide/sysctl/kernel.rst
MEMLOCK_BYTES = 2**30


def counters(*, root: Path, in_containers: bool) -> Finding:
    """May ncu, and nsys for GPU metrics, read the GPU's counters? `in_containers` tells that profiled servers run in
    containers, which the lab gives CAP_SYS_ADMIN."""
    asked = value_of(root / "proc/driver/nvidia/params", "RmProfilingAdminOnly")
    closed = asked != "0"
    admin = _capable(root, SYS_ADMIN)
    state = {"0": "open to every user", "1": "closed to users (RmProfilingAdminOnly 1)"}.get(
        asked or "", "not known: /proc/driver/nvidia/params does not say"
    )
    state += "; this process has CAP_SYS_ADMIN" if closed and admin else ""
    state += "; containers of profiled trials get CAP_SYS_ADMIN" if closed and in_containers else ""
    return finding(
        "GPU counters for profilers",
        good=not closed or admin or in_containers,
        state=state,
        matters="ncu and nsys --gpu-metrics need them (ERR_NVGPUCTRPERM); tracing kernels does not",
        fix="put 'options nvidia NVreg_RestrictProfilingToAdminUsers=0' into /etc/modprobe.d/nvidia-profiling.conf "
        "and restart the machine",
    )


def perf_events(*, root: Path) -> Iterator[Finding]:
    """May nsys sample the CPU? Nothing where the kernel does not say."""
    text = (text_of(root / "proc/sys/kernel/perf_event_paranoid") or "").strip()
    if not text.lstrip("-").isdigit():
        return
    able = _capable(root, SYS_ADMIN) or _capable(root, PERFMON)
    yield finding(
        "CPU sampling for profilers",
        good=int(text) <= PARANOID_LIMIT or able,
        state=f"perf_event_paranoid {text}{', and this process may all the same' if able else ''}",
        matters=f"nsys samples CPUs only at {PARANOID_LIMIT} or less; tracing the GPU does not need it",
        fix=f"sudo sysctl kernel.perf_event_paranoid={PARANOID_LIMIT}",
    )


def dcgm(*, root: Path) -> Finding:
    """Does NVIDIA's monitor hold the counters, of which there is one client at a time?"""
    pids = [
        int(comm.parent.name)
        for comm in (root / "proc").glob("[0-9]*/comm")
        if (text_of(comm) or "").strip() == "nv-hostengine"
    ]
    return finding(
        "DCGM",
        good=not pids,
        state=f"nv-hostengine runs (pid {', '.join(map(str, sorted(pids)))})" if pids else "not in sight",
        matters="while it reads profiling counters, ncu and nsys --gpu-metrics cannot",
        fix="dcgmi profile --pause before a profiled run, dcgmi profile --resume after it",
    )


def memlock(*, root: Path) -> Iterator[Finding]:
    """How much memory a process may lock; nothing where the kernel does not say."""
    for line in (text_of(root / "proc/self/limits") or "").splitlines():
        if line.startswith("Max locked memory"):
            soft = line.removeprefix("Max locked memory").split()[0]
            good = soft == "unlimited" or (soft.isdigit() and int(soft) >= MEMLOCK_BYTES)
            state = soft if not soft.isdigit() else f"{int(soft) / 2**20:g} MiB"
            yield finding(
                "locked memory",
                good=good,
                state=state,
                matters="NCCL locks buffers that network cards read; containers of the lab have no such limit",
                fix="ulimit -l unlimited, or '* - memlock unlimited' in /etc/security/limits.conf",
            )


def cpuset(hardware: Hardware) -> Iterator[Finding]:
    """What the cgroup leaves of CPUs and memory nodes, against where the GPUs are; nothing where nothing is limited."""
    cpus, mems = set(hardware.cpus_allowed), set(hardware.mems_allowed)
    limited = len(cpus) < len(hardware.cpus) or len(mems) < len(hardware.nodes)
    if not limited and hardware.cpu_quota is None:
        return
    state = [f"CPUs {format_list(cpus)} of {len(hardware.cpus)}, memory nodes {format_list(mems)}"]
    far = {
        gpu.index: gpu.numa_node
        for gpu in hardware.gpus
        if gpu.numa_node is not None
        and (
            gpu.numa_node not in mems
            or not any(cpu.node == gpu.numa_node for cpu in hardware.cpus if cpu.number in cpus)
        )
    }
    if far:
        gpus, nodes = format_list(far), format_list(node for node in far.values() if node is not None)
        state.append(f"GPUs {gpus} sit on node {nodes}, of which this process may not use CPUs and memory")
    quota = hardware.cpu_quota
    if quota is not None:
        state.append(f"the time of {quota:g} CPUs only: programs are stopped when it is used up")
    yield finding(
        "cgroup limits",
        good=not far and (quota is None or quota >= len(cpus)),
        state="; ".join(state),
        matters="a server far from its GPU's memory, or stopped by a quota, measures the limit",
        fix="start this container or job with CPUs and memory nodes of the GPUs (--cpuset-cpus, --cpuset-mems), "
        "without a quota (--cpus)",
    )


def port(number: int, *, site: str) -> Iterator[Finding]:
    """The port that a site's file asks for; nothing where any free one will do."""
    if not number:
        return
    free = _can_listen(number)
    owner = None if free else holder(number)
    who = "free" if free else describe(owner) if owner else "held by a program that this user may not see"
    yield finding(
        f"port {number}",
        good=free,
        state=who,
        matters=f"site {site} wants its server there",
        fix="end that program, or take another port or none in the site's file",
        blocks=True,
    )


def _can_listen(number: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def model_access(
    models: Sequence[Model], *, stacks: Sequence[Stack], env: Mapping[str, str], home: Path
) -> Finding:
    """Where the models come from, and whether anything is looked up on a hub. Says whether a token is there, never what."""
    hub = hub_cache(env, home=home)
    here = [m.name for m in models if m.source == "hub" and any(snapshots(m, hub=hub).glob("*/config.json"))]
    away = [m.name for m in models if m.source == "hub" and m.name not in here]
    words = [f"{model.name} is made here, not gated" for model in models if model.source == "built"]
    words += [f"in the Hugging Face cache: {', '.join(here)}"] if here else []
    words += [f"not on this machine: {', '.join(away)} (invoke models says how to get them)"] if away else []
    online = [stack.name for stack in stacks if dict(stack.env).get("HF_HUB_OFFLINE") != "1"]
    words.append(f"stacks {', '.join(online)} may ask a hub" if online else "servers ask no hub (offline)")
    words.append(
        "a hub token is set, the lab does not use it"
        if _has_token(env, home)
        else "no hub token, none needed"
    )
    return finding(
        "model access",
        good=not online,
        state="; ".join(words),
        matters="a server that waits for a download is no measurement",
        fix="set HF_HUB_OFFLINE in the stack's file" if online else "",
    )


def _has_token(env: Mapping[str, str], home: Path) -> bool:
    """By huggingface_hub's own rules: two variables, or a file in HF_HOME. The file is not read."""
    if any(env.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    folder = Path(env.get("HF_HOME") or home / ".cache/huggingface")
    return Path(env.get("HF_TOKEN_PATH") or folder / "token").exists()


def _capable(root: Path, bit: int) -> bool:
    try:
        return bool(int(value_of(root / "proc/self/status", "CapEff") or "0", 16) >> bit & 1)
    except ValueError:
        return False
