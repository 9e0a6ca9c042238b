"""Events into a file without holding up who notes them: `put` appends to a bounded queue, a thread encodes and writes
whole lines a few times a second. What does not fit, into the queue or onto the disk, is counted, never waited for."""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from labprobe.schema import EVENTS

INTERVAL_S = 0.2
TICK_S = 1.0
# Encoding holds the interpreter's lock; between slices of this many events others get it.
SLICE = 50
SHORT = 12

Event = tuple[object, ...]
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode
# A line with a place for each value: three times as fast as an encoder that also writes the names.
_TEMPLATES = {
    kind: "{" + ",".join(f'"{name}":%s' for name in ("e", "t_ns", *fields)) + "}\n"
    for kind, (_, fields) in EVENTS.items()
}


@lru_cache(maxsize=256)
def _constant(value: str | bool | None) -> str:
    return _encode(value)


def _text(value: object) -> str:
    """Words of the schema and of SGLang are few and come often; ids are many, and a cache of them would only grow."""
    known = value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) < SHORT)
    return _constant(value) if known else _encode(value)


def line(event: Sequence[object]) -> str:
    """An event, (kind, t_ns, *values in the schema's order), as a line of JSON."""
    return _TEMPLATES[str(event[0])] % tuple([v if type(v) is int else _text(v) for v in event])


class Writer:
    """One file of one process. `put` may be called before `open`: the events wait in the queue."""

    def __init__(self, *, limit: int, file_bytes: int, interval_s: float = INTERVAL_S) -> None:
        self.dropped = 0
        self.written = 0
        self.queue_peak = 0
        self._queue: deque[Event] = deque()
        self._limit = limit
        self._room = file_bytes
        self._interval_s = interval_s
        self._file = -1
        self._torn = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._tick: Callable[[], Sequence[Event]] = tuple
        self._errors: Callable[[], int] = int
        self._pid = os.getpid()

    def put(self, event: Event) -> None:
        """Note an event. Never blocks, never raises; one that does not fit is counted in `dropped`."""
        if len(self._queue) < self._limit:
            self._queue.append(event)
        else:
            self.dropped += 1

    def open(
        self,
        path: str,
        header: Mapping[str, object],
        *,
        tick: Callable[[], Sequence[Event]] = tuple,
        errors: Callable[[], int] = int,
    ) -> None:
        """Make the file, write the header, start the thread. `tick` gives events to add once a second."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._write(_encode(dict(header)) + "\n")
        self._tick, self._errors = tick, errors
        self._thread = threading.Thread(target=self._run, name="labprobe", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits and the last counters. Called at the interpreter's exit; SIGKILL skips it."""
        self._stop.set()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        due = 0.0
        while not self._stop.wait(self._interval_s):
            self._drain()
            if time.monotonic() >= due:
                self._once_a_second(end=False)
                due = time.monotonic() + TICK_S
        self._drain()
        self._once_a_second(end=True)
        os.close(self._file)
        self._file = -1

    def _drain(self) -> None:
        """Write what is in the queue now; what comes meanwhile waits for the next turn."""
        left = len(self._queue)
        self.queue_peak = max(self.queue_peak, left)
        while left > 0:
            some = [self._queue.popleft() for _ in range(min(left, SLICE))]
            left -= len(some)
            self._save(some)
            time.sleep(0)

    def _once_a_second(self, *, end: bool) -> None:
        try:
            self._save(self._tick())
        except Exception:  # a reading that fails once is not tried again; events go on
            self._tick = tuple
        now, unix = time.monotonic_ns(), time.time_ns()
        counts = (self.written, self.dropped, self._errors(), self.queue_peak, unix, end)
        self._write(line(("counters", now, *counts)))

    def _save(self, events: Sequence[Event]) -> None:
        lines = [text for text in map(_line_or_nothing, events) if text]
        text = "".join(lines)
        if len(text) <= self._room and self._write(text):
            self._room -= len(text)
            self.written += len(lines)
            self.dropped += len(events) - len(lines)
        else:
            self.dropped += len(events)

    def _write(self, text: str) -> bool:
        """False if the disk did not take all of it. Half a line is ended before the next one begins."""
        data = (b"\n" if self._torn else b"") + text.encode()
        try:
            while data:
                count = os.write(self._file, data)
                self._torn = count < len(data)
                data = data[count:]
        except OSError:
            return False
        return True


def _line_or_nothing(event: Event) -> str:
    try:
        return line(event)
    except Exception:  # an event that does not fit its schema is lost, the others are not
        return ""
