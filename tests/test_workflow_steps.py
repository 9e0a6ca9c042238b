"""The shell code of the workflows' steps and the GPU machine's own check, run as GitHub and its runner run them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from workflowfiles import ROOT, steps_with_shell

HOOK = ROOT / ".github" / "runner" / "job-started.sh"


def shell(
    file: str, name: str, *, folder: Path, env: Mapping[str, str]
) -> tuple[int, str, dict[str, str], str]:
    """Run one step's shell in `folder` as GitHub does: exit code, what it printed, its outputs, its summary."""
    (code,) = (run for at, called, run in steps_with_shell() if (at, called) == (file, name))
    output, summary = folder / "output", folder / "summary"
    for path in (output, summary):
        path.write_text("")
    words = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", code)
    files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        words, cwd=folder, env={**files, **env}, capture_output=True, text=True, check=False
    )
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return done.returncode, done.stdout + done.stderr, outputs, summary.read_text()


@pytest.mark.parametrize(("file", "name", "code"), steps_with_shell())
def test_the_shell_is_well_formed(file: str, name: str, code: str) -> None:
    done = subprocess.run(("bash", "-n"), input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ASKED = {"GITHUB_REF": "refs/heads/main", "EXPERIMENT": "radix", "GPUS": "0", "REPEATS": "3"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with one experiment."""
    experiments = tmp_path / "lab" / "experiments"
    experiments.mkdir(parents=True)
    (experiments / "radix.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "gpus"),
    [
        ({}, "0"),
        ({"GPUS": "10,2,0"}, "0,2,10"),
        ({"REPEATS": "100", "GITHUB_REF": "refs/tags/v1.0"}, "0"),
    ],
)
def test_good_inputs_pass(change: dict[str, str], gpus: str, checkout: Path) -> None:
    env = {**ASKED, **change}
    code, said, outputs, _ = shell("experiments.yml", "Check the inputs", folder=checkout, env=env)
    assert code == 0, said
    assert outputs == {"experiment": "radix", "gpus": gpus, "repeats": env["REPEATS"]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"GITHUB_REF": "refs/heads/mine"}, "main or a version's tag"),
        ({"GITHUB_REF": "refs/pull/1/merge"}, "main or a version's tag"),
        ({"EXPERIMENT": "radix; id"}, "small letters"),
        ({"EXPERIMENT": "../radix"}, "small letters"),
        ({"EXPERIMENT": "radix\ngpus=7"}, "small letters"),
        ({"EXPERIMENT": ""}, "small letters"),
        ({"EXPERIMENT": "radiks"}, "no experiment"),
        ({"GPUS": ""}, "by index"),
        ({"GPUS": "all"}, "by index"),
        ({"GPUS": "0, 1"}, "by index"),
        ({"GPUS": "0,"}, "by index"),
        ({"GPUS": "00"}, "by index"),
        ({"GPUS": "0$(id)"}, "by index"),
        ({"GPUS": "0\nrepeats=9"}, "by index"),
        ({"GPUS": "1,0,1"}, "twice"),
        ({"REPEATS": "0"}, "1 to 100"),
        ({"REPEATS": "101"}, "1 to 100"),
        ({"REPEATS": "3 --site x"}, "1 to 100"),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, str], problem: str, checkout: Path) -> None:
    code, said, outputs, _ = shell(
        "experiments.yml", "Check the inputs", folder=checkout, env={**ASKED, **change}
    )
    assert code == 1
    assert said.startswith("::error::")
    assert problem in said
    assert outputs == {}


def test_the_image_is_named_after_the_repository(tmp_path: Path) -> None:
    env = {"REGISTRY": "registry.example", "REPOSITORY": "Me/SGLang-Lab", "STACK": "cpu"}
    code, said, outputs, _ = shell("images.yml", "Name the image", folder=tmp_path, env=env)
    assert (code, outputs) == (0, {"name": "registry.example/me/sglang-lab/cpu"}), said
    code, said, outputs, _ = shell(
        "images.yml", "Name the image", folder=tmp_path, env={**env, "REGISTRY": ""}
    )
    assert (code, outputs) == (1, {})
    assert "IMAGE_REGISTRY" in said


def test_the_report_stands_in_the_summary(tmp_path: Path) -> None:
    code, said, _, summary = shell("experiments.yml", "Show the report", folder=tmp_path, env={})
    assert code == 0, said
    assert summary.startswith("No report")
    run = tmp_path / "runs" / "radix" / "20261123T101502Z-7f3a"
    run.mkdir(parents=True)
    for text in ("# radix\n", "x" * 2_000_000):
        (run / "report.md").write_text(text)
        code, said, _, summary = shell("experiments.yml", "Show the report", folder=tmp_path, env={})
        assert (code, summary) == (0, text[:1_000_000]), said


DISPATCHED = {
    "GITHUB_EVENT_NAME": "workflow_dispatch",
    "GITHUB_REF": "refs/heads/main",
    "GITHUB_REPOSITORY": "me/lab",
    "GITHUB_WORKFLOW_REF": "me/lab/.github/workflows/experiments.yml@refs/heads/main",
}


@pytest.mark.parametrize(
    "change",
    [
        {"GITHUB_EVENT_NAME": "pull_request"},
        {"GITHUB_EVENT_NAME": "push"},
        {"GITHUB_EVENT_NAME": ""},
        {"GITHUB_REF": "refs/pull/1/merge"},
        {"GITHUB_REF": "refs/heads/mine"},
        {"GITHUB_WORKFLOW_REF": "me/lab/.github/workflows/ci.yml@refs/heads/main"},
        {"GITHUB_WORKFLOW_REF": "me/lab/.github/workflows/experiments.yml@refs/heads/mine"},
        {"GITHUB_WORKFLOW_REF": "you/lab/.github/workflows/experiments.yml@refs/heads/main"},
    ],
)
def test_the_runner_itself_refuses_other_jobs(change: dict[str, str]) -> None:
    for env, expected in ((DISPATCHED, 0), ({**DISPATCHED, **change}, 1)):
        done = subprocess.run(("bash", "-e", HOOK), env=env, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stdout + done.stderr
        assert done.stdout.startswith("::error::this machine runs only") is bool(expected)
