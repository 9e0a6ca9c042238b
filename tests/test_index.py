"""The index of all runs: newest first, nothing hidden, and no run that can break it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import make_copy, snapshot
from fakerun import NAME, make_run

from lab.criteria import Box
from lab.digest import read_digest
from lab.report.index import index_page, write_index
from lab.report.render import analyse
from lab.rundir import SCHEMA, Run, list_runs, seal, write_json

BOXES = (
    Box(text="Understood: hits", asks="Does it hit?", claims=(("small", "hits"), ("small", "faster"))),
    Box(
        text="Seen: all", asks="And the rest?", claims=(("small", "hits"), ("other", "gone"), ("never", "x"))
    ),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was sealed and reported."""
    run = make_run(tmp_path_factory.mktemp("good"))
    seal(run)
    analyse(run)
    return run


@pytest.fixture
def root(tmp_path: Path, good: Run) -> Path:
    """A folder of runs with the good one in it."""
    copied(good, tmp_path / "runs", NAME)
    return tmp_path / "runs"


def copied(run: Run, root: Path, name: str, *, experiment: str = "small") -> Run:
    shutil.copytree(run.path, root / experiment / name)
    other = Run(root / experiment / name)
    for path in other.path.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    return other


def page(root: Path) -> str:
    digests = [read_digest(run) for run in list_runs(root)]
    return index_page(digests, experiments=("small", "other", "never"), boxes=BOXES)


# ---- runs that have no result


def no_plan(run: Run) -> None:
    run.plan.unlink()


def cut_plan(run: Run) -> None:
    run.plan.write_text(run.plan.read_text()[:2000])


def newer_plan(run: Run) -> None:
    run.plan.write_text(json.dumps({"schema": SCHEMA + 1, "trials": "of another kind"}))


def garbage_plan(run: Run) -> None:
    run.plan.write_bytes(b"\xff\xfe\x00")


def plan_is_a_folder(run: Run) -> None:
    run.plan.unlink()
    run.plan.mkdir()


def not_sealed(run: Run) -> None:
    run.sums.unlink()
    status = run.trial(sorted(p.name for p in run.trials.iterdir())[-1]).status
    status.write_text('{"schema": 1, "sta')


def not_reported(run: Run) -> None:
    run.verdicts.unlink()


def cut_verdicts(run: Run) -> None:
    run.verdicts.write_text(run.verdicts.read_text()[:100])


def newer_verdicts(run: Run) -> None:
    run.verdicts.write_text(json.dumps({"schema": SCHEMA + 1, "verdicts": []}))


def strange_verdicts(run: Run) -> None:
    write_json(run.verdicts, {"verdicts": [{"claim": "hits", "outcome": "maybe", "reason": ""}]})


