"""The child processes of a stack's build and what the user sees of them: every child writes to its own log
file, dies with the lab (also when the lab is killed), and several may run at once; a line a step is shown
with the time it has taken.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError

# Run by the lab's Python before the real program: asks Linux to kill this process when the lab's ends
# (PR_SET_PDEATHSIG, prctl(2), which survives exec), and goes no further if that has happened already.
DIE_WITH_LAB = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""

# What of the user's environment a child gets: what finds programs, the set-up of pip and uv, certificates,
# proxies.
KEPT = re.compile(
    r"^(PATH|HOME|USER|LANG|LC_\w+|TMPDIR|PYENV_\w+|XDG_\w+|PIP_\w+|UV_\w+|SSL_CERT_\w+|NETRC"
    r"|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|\w+_proxy|\w+_PROXY)$"
)
# Settings that would send packages elsewhere, or to another Python, than into the stack.
DROPPED = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_USER",
    "PIP_PYTHON",
    "PIP_DRY_RUN",
    "PIP_REPORT",
    "UV_PYTHON",
)
NOISE = re.compile(r"^(WARNING: Location .* is ignored|\[notice\]|\s*$)")


def child_env(env: Mapping[str, str]) -> dict[str, str]:
    """The part of `env` that children get."""
    kept = {key: value for key, value in env.items() if KEPT.match(key) and key not in DROPPED}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "NO_COLOR": "1"}


def no_retry(_log: str) -> None:
    """For a job that has no other way to do its work."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program of one step. When it fails, `retry` may look at its log and name another program to try."""

    step: str
    argv: tuple[str, ...]
    retry: Callable[[str], tuple[str, ...] | None] = no_retry


class Child:
    """A running program of a step, in a process group of its own."""

    def __init__(self, job: Job, *, log: Path, env: Mapping[str, str]) -> None:
        self.job = job
        self.log = log
        argv = (sys.executable, "-I", "-S", "-c", DIE_WITH_LAB, str(os.getpid()), *job.argv)
        with log.open("a", encoding="utf-8") as out:
            out.write(f"$ {' '.join(job.argv)}\n")
            out.flush()
            self.process = subprocess.Popen(  # noqa: S603 - our own argv
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lines(self) -> list[str]:
        """The lines of the log that say something."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if not NOISE.match(line)]

    def kill(self) -> None:
        """End the program and what it started, if it still runs."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Steps:
    """Runs the steps of a build, tells of each when it ends, and remembers how long it took.

    `say` is given the lasting lines, `live` what goes on right now: the running steps and a log line.
    """

    def __init__(
        self, *, say: Callable[[str], None], live: Callable[[str], None], logs: Path, env: Mapping[str, str]
    ) -> None:
        self.say = say
        self.live = live
        self.logs = logs
        self.env = env
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step that runs in this process."""
        started = time.monotonic()
        self.live(name)
        try:
            yield
        except LabError as error:
            why = f"{error.problem}\n       {error.why}" if error.why else error.problem
            raise LabError(f"the build failed at step {name!r}", why=why, fix=error.fix) from None
        except OSError as error:
            raise self.failure(name, [str(error)]) from None
        self._end(name, since=started)

    def run(self, *jobs: Job) -> None:
        """Run the jobs side by side until all have ended; one that fails ends the others: `LabError`."""
        started = time.monotonic()
        running: list[Child] = []
        try:
            for job in jobs:
                running.append(self._start(job))
            while running:
                time.sleep(0.1)
                for child in tuple(running):
                    if child.process.poll() is not None:
                        running.remove(child)
                        running += self._settle(child, since=started)
                if running:
                    steps = ", ".join(child.job.step for child in running)
                    self.live(f"{steps}: {' '.join(running[-1].lines()[-1:])[:60]}")
        except OSError as error:
            raise self.failure(", ".join(job.step for job in jobs), [str(error)]) from None
        finally:
            for child in running:
                child.kill()

    def failure(self, step: str, lines: Sequence[str]) -> LabError:
        """The error for a failed step: the last of what it said, and what to do about it."""
        return LabError(
            f"the build failed at step {step!r}",
            why="\n       ".join(lines[-6:]) or "it said nothing",
            fix=f"{advice(' '.join(lines))}\n       log: {self.logs}",
        )

    def _start(self, job: Job) -> Child:
        return Child(job, log=self.logs / f"{job.step}.log", env=self.env)

    def _settle(self, child: Child, *, since: float) -> list[Child]:
        """Note the end of a step; when it failed, the child that tries it another way, if there is one."""
        child.kill()  # what it may have left in its group
        if child.process.returncode == 0:
            self._end(child.job.step, since=since)
            return []
        said = child.lines()
        again = child.job.retry("\n".join(said))
        if again is None:
            raise self.failure(child.job.step, said[1:])  # the first is the command
        return [self._start(Job(step=child.job.step, argv=again))]

    def _end(self, name: str, *, since: float) -> None:
        self.seconds[name] = round(time.monotonic() - since, 2)
        self.say(f"  {name:<10} {self.seconds[name]:5.1f} s")


def advice(text: str) -> str:
    """What to try, from what a failed step said."""
    for pattern, words in _ADVICE:
        if re.search(pattern, text, re.IGNORECASE):
            return words
    return "read the log, and run the same command again"


_NETWORK = (
    "NewConnectionError|name resolution|ConnectTimeout|timed out|Connection refused|Connection reset"
    "|unreachable|dns error|error sending request|CERTIFICATE_VERIFY"
)
_ADVICE = (
    (
        "No space left|disk quota",
        "free some space on the cache folder's disk, and run the same command again",
    ),
    (
        "DO NOT MATCH THE HASHES|hash mismatch",
        "the package index serves another file than the locked one: see `pip config list`",
    ),
    (_NETWORK, "check the network and proxy (`pip config list`), and run the same command again"),
    (
        "No matching distribution|Could not find a version|no version of|not found in the package registry",
        "the index that pip is set up with does not have this package: see `pip config list`",
    ),
    ("Permission denied|Read-only", "make the cache folder writable, or set XDG_CACHE_HOME to one that is"),
)
