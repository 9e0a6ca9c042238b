"""Ctrl-C, SIGTERM and SIGHUP while programs run: the first one becomes an exception in the main thread, a further
one during the clean-up only shortens it. Every runtime has one `Interrupts` and calls it from its `with` block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from lab.runtime.base import Terminated

_Handler = Callable[[int, FrameType | None], object] | int | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Holds the signal handlers between `begin` and `end`."""

    def __init__(self) -> None:
        self._handlers: list[tuple[signal.Signals, _Handler]] = []
        self._closing = False
        self._hurried_by: int | None = None

    @property
    def hurried(self) -> bool:
        """Whether a signal came during the clean-up."""
        return self._hurried_by is not None

    def begin(self) -> None:
        """Take over the signals; those that are ignored (nohup, background jobs) stay ignored."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a runtime belongs in the main thread, where signals are handled")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # inherited; the kernel would drop exit codes
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for signum in _SIGNALS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self._handlers.append((signum, signal.signal(signum, self._on_signal)))

    def closing(self) -> None:
        """From here on a signal raises nothing any more."""
        self._closing = True

    def end(self, *, error: BaseException | None) -> None:
        """Give the signals back; raises what came during a clean-up that no error had caused."""
        for signum, handler in self._handlers:
            signal.signal(signum, handler)
        if error is None and self._hurried_by is not None:
            _raise(self._hurried_by)  # asked to end while ending in order: the lab must still hear of it

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._closing:
            self._hurried_by = signum
        else:
            _raise(signum)


def _raise(signum: int) -> None:
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)
