"""A copy of the lab to run commands in, as a newcomer's clone would be, and helpers to watch what they leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from commandline import NO_ENGINE

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    "runs", ".git", "__pycache__", "*.egg-info", ".*_cache", "build", "node_modules"
)

TINY = '''\
"""A small experiment for tests: one short load on one server."""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import Chat

EXPERIMENT = Experiment(
    name="tiny",
    question="Does a short chat work?",
    mechanism="Questions are asked.",
    sources=(),
    server=("--max-total-tokens", "{pool}"{server}),
    variants=(Variant(name="only", says="one server"),),
    loads=(
        Chat(
            name="chat",
            seed=0,
            questions={questions},
            system_chars=2000,
            system_tokens=500,
            output_tokens={output},
        ),
    ),
    claims=(
        Claim(
            name="hits",
            says="Later questions find the system prompt.",
            measure=Measure(table="requests", load="chat", column="cached_share", rows="later", reduce="min"),
            variant="only",
            op=">",
            threshold=0.5,
        ),
    ),
    try_next=(),
    repeats=1,
)
'''


@dataclass(frozen=True)
class Checkout:
    """A copied repository; commands run in it see its `lab` package and write to its `runs`."""

    path: Path
    docker: bool = False  # whether the commands see the machine's Docker engine

    def tiny(
        self, name: str, *, server: str = "", questions: int = 2, output: int = 8, pool: int = 4096
    ) -> None:
        """Add an experiment called `name`: `questions` questions of `output` answer tokens, a KV cache of `pool`."""
        asked = tuple(f"What is number {i}?" for i in range(questions))
        text = TINY.format(server=server, questions=asked, output=output, pool=pool).replace(
            '"tiny"', f'"{name}"'
        )
        (self.path / "lab" / "experiments" / f"{name}.py").write_text(text, encoding="utf-8")

    def site(self, **values: float) -> str:
        """A site file with the given numbers; returns its path for --site."""
        lines = ['name = "test"', *(f"{key} = {value}" for key, value in values.items())]
        file = self.path / "test-site.toml"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(file)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `invoke WORDS...` in the checkout, in a session of its own."""
        environment = {**os.environ, "PYTHONPATH": str(self.path), "COLUMNS": "160"}
        if not self.docker:
            environment["DOCKER_HOST"] = NO_ENGINE
        return subprocess.Popen(
            [sys.executable, "-m", "invoke", *words],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def invoke(self, *words: str, timeout: float = 600) -> tuple[int, str]:
        """Run `invoke WORDS...`; returns exit code and everything it printed."""
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.kill()
        return process.returncode, output

    def newest_run(self, experiment: str) -> Path:
        return sorted((self.path / "runs" / experiment).iterdir())[-1]


def make_checkout(folder: Path, *, docker: bool = False) -> Checkout:
    shutil.copytree(ROOT, folder / "lab-copy", ignore=LEFT_OUT)
    return Checkout(folder / "lab-copy", docker)


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)


def processes_of(checkout: Checkout) -> list[psutil.Process]:
    """Live processes whose command names the checkout: servers (its run folders) and client hosts (its lab)."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(checkout.path) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def server_processes(checkout: Checkout) -> list[psutil.Process]:
    return [p for p in processes_of(checkout) if "sglang.launch_server" in " ".join(p.cmdline())]


def wait_for_server(checkout: Checkout, *, seconds: float = 120) -> psutil.Process:
    """The checkout's server once it is there. A look at the moment of its exec sees no command, hence one
    look that both decides and returns."""
    deadline = time.monotonic() + seconds
    while not (found := server_processes(checkout)):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for the server"
        time.sleep(0.1)
    return found[0]


def family(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes and all their descendants, to see afterwards whether any of them is left."""
    return [*processes, *(child for p in processes for child in p.children(recursive=True))]


def scratch_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("sglang-lab-[0-9]*"))


def shared_memory_files() -> set[str]:
    """What SGLang's servers are known to leave in /dev/shm."""
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("sem.mp-", "sglang_", "psm_"))}
