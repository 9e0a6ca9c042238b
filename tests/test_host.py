"""The client's host process runs programs as `python ARGV...` would, and tells how they ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import wait_until

HOST = Path(__file__).resolve().parent.parent / "lab" / "load" / "host.py"


class Host:
    def __init__(self, folder: Path, *modules: str) -> None:
        self.mailbox = folder / "mailbox"
        self.mailbox.mkdir()
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), str(self.mailbox), *modules],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.number = 0
        wait_until(lambda: (self.mailbox / "ready").exists(), seconds=20, what="the host")

    def run(self, *argv: str) -> tuple[int, str]:
        log = self.folder / f"log-{self.number}"
        part = self.mailbox / "part"
        part.write_text(json.dumps({"argv": list(argv), "log": str(log)}))
        part.rename(self.mailbox / f"task-{self.number}.json")
        done = self.mailbox / f"done-{self.number}.json"
        wait_until(done.exists, seconds=20, what="the task")
        self.number += 1
        answer = json.loads(done.read_text())
        assert answer["ended"] >= answer["started"]
        return answer["exit"], log.read_text()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, "json", "no_such_module")
    yield host
    host.process.kill()
    host.process.communicate()


def program(folder: Path, text: str) -> str:
    file = folder / "program.py"
    file.write_text(text)
    return str(file)


SHOW = "import sys\nif __name__ == '__main__':\n    print(__name__, sys.argv)\n"


def test_a_file_is_run_as_main_with_its_arguments(host: Host, tmp_path: Path) -> None:
    file = program(tmp_path, SHOW)
    assert host.run(file, "--a", "b c") == (0, f"__main__ {[file, '--a', 'b c']}\n")


def test_a_module_is_run_as_main(host: Host) -> None:
    code, output = host.run("-m", "json.tool", "--help")
    assert code == 0
    assert "usage" in output


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", 137, ""),
        ("import os; os._exit(5)", 5, ""),
    ],
)
def test_how_a_program_ends_is_told(host: Host, tmp_path: Path, text: str, code: int, says: str) -> None:
    ended, output = host.run(program(tmp_path, text))
    assert ended == code
    assert says in output


def test_one_program_does_not_see_what_another_did(host: Host, tmp_path: Path) -> None:
    file = program(tmp_path, "import json\nprint(hasattr(json, 'mark'))\njson.mark = 1\n")
    assert [host.run(file)[1] for _ in range(2)] == ["False\n", "False\n"]


def test_a_module_that_is_missing_is_said_and_not_fatal(host: Host) -> None:
    host.process.send_signal(signal.SIGINT)
    output, _ = host.process.communicate(timeout=10)
    assert "no_such_module not preloaded" in output
    assert host.process.returncode == 0
    assert "Traceback" not in output
