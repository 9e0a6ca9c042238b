"""Reads the files of .github/: paths, parsed workflows, and the steps that hold shell code."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())


def parse(text: str) -> dict:
    """A workflow's text as YAML 1.2, in which `on` is a word."""
    return YAML(typ="safe").load(text)


def workflow(name: str) -> dict:
    """The workflow file of that name, parsed."""
    return parse((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def steps_with_shell() -> list[tuple[str, str, str]]:
    """File, name and shell code of every step that has some."""
    return [
        (path.name, step["name"], step["run"])
        for path in WORKFLOWS
        for job in workflow(path.name)["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
