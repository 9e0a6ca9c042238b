"""CPUs, NUMA nodes and the limits of this process, from Linux's /sys and /proc under a root that may be any folder.

What cannot be read is left out and said in words; nothing here raises for a strange machine. Formats:
Documentation/ABI/stable/sysfs-devices-node, Documentation/admin-guide/cputopology.rst and cgroup-v1/cpusets.rst,
cgroup-v2.rst of the kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lab.hardware.model import Cpu, NumaNode


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the kernel says of the machine."""

    cpus: tuple[Cpu, ...]
    nodes: tuple[NumaNode, ...]
    cpu_model: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What affinity and cgroups leave to this process; None where nothing limits or nothing is said."""

    cpus: frozenset[int] | None
    mems: frozenset[int] | None
    cpu_quota: float | None
    notes: tuple[str, ...]


def parse_list(text: str) -> tuple[int, ...]:
    """`0-3,8` as numbers, sorted; an empty text is no number. Raises ValueError for anything else."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        if not first and not dash:
            continue
        low = int(first)
        high = int(last.partition(":")[0]) if dash else low
        if not 0 <= low <= high < 1_000_000:
            raise ValueError(f"not a list of numbers: {text.strip()!r}")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def format_list(numbers: Iterable[int]) -> str:
    """Numbers as `0-3,8`, the way Linux and docker write CPU sets."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def read_host(root: Path) -> Host:
    """CPUs, SMT siblings, NUMA nodes and distances under `root`."""
    notes: list[str] = []
    folder = root / "sys/devices/system"
    online = _first_list((folder / "cpu/online", folder / "cpu/present"), notes=notes)
    nodes = tuple(_nodes(folder / "node", online=online, root=root, notes=notes))
    node_of = {cpu: node.number for node in nodes for cpu in node.cpus}
    home = nodes[0].number
    lost = [cpu for cpu in online if cpu not in node_of]
    if lost:
        notes.append(f"no NUMA node names CPUs {format_list(lost)}; they are counted to node {home}")
        first = NumaNode(
            number=home,
            cpus=tuple(sorted({*nodes[0].cpus, *lost})),
            memory_mib=nodes[0].memory_mib,
            distances=nodes[0].distances,
        )
        nodes = (first, *nodes[1:])
    cpus = tuple(_cpu(folder / f"cpu/cpu{cpu}/topology", cpu, node=node_of.get(cpu, home)) for cpu in online)
    return Host(cpus=cpus, nodes=nodes, cpu_model=_cpu_model(root), notes=tuple(notes))


def read_limits(root: Path) -> Limits:
    """What affinity and the cgroup, version 1 or 2, leave to the process that reads."""
    notes: list[str] = []
    status = dict(
        line.split(":", 1)
        for line in (_text(root / "proc/self/status") or "").splitlines()
        if line.count(":") == 1
    )
    found: dict[str, list[frozenset[int]]] = {"cpus": [], "mems": []}
    for what, key in (("cpus", "Cpus_allowed_list"), ("mems", "Mems_allowed_list")):
        if key in status:
            found[what].append(frozenset(_numbers(status[key], where=key, notes=notes)))
    for what in found:
        inside = _cpuset(root, what=what, notes=notes)
        if inside is not None:
            found[what].append(inside)
    cpus, mems = (frozenset.intersection(*sets) if sets else None for sets in found.values())
    return Limits(cpus=cpus, mems=mems, cpu_quota=_quota(root), notes=tuple(notes))


def pci_node(root: Path, bus_id: str) -> tuple[int | None, tuple[int, ...]]:
    """NUMA node and near CPUs of a PCI device, None and () where the kernel does not say (it writes -1)."""
    folder = root / "sys/bus/pci/devices" / bus_id
    node = _int(folder / "numa_node")
    cpus = _numbers(_text(folder / "local_cpulist") or "", where="local_cpulist", notes=[])
    return (node if node is not None and node >= 0 else None), cpus


def _nodes(folder: Path, *, online: tuple[int, ...], root: Path, notes: list[str]) -> Iterator[NumaNode]:
    numbers = _numbers(_text(folder / "online") or "", where="node/online", notes=notes)
    if not numbers:
        notes.append("the kernel shows no NUMA nodes; the machine is taken as one node")
        yield NumaNode(number=0, cpus=online, memory_mib=_memory_mib(root / "proc/meminfo"), distances=(10,))
        return
    known = frozenset(online)
    for number in numbers:
        own = folder / f"node{number}"
        text = _text(own / "cpulist")
        if text is None:
            notes.append(f"the CPUs of NUMA node {number} cannot be read")
        cpus = _numbers(text or "", where=f"node{number}/cpulist", notes=notes)
        memory = _memory_mib(own / "meminfo")
        if memory == 0:
            notes.append(f"NUMA node {number} has no memory")
        if text is not None and not cpus:
            notes.append(f"NUMA node {number} has no CPUs")
        words = (_text(own / "distance") or "").split()
        good = len(words) == len(numbers) and all(word.isdigit() for word in words)
        yield NumaNode(
            number=number,
            cpus=tuple(cpu for cpu in cpus if cpu in known),
            memory_mib=memory,
            distances=tuple(map(int, words)) if good else (),
        )


def _cpu(folder: Path, number: int, *, node: int) -> Cpu:
    """A CPU without readable topology counts as a core of its own: nothing is then shared by mistake."""
    siblings = _numbers(_text(folder / "thread_siblings_list") or "", where="siblings", notes=[])
    socket = _int(folder / "physical_package_id")
    core = min((*siblings, number))
    return Cpu(number=number, core=core, socket=max(0, socket or 0), node=node)


def _cpuset(root: Path, *, what: str, notes: list[str]) -> frozenset[int] | None:
    """The cgroup's CPUs or memory nodes. In a container the path of /proc/self/cgroup is often the host's and
    not there, so its parents are tried as well, up to the root that the container sees."""
    for controllers, group in _cgroups(root):
        if "cpuset" in controllers:
            base, names = root / "sys/fs/cgroup/cpuset", (f"cpuset.effective_{what}", f"cpuset.{what}")
        elif not controllers:
            base, names = root / "sys/fs/cgroup", (f"cpuset.{what}.effective", f"cpuset.{what}")
        else:
            continue
        for folder in _upwards(base, group):
            for name in names:
                text = (_text(folder / name) or "").strip()
                if text:
                    numbers = frozenset(_numbers(text, where=name, notes=notes))
                    return numbers or None
    return None


def _quota(root: Path) -> float | None:
    """CPUs' worth of time the cgroup may use: quota over period, the smallest on the way up."""
    found: list[float] = []
    for controllers, group in _cgroups(root):
        if "cpu" in controllers:
            for folder in _upwards(root / "sys/fs/cgroup/cpu", group):
                quota, period = _int(folder / "cpu.cfs_quota_us"), _int(folder / "cpu.cfs_period_us")
                if quota and period and quota > 0:
                    found.append(quota / period)
        elif not controllers:
            for folder in _upwards(root / "sys/fs/cgroup", group):
                words = (_text(folder / "cpu.max") or "").split()
                if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
                    found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _cgroups(root: Path) -> Iterator[tuple[frozenset[str], str]]:
    """Controllers and path of each cgroup this process is in; version 2 has no controllers here."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield frozenset(filter(None, parts[1].split(","))), parts[2]


def _upwards(base: Path, group: str) -> Iterator[Path]:
    pure = PurePosixPath("/", group)
    for path in (pure, *pure.parents):
        if ".." not in path.parts:
            yield base / path.relative_to("/")


def _first_list(files: Iterable[Path], *, notes: list[str]) -> tuple[int, ...]:
    for file in files:
        numbers = _numbers(_text(file) or "", where=file.name, notes=notes)
        if numbers:
            return numbers
    notes.append("the kernel does not say which CPUs there are")
    return ()


def _numbers(text: str, *, where: str, notes: list[str]) -> tuple[int, ...]:
    try:
        return parse_list(text)
    except ValueError:
        notes.append(f"{where} is not a list of numbers: {text.strip()[:60]!r}")
        return ()


def _memory_mib(file: Path) -> int | None:
    for line in (_text(file) or "").splitlines():
        words = line.replace(":", " ").split()
        if "MemTotal" in words and words[-1] == "kB" and words[-2].isdigit():
            return int(words[-2]) // 1024
    return None


def _cpu_model(root: Path) -> str | None:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def _int(file: Path) -> int | None:
    try:
        return int(_text(file) or "")
    except ValueError:
        return None


def _text(file: Path) -> str | None:
    """The file's text; None when it is not there or cannot be read, which for /sys is the same to us."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
