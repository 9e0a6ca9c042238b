"""What a person sees while the lab works: lasting lines for what happened, one live line for what goes on."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """Prints steps; on a terminal also a spinner with the seconds since the last step.

    Use it in a `with` block. Without a terminal (CI, a pipe) only the lasting lines appear.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._since = time.monotonic()

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._status = self.console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def step(self, text: str) -> None:
        """A line that stays."""
        self._since = time.monotonic()
        self.console.print(text, markup=False)

    def live(self, text: str) -> None:
        """What is going on now; replaced by the next call, not shown without a terminal."""
        if self._status is not None:
            seconds = time.monotonic() - self._since
            room = max(20, self.console.width - 12)
            self._status.update(f"{text[:room].replace('[', chr(92) + '[')} ({seconds:.0f} s)")
