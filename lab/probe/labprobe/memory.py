"""What the allocators of this process hold: an event's values come out. torch's caching allocator where a GPU is in
use, glibc's otherwise. Runs on the writer's thread, once a second."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

PAGE = os.sysconf("SC_PAGE_SIZE")
FIELDS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def figures(device: int | None) -> tuple[object, ...]:
    """source, rss, allocated, reserved, peak bytes, retries and ooms, as the schema's "memory"; None where unknown."""
    rss = _rss_bytes()
    torch = sys.modules.get("torch")
    if device is not None and torch is not None and torch.cuda.is_initialized():
        stats = torch.cuda.memory_stats(device)
        names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "allocated_bytes.all.peak")
        return ("cuda", rss, *map(stats.get, names), stats.get("num_alloc_retries"), stats.get("num_ooms"))
    info = _mallinfo2()
    if info is None:
        return ("none", rss, None, None, None, None, None)
    return ("malloc", rss, info.uordblks + info.hblkhd, info.arena + info.hblkhd, None, None, None)


def _rss_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE


@cache
def _function() -> object | None:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    function.restype = _Mallinfo2
    return function


def _mallinfo2() -> _Mallinfo2 | None:
    function = _function()
    return function() if function is not None else None
