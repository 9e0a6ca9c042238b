"""What must hold for every file of the repository, and what the README must tell."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from parts import need

from lab import places
from lab.experiment import experiment_names

ROOT = Path(__file__).parents[1]

# Written in pieces, so that this file does not find itself.
REGISTRIES = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "hugging" + "face.co",
    "docker" + ".io/",
    "gh" + "cr.io",
]
# /opt/stack, /opt/python and /home/lab are places inside the images.
MACHINE_PATH = re.compile(
    r"(?<![\w.}\])*/])/(?:"
    + "|".join(("root", "home", "work", "opt", "Users"))
    + r")/(?!stack|python|lab\b)[\w.]"
)


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file git tracks or would track."""
    words = ("git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(words, capture_output=True, text=True)
    need(done.returncode == 0, "a git checkout")
    found = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert ROOT / "tasks.py" in found
    return found


def lines_with(files: list[Path], pattern: re.Pattern[str]) -> list[str]:
    """`file:line: text` of every line that matches."""
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or the like
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def test_no_registry_address(tracked: list[Path]) -> None:
    assert lines_with(tracked, re.compile("|".join(map(re.escape, REGISTRIES)), re.IGNORECASE)) == []


def test_no_absolute_path_of_a_machine(tracked: list[Path]) -> None:
    assert lines_with(tracked, MACHINE_PATH) == []


def test_the_search_finds_what_it_looks_for() -> None:
    for text in (
        "x = '/" + "root/.cache/x'",
        "in /" + "home/me/lab",
        "${X:-/" + "opt/sglang}",
        '"/' + 'work/main"',
    ):
        assert MACHINE_PATH.search(text), text
    for text in (
        "https://x.org/" + "home/page",
        "${ROOT}/" + "work/x",
        "tests/" + "home/x",
        "/lab-test/home/x",
    ):
        assert not MACHINE_PATH.search(text), text


def test_nothing_large_is_tracked(tracked: list[Path]) -> None:
    assert [p.relative_to(ROOT).as_posix() for p in tracked if p.stat().st_size > 2_000_000] == []


def test_runs_are_not_tracked(tracked: list[Path]) -> None:
    assert [p for p in tracked if p.is_relative_to(ROOT / "runs")] == []


def task_names() -> list[str]:
    """Every task of tasks.py by the name it is typed with."""
    spec = importlib.util.spec_from_file_location("tasks_of_the_lab", ROOT / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return sorted(module.namespace.task_names)


@pytest.fixture(scope="session")
def readme() -> str:
    path = ROOT / "README.md"
    assert path.is_file(), "there is no README.md"
    return path.read_text(encoding="utf-8")


def test_the_readme_holds_the_two_commands(readme: str) -> None:
    for command in ("pip install -e . && invoke exp.radix", "pip install -e '.[test]' && pytest"):
        assert command in readme, f"README.md does not hold the command: {command}"


def test_the_readme_names_every_task(readme: str) -> None:
    names = task_names()
    assert {"doctor", "exp.radix", "report", "runs", "clean"} <= set(names)
    missing = [name for name in names if f"invoke {name}" not in readme]
    assert missing == [], f"README.md does not say what these do: {['invoke ' + m for m in missing]}"


def test_the_readme_names_every_experiment(readme: str) -> None:
    missing = [n for n in experiment_names(places.EXPERIMENTS) if f"invoke exp.{n}" not in readme]
    assert missing == [], f"README.md does not name the experiments {missing}"


def test_the_readme_names_every_option_of_an_experiment(readme: str) -> None:
    options = ("repeats", "dry-run", "explain", "resume", "strict", "site", "stack", "model")
    missing = [f"--{o}" for o in options if f"--{o}" not in readme]
    assert missing == [], f"README.md does not explain the options {missing}"


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(p.name for p in folder.glob("0*.md"))
    numbers = [name[:4] for name in pages]
    assert len(set(numbers)) == len(numbers), f"two decisions with one number: {pages}"
    index = folder / "README.md"
    if index.is_file():
        text = index.read_text(encoding="utf-8")
        assert [name for name in pages if name not in text] == []
