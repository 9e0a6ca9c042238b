"""The client side of a trial: a host process that has imported the client programs and runs them on request.

`load/host.py` is the other half and documents the mailbox. In goes an argv, out comes the exit code and
when the client started and ended; server and host are watched all the while."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from lab.rundir import write_text
from lab.runtime.base import DeadlinePassed, DiedUnderLoad, Program

POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a client ended: exit code, and Unix times of its start and end."""

    exit: int
    started: float
    ended: float


class ClientHost:
    """A started `load/host.py` and its mailbox folder."""

    def __init__(self, process: Program, *, mailbox: Path) -> None:
        self._process = process
        self._mailbox = mailbox
        self._number = 0

    def wait_ready(self, *, deadline_s: float, watch: tuple[Program, ...]) -> None:
        """Wait until the client's modules are imported."""
        self._wait_for(
            self._mailbox / "ready", what="import of the client", deadline_s=deadline_s, watch=watch
        )

    def run(
        self,
        argv: tuple[str, ...],
        *,
        log: str,
        deadline_s: float,
        watch: tuple[Program, ...],
    ) -> Done:
        """Run one client program to its end; `log` is the file for its output as the host sees it.

        Raises DiedUnderLoad when the host or a program in `watch` ends first, DeadlinePassed after
        `deadline_s` seconds; the client then still runs and ends with the host.
        """
        number, self._number = self._number, self._number + 1
        done = self._mailbox / f"done-{number}.json"
        task = {"argv": list(argv), "log": log}
        write_text(self._mailbox / f"task-{number}.json", json.dumps(task))
        self._wait_for(done, what=argv[0], deadline_s=deadline_s, watch=watch)
        answer = json.loads(done.read_text(encoding="utf-8"))
        return Done(exit=answer["exit"], started=answer["started"], ended=answer["ended"])

    def _wait_for(
        self,
        path: Path,
        *,
        what: str,
        deadline_s: float,
        watch: tuple[Program, ...],
    ) -> None:
        deadline = time.monotonic() + deadline_s
        while not path.exists():
            for process in (*watch, self._process):
                if process.exit_code() is not None:
                    raise DiedUnderLoad(
                        process.ending(), name=process.name, phase="load", last_lines=process.log_end()
                    )
            if time.monotonic() > deadline:
                raise DeadlinePassed(
                    f"{what} was not done after {deadline_s:g} s",
                    name=self._process.name,
                    phase="load",
                    last_lines=self._process.log_end(),
                )
            time.sleep(POLL_S)
