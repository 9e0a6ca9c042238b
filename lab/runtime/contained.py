"""One program in a container: a thread waits for its end at the engine, so that asking whether it has ended costs
nothing while something is being measured, and the engine may come and go meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

from lab.runtime.base import Stopped
from lab.runtime.engine import Engine, EngineError, EngineGone, State
from lab.runtime.logtail import last_lines

_SIGNAL_BASE = 128  # a container ended by signal n has exit code 128 + n
_ASK_AGAIN_S = 0.25
_OOM = "the kernel killed a process of its container for want of memory"
_LOST = 125  # what docker itself exits with when it cannot say how a container ended


class Contained:
    """A started container; only `DockerRuntime` makes and stops it. `lost_s` seconds without an answer of the
    engine count as the program's end: nothing can be said about it any more."""

    def __init__(
        self, *, name: str, container: str, container_id: str, log: Path, engine: Engine, lost_s: float
    ) -> None:
        self.container = container
        self.id = container_id
        self.stopped: Stopped | None = None
        self._name = name
        self._log = log
        self._engine = engine
        self._lost_s = lost_s
        self._code: int | None = None
        self._state: State | None = None
        self._gone_since: float | None = None
        self._was_away = False
        self._gone_why = ""
        self.ended = threading.Event()
        threading.Thread(target=self._watch, name=f"wait for {container}", daemon=True).start()

    @property
    def name(self) -> str:
        """The command's name."""
        return self._name

    @property
    def log(self) -> Path:
        """The command's log."""
        return self._log

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the program runs."""
        return self._code

    def ending(self) -> str:
        """How the program ended, in words."""
        code = self._code
        if code is None:
            return "still runs"
        if self._gone_why:
            return f"was lost: {self._gone_why}"
        words = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return words + self.circumstances()

    def circumstances(self) -> str:
        """What the engine knows besides, in words that go on after a reason; empty if there is nothing to say."""
        state = self._state
        oom = state is not None and state.oom
        if not self.ended.is_set():
            with contextlib.suppress(EngineError):
                oom = self._engine.oom_noted(self.id)
        words = f"; {_OOM}" if oom else ""
        words += f"; {state.error}" if state is not None and state.error else ""
        return words + ("; the Docker engine was away meanwhile" if self._was_away else "")

    def log_end(self) -> tuple[str, ...]:
        """The last lines of its log; where it has none, of what the engine keeps (a shell's complaint)."""
        lines = last_lines(self._log)
        if lines:
            return lines
        try:
            return tuple(self._engine.said(self.id).splitlines()[-20:])
        except EngineError:
            return ()

    def _watch(self) -> None:
        """In the thread: until the end is known."""
        while not self.ended.is_set():
            try:
                self._engine.wait(self.id)
                self._note(self._engine.state(self.id))
            except EngineGone as error:
                self._wait_for_engine(str(error))
            except EngineError:
                self._note(None)

    def _wait_for_engine(self, why: str) -> None:
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        self._was_away = True
        if now - self._gone_since > self._lost_s:
            self._gone_why = why
            self._code = _LOST
            self.ended.set()
            return
        time.sleep(_ASK_AGAIN_S)
        try:
            state = self._engine.state(self.id)
        except EngineError:
            return
        self._gone_since = None
        if state is None or not state.running:
            self._note(state)

    def _note(self, state: State | None) -> None:
        """Keep how it ended; `state` is None when the container is not there any more."""
        if state is not None and state.running:
            return
        self._state = state
        if state is None or state.exit_code is None:
            self._gone_why = "somebody removed its container"
            self._code = _LOST
        else:
            code = state.exit_code
            self._code = _SIGNAL_BASE - code if _SIGNAL_BASE < code < _SIGNAL_BASE + 65 else code
        self.ended.set()
