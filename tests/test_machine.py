"""What is written down about a machine, and that nothing secret is."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from lab.machine import describe, git, redact, uncommitted

ROOT = Path(__file__).parents[1]
# Put together here, so that no scanner takes this file for a leak.
X = "x1Y2z3W4" * 3


@pytest.mark.parametrize(
    "secret",
    [
        f"hf_{X}",
        f"sk-{X}",
        f"ghp_{X}",
        f"github_pat_{X}",
        f"glpat-{X}",
        f"xoxb-{X}",
        f"AKIA{X}",
        f'HF_TOKEN="{X}"',
        f"export HF_TOKEN={X}",
        f'{{"api_key": "{X}"}}',
        f"api-key: {X}",
        f"password = '{X}'",
        f"PASSWD={X}",
        f"aws_secret_access_key = {X}",
        f"client_secret: {X}",
        f"Authorization: Bearer {X}",
        f"https://someone:{X}@example.org/index",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{X}\n{X}\n-----END OPENSSH PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{X}\n",
    ],
)
def test_secrets_are_taken_out(secret: str) -> None:
    text = redact(f"+before\n+{secret}\n+after\n")
    assert X not in text
    assert "[redacted]" in text
    assert text.startswith("+before\n+")


def test_what_is_no_secret_stays() -> None:
    text = (
        "+max_tokens: int = 16384\n+tokenizer = load()\n+token_ids = [1, 2]\n-prompt_tokens=2048,\n"
        "+see https://docs.sglang.io/a:b and user@example.org\n+secret sauce\n+password: \n"
    )
    assert redact(text) == text


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    def run(*words: str) -> None:
        subprocess.run(("git", "-C", str(tmp_path), *words), check=True, capture_output=True)

    run("init", "-q")
    (tmp_path / "file").write_text("one\n")
    run("add", "file")
    run("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "commit", "-qm", "first")
    return tmp_path


def test_uncommitted_changes_are_kept_without_secrets(repository: Path) -> None:
    assert uncommitted(repository) == ""
    assert describe(repository)["git_dirty"] is False
    (repository / "file").write_text(f"two\nHF_TOKEN={X}\n")
    diff = uncommitted(repository)
    assert "+two" in diff
    assert X not in diff
    assert describe(repository)["git_dirty"] is True


def test_a_folder_without_git(tmp_path: Path) -> None:
    assert git(tmp_path, "rev-parse", "HEAD") is None
    assert uncommitted(tmp_path) == ""
    assert describe(tmp_path)["git_commit"] is None


def test_the_machine_has_what_a_report_needs_and_no_name() -> None:
    found = describe(ROOT)
    assert found["cpu"]
    assert isinstance(found["memory_gib"], float)
    assert found["memory_gib"] > 0
    assert isinstance(found["cpus_usable"], int)
    text = json.dumps(found)
    assert str(Path.home()) not in text
    name = socket.gethostname()
    assert name in ("localhost", "") or name not in text
