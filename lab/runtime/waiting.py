"""Waiting for started programs, whatever runs them: until one answers over HTTP, until the first of several has
ended. In go `Program`s, out come seconds, or the fault that tells what went wrong instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import httpx

from lab.runtime.base import DiedUnderLoad, DiedWhileStarting, NeverReady, Program, Waiting
from lab.runtime.logtail import last_line
from lab.runtime.ports import loopback_port

Say = Callable[[Waiting], None]

_HEALTH_EVERY_S = 0.2
_HEALTH_ANSWER_S = 5.0  # some SGLang settings let /health generate a token first, which takes over a second
_POLL_S = 0.02
_END_SHOWS_S = 2.0


def never() -> bool:
    """For a wait that nothing cuts short."""
    return False


def until_ready(
    program: Program, *, url: str, deadline_s: float, say: Say | None, hurried: Callable[[], bool] = never
) -> float:
    """Wait until a GET of `url` answers 200; returns the seconds it took, to 0.2 s.

    Raises `DiedWhileStarting` as soon as the program ends, `NeverReady` after `deadline_s` seconds, `LabError`
    for a URL that is not on the loopback.
    """
    loopback_port(url)
    answer = "none"
    with httpx.Client(trust_env=False) as http:
        for elapsed in ticks(
            (program,), deadline_s=deadline_s, every_s=_HEALTH_EVERY_S, say=say, hurried=hurried
        ):
            if program.exit_code() is not None:
                raise died_while_starting(program)
            answer = _get(http, url, timeout_s=min(_HEALTH_ANSWER_S, deadline_s - elapsed))
            if answer == "HTTP 200":
                if program.exit_code() is not None:
                    raise died_while_starting(program)
                return elapsed
    reason = f"not ready after {deadline_s:g} s; last answer of {url}: {answer}"
    raise NeverReady(reason, name=program.name, phase="start", last_lines=program.log_end())


def died_while_starting(program: Program) -> DiedWhileStarting:
    """The fault of a program that ended before it was ready."""
    reason = f"{program.ending()} before it was ready"
    return DiedWhileStarting(reason, name=program.name, phase="start", last_lines=program.log_end())


def end_behind(program: Program) -> DiedUnderLoad | None:
    """What is behind an answer of the program that did not come, when the program ends with it: its refusal to
    answer is seen a moment before its end is."""
    if not first_ended((program,), within_s=_END_SHOWS_S):
        return None
    return DiedUnderLoad(program.ending(), name=program.name, phase="load", last_lines=program.log_end())


def ticks(
    programs: Sequence[Program],
    *,
    deadline_s: float,
    every_s: float,
    say: Say | None,
    hurried: Callable[[], bool] = never,
) -> Iterator[float]:
    """Elapsed seconds, every `every_s` and at once when a program ends, until the deadline has passed.

    `say` is told of the first program.
    """
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < deadline_s:
        yield elapsed
        if say is not None:
            first = programs[0]
            line = last_line(first.log)
            say(Waiting(name=first.name, elapsed_s=elapsed, deadline_s=deadline_s, last_line=line))
        left = deadline_s - (time.monotonic() - began)
        first_ended(programs, within_s=min(every_s, max(0.0, left)), hurried=hurried)


def first_ended(programs: Sequence[Program], *, within_s: float, hurried: Callable[[], bool] = never) -> bool:
    """Whether one of the programs has ended, now or within so many seconds."""
    until = time.monotonic() + within_s
    while True:
        if any(program.exit_code() is not None for program in programs):
            return True
        if not programs or time.monotonic() >= until or hurried():
            return False
        time.sleep(_POLL_S)


def _get(http: httpx.Client, url: str, *, timeout_s: float) -> str:
    try:
        return f"HTTP {http.get(url, timeout=timeout_s).status_code}"
    except httpx.HTTPError as error:
        return type(error).__name__