DAMAGE: dict[str, tuple[Callable[[Run], None], str, str]] = {
    "no plan": (no_plan, "unreadable", "plan.json cannot be read: No such file or directory"),
    "cut plan": (cut_plan, "unreadable", "plan.json is not a plan of this lab (Input data was truncated)"),
    "newer plan": (
        newer_plan,
        "unreadable",
        f"plan.json has schema {SCHEMA + 1}, this lab knows up to {SCHEMA}",
    ),
    "garbage": (garbage_plan, "unreadable", "plan.json is not a plan of this lab"),
    "folder": (plan_is_a_folder, "unreadable", "plan.json cannot be read: Is a directory"),
    "not sealed": (not_sealed, "cut short", "cut short, or is still running: 3 of 4 trials are ok"),
    "not reported": (not_reported, "unreported", "it was measured and not reported"),
    "cut verdicts": (cut_verdicts, "unreadable", "verdicts.json is not readable JSON"),
    "newer verdicts": (newer_verdicts, "unreadable", f"verdicts.json has schema {SCHEMA + 1}"),
    "strange verdicts": (strange_verdicts, "unreadable", "verdicts.json holds no verdicts of this lab"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_without_a_result_is_listed_with_the_reason(root: Path, good: Run, name: str) -> None:
    damage, state, problem = DAMAGE[name]
    run = copied(good, root, "20260103T030405Z-0000")
    damage(run)
    digest = read_digest(run)
    assert digest.state == state
    assert problem in digest.problem
    text = page(root)
    (row,) = [line for line in text.splitlines() if "20260103T030405Z-0000" in line]
    assert problem.replace("|", "\\|") in row
    assert f"[small](small/{NAME}/report.md)" in text, "the newest run with a result still stands on top"
    assert "(1 newer without a result, below)" in text


def test_tables_and_environment_may_be_gone(root: Path) -> None:
    run = list_runs(root)[0]
    shutil.rmtree(run.tables)
    run.environment.write_text("{")
    digest = read_digest(run)
    assert digest.state == "reported"
    assert digest.used_of() == "? of 4"
    assert digest.machine == "? CPUs of an unknown kind, no GPU"


def test_gpus_are_named(root: Path) -> None:
    run = list_runs(root)[0]
    plan = json.loads(run.plan.read_text())
    plan["trials"][0]["server"]["gpus"] = ["GPU-1", "GPU-2"]
    run.plan.write_text(json.dumps(plan))
    assert read_digest(run).machine.endswith(", 2 GPUs")
    listed = [{"uuid": f"GPU-{i}", "name": "NVIDIA A100"} for i in range(4)]
    run.hardware.write_text(json.dumps({"schema": 1, "gpus": listed}))
    assert read_digest(run).machine.endswith(", 2 GPUs NVIDIA A100")


def test_a_load_with_small_numbers_is_said(root: Path) -> None:
    run = list_runs(root)[0]
    assert "| as written |" in page(root)
    plan = json.loads(run.plan.read_text())
    plan["trials"][1]["loads"][0]["scaled"] = "prompts 40 instead of 100"
    run.plan.write_text(json.dumps({**plan, "something": "of a later lab"}))
    assert read_digest(run).scaled
    assert "| scaled down |" in page(root)


def test_what_a_claim_lacks_comes_from_the_plan(root: Path) -> None:
    run = list_runs(root)[0]
    plan = json.loads(run.plan.read_text())
    plan["claims"][0]["needs"] = ["gpu", "nsys"]
    plan["capabilities"] = ["gpu"]
    run.plan.write_text(json.dumps(plan))
    assert read_digest(run).answers["hits"].lacking == (), "held needs nothing more"
    verdicts = json.loads(run.verdicts.read_text())
    verdicts["verdicts"][0] |= {"outcome": "untested", "reason": "this machine has no nsys"}
    run.verdicts.write_text(json.dumps(verdicts))
    assert read_digest(run).answers["hits"].lacking == ("nsys",)
    assert "untested, for want of nsys: small [hits]" in page(root)


# ---- the page


@pytest.fixture
def full(root: Path, good: Run) -> Path:
    """Runs of every kind: two of one experiment with a result, others without, one of another experiment, and strangers."""
    copied(good, root, "20260104T030405Z-0004")
    cut_plan(copied(good, root, "20260105T030405Z-0005"))
    not_sealed(copied(good, root, "20260106T030405Z-0006"))
    not_reported(copied(good, root, "20260103T030405Z-0003"))
    newer_plan(copied(good, root, "20260101T030405Z-0001", experiment="other"))
    copied(good, root, "20260102T030405Z-0002", experiment="other")
    (root / "all").mkdir()
    (root / "all" / "20260102T030405Z-ab12.json").write_text("{")
    (root / "notes.txt").write_text("mine\n")
    return root


def test_golden_index(full: Path, golden: Callable[[str, str], None]) -> None:
    golden("index.md", page(full))


def test_the_page_is_the_same_twice_and_changes_no_run(full: Path) -> None:
    before = snapshot(full)
    first = write_index(full, experiments=("small",)).read_text()
    assert write_index(full, experiments=("small",)).read_text() == first
    assert {k: v for k, v in snapshot(full).items() if k != "index.md"} == before


def test_every_run_stands_on_the_page_once_more_or_less(full: Path) -> None:
    text = page(full)
    table = text[text.index("## Newest run") :]
    for run in list_runs(full):
        assert f"{run.path.parent.name}/{run.path.name}" in table


def test_links_lead_to_files_and_claims_that_are_there(full: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([\w-]+))?\)", page(full))
    assert any(anchor for _, anchor in links)
    for target, anchor in links:
        text = (full / target).read_text()
        assert not anchor or f'<a id="{anchor}"></a>' in text, f"{target} has no {anchor}"


def test_no_run_at_all(tmp_path: Path) -> None:
    text = page(tmp_path / "nowhere")
    assert "0 runs." in text
    assert "`invoke exp.never`, `invoke exp.other`, `invoke exp.small`" in text
    assert "- [ ] **Understood: hits**: 0 of 2 claims answered" in text


def test_the_command_line_writes_it_and_trips_over_nothing(tmp_path: Path, good: Run) -> None:
    copy = make_copy(tmp_path)
    runs = copy.root / "runs"
    copied(good, runs, NAME)
    cut_plan(copied(good, runs, "20260101T030405Z-0000"))
    (runs / "all").mkdir()
    (runs / "all" / "20260102T030405Z-ab12.json").write_text("{")
    done = copy.invoke("report")
    assert done.code == 0, done.text
    assert done.out.splitlines()[-2:] == [f"report: runs/small/{NAME}/report.md", "index: runs/index.md"]
    text = (runs / "index.md").read_text()
    assert "`invoke exp.radix`" in text
    assert "Measured: Prefill vs decode kernel characteristics" in text
    assert len(copy.invoke("runs").out.splitlines()) == 2
    assert copy.invoke("clean").code == 0
    assert (runs / "all" / "20260102T030405Z-ab12.json").read_text() == "{"
