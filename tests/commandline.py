"""The command line as a person meets it: a copy of the repository in a folder of its own, and `python -m invoke`
in it. Nothing of the real checkout, its runs or the user's cache is touched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fakerun

ROOT = Path(__file__).parents[1]
NO_ENGINE = "unix:///nowhere/docker.sock"  # the same on a machine with an engine and on one without
COPIED = ("lab", "containers", "tasks.py", "pyproject.toml")


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended; `text` is both streams."""

    code: int
    text: str
    out: str


@dataclass(frozen=True)
class Copy:
    """A copy of the repository with the small experiment of `fakerun` beside those of the lab."""

    root: Path

    def invoke(self, *words: str, before: tuple[str, ...] = ()) -> Done:
        """Run `invoke WORDS` in the copy; `before` is put in front, such as setpriv."""
        return self.run(sys.executable, "-m", "invoke", *words, before=before)

    def run(self, *argv: str, before: tuple[str, ...] = ()) -> Done:
        env = {
            **{key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ},
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "XDG_STATE_HOME": str(self.root / "state"),
            "MPLCONFIGDIR": str(
                Path(sys.prefix) / "var" / "matplotlib"
            ),  # a font list is made once, not per test
            "COLUMNS": "200",
            "DOCKER_HOST": NO_ENGINE,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            (*before, *argv),
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        return Done(code=done.returncode, text=done.stdout + done.stderr, out=done.stdout)

    def edit(self, name: str, pattern: str, new: str) -> None:
        """Replace the one place of a file that matches."""
        path = self.root / name
        text, count = re.subn(pattern, new, path.read_text())
        assert count == 1, f"{pattern} stands {count} times in {name}"
        path.write_text(text)

    @property
    def small(self) -> Path:
        return self.root / "lab" / "experiments" / "small.py"


def make_copy(folder: Path) -> Copy:
    """Copy what the command line needs into `folder`."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    copy = Copy(folder)
    copy.small.write_text(fakerun.EXPERIMENT)
    return copy


def assert_refused(done: Done, problem: str, *also: str) -> None:
    """Exit code 1, the problem with why and fix, and no traceback."""
    assert done.code == 1, f"exit code {done.code}: {done.text}"
    assert "Traceback" not in done.text
    assert "error: " in done.text
    assert "  fix: " in done.text
    for part in (problem, *also):
        assert part in done.text, f"{part!r} is not in:\n{done.text}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes, to see that nothing was lost or changed."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
