"""The machine and the code a run was made with, as data for environment.json."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil

from lab import __version__

SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[bp]-|AKIA)[A-Za-z0-9_\-]{8,}"
    r"|(?i:(token|passw(or)?d|secret(_access_key)?|api[_-]?key|access[_-]?key)[\"']?\s*[:=]\s*[\"']?)[^\s\"',]{6,}"
    r"|(?i:bearer\s+)[A-Za-z0-9._~+/=\-]{8,}"
    r"|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)",
    re.DOTALL,
)


def describe(repository: Path) -> dict[str, object]:
    """CPU, memory, kernel, Python, the lab's version and git state. Sizes in GiB. Nothing secret, no host name."""
    memory = psutil.virtual_memory()
    return {
        "cpu": _cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "cpus_physical": psutil.cpu_count(logical=False),
        "memory_gib": round(memory.total / 2**30, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "system": _os_name(),
        "glibc": platform.libc_ver()[1],
        "python": platform.python_version(),
        "lab": __version__,
        "lab_packages": {
            name: version(name) for name in ("pandas", "scipy", "numpy", "matplotlib", "jinja2")
        },
        "git_commit": git(repository, "rev-parse", "HEAD"),
        "git_dirty": bool(git(repository, "status", "--porcelain")),
    }


def uncommitted(repository: Path) -> str:
    """The diff of tracked files against HEAD, with anything that looks like a secret taken out."""
    return redact(git(repository, "diff", "HEAD") or "")


def redact(text: str) -> str:
    """`text` with tokens, keys and passwords replaced."""
    return SECRET.sub("[redacted]", text)


def git(repository: Path, *words: str) -> str | None:
    """The output of a git command, None where git or the repository is not there."""
    try:
        done = subprocess.run(  # noqa: S603  fixed words, no shell
            (shutil.which("git") or "git", "-C", str(repository), *words),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n") if done.returncode == 0 else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", sys.platform)
    except OSError:
        return sys.platform
