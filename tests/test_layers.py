"""The shape of the code: who may import whom, how long a module may be, what the command line may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULE_LINES = 310
EXPERIMENT_LINES = 140

# In reading order: a module may import only modules that stand before it. A new one is put at its place here.
ORDER = (
    *("lab", "lab.errors", "lab.dialect", "lab.read", "lab.read.jsonl", "lab.places"),
    *(
        "lab.hardware",
        "lab.hardware.model",
        "lab.hardware.nvml",
        "lab.hardware.gpus",
        "lab.hardware.sysfs",
        "lab.hardware.detect",
        "lab.hardware.choose",
        "lab.hardware.fabric",
        "lab.hardware.words",
        "lab.hardware.cpusets",
        "lab.hardware.placement",
        "lab.hardware.topo",
        "lab.telemetry",
        "lab.telemetry.gpucsv",
        "lab.telemetry.reader",
        "lab.telemetry.sampler",
    ),
    *(
        "lab.claims",
        "lab.metrics",
        "lab.workload",
        "lab.experiment",
        "lab.experiments",
        "lab.models",
        "lab.nano",
        "lab.dummymodel",
        "lab.modelfiles",
        "lab.modelcheck",
        "lab.weights",
    ),
    *(
        "lab.stackfile",
        "lab.stack",
        "lab.stacks",
        "lab.stacks.lock",
        "lab.stacks.python",
        "lab.stacks.run",
        "lab.stacks.check",
        "lab.stacks.build",
    ),
    *(
        "lab.images",
        "lab.images.engine",
        "lab.images.wheels",
        "lab.images.context",
        "lab.images.build",
        "lab.images.check",
    ),
    *(
        "lab.told",
        "lab.site",
        "lab.seats",
        "lab.fit",
        "lab.fitting",
        "lab.machine",
        "lab.rundir",
        "lab.digest",
        "lab.criteria",
        "lab.series",
        "lab.container",
        "lab.servable",
        "lab.plan",
        "lab.cost",
        "lab.planning",
        "lab.possible",
    ),
    *("lab.boxes", "lab.shell", "lab.scriptparts", "lab.dockerscript", "lab.commands"),
    *(
        "lab.runtime",
        "lab.runtime.base",
        "lab.runtime.launch",
        "lab.runtime.procfs",
        "lab.runtime.shm",
        "lab.runtime.owner",
        "lab.runtime.ledger",
    ),
    *(
        "lab.runtime.logtail",
        "lab.runtime.started",
        "lab.runtime.ports",
        "lab.runtime.waiting",
        "lab.runtime.interrupt",
        "lab.runtime.process",
        "lab.runtime.engine",
        "lab.runtime.contained",
        "lab.runtime.docker",
        "lab.runtime.gpulock",
        "lab.scratch",
    ),
    *("lab.load", "lab.load.host", "lab.load.chat"),
    *(
        "lab.probe",
        "lab.probe.labprobe",
        "lab.probe.labprobe.schema",
        "lab.probe.labprobe.settings",
        "lab.probe.labprobe.writer",
        "lab.probe.labprobe.nvtx",
        "lab.probe.labprobe.memory",
        "lab.probe.labprobe.guard",
        "lab.probe.labprobe.observer",
        "lab.probe.labprobe.bodies",
        "lab.probe.labprobe.tree",
        "lab.probe.labprobe.sglang05",
        "lab.probe.labprobe.sglang046",
        "lab.probe.labprobe.load",
        "lab.probe.startup.sitecustomize",
    ),
    *(
        "lab.read.logmessage",
        "lab.read.serverlog",
        "lab.read.prom",
        "lab.read.events",
        "lab.progress",
        "lab.server",
        "lab.client",
        "lab.gpuwatch",
        "lab.execute",
    ),
    *(
        "lab.lru",
        "lab.read.serverrecords",
        "lab.read.requestecho",
        "lab.read.requestlog",
        "lab.forwards",
        "lab.loads",
        "lab.validity",
        "lab.gpurows",
        "lab.probed",
        "lab.tables",
        "lab.stats",
        "lab.judge",
    ),
    *(
        "lab.report",
        "lab.report.numbers",
        "lab.report.style",
        "lab.report.plots",
        "lab.report.passplots",
        "lab.report.pictures",
        "lab.report.gpuplots",
        "lab.report.gpusection",
        "lab.report.render",
        "lab.report.index",
    ),
    *(
        "lab.doctor",
        "lab.doctor.finding",
        "lab.doctor.limits",
        "lab.doctor.gpus",
        "lab.doctor.engine",
        "lab.doctor.machine",
    ),
    *(
        "lab.choice",
        "lab.prepare",
        "lab.doctor.show",
        "lab.app",
        "lab.catalogue",
        "lab.imaging",
        "lab.resume",
        "lab.conduct",
        "lab.runall",
        "tasks",
    ),
)
ANALYSIS = (
    "lab.tables",
    "lab.stats",
    "lab.judge",
    "lab.report.render",
    "lab.report.plots",
    "lab.report.index",
)
DOING = (
    "lab.execute",
    "lab.client",
    "lab.server",
    "lab.runtime",
    "lab.scratch",
    "lab.stacks.build",
    "lab.images",
    "lab.progress",
    "lab.prepare",
    "lab.conduct",
    "lab.runall",
    "lab.imaging",
    "lab.app",
)


def files() -> dict[str, Path]:
    """Every module of the lab with its file; experiments all count as `lab.experiments`."""
    found = {"tasks": ROOT / "tasks.py"}
    for path in sorted((ROOT / "lab").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


FILES = files()


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the lab that `module` imports, anywhere in its file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the layers"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(name for name in found if name in FILES and name != module)


def place(module: str) -> int:
    name = "lab.experiments" if module.startswith("lab.experiments") else module
    assert name in ORDER, f"{module} is new: put it at its place in ORDER"
    return ORDER.index(name)


@pytest.mark.parametrize("module", FILES)
def test_no_import_goes_upward(module: str) -> None:
    for other in imports(module):
        assert place(other) < place(module), f"{module} imports {other}, which stands after it"


def test_the_order_names_no_module_that_is_gone() -> None:
    assert [name for name in ORDER if name not in FILES and name != "lab.experiments"] == []


@pytest.mark.parametrize("module", ANALYSIS)
def test_the_analysis_side_starts_nothing(module: str) -> None:
    """Tables, verdicts and reports are made on machines with neither server nor stack."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(imports(name))
    doing = {name for name in seen for part in DOING if name == part or name.startswith(f"{part}.")}
    assert doing == set()


def test_experiments_know_only_their_nouns() -> None:
    for module in FILES:
        if module.startswith("lab.experiments."):
            allowed = {"lab.claims", "lab.experiment", "lab.workload"}
            assert {m for m in imports(module) if m != "lab"} <= allowed, module


@pytest.mark.parametrize("module", FILES)
def test_modules_are_short(module: str) -> None:
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= (EXPERIMENT_LINES if module.startswith("lab.experiments.") else MODULE_LINES)


@pytest.mark.parametrize("module", FILES)
def test_modules_say_what_they_are(module: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8"))), "no docstring"


def test_the_command_line_imports_the_lab_only_inside_functions() -> None:
    tree = ast.parse(FILES["tasks"].read_text(encoding="utf-8"))
    tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in tops if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in tops if isinstance(n, ast.ImportFrom)}
    assert not any(name.split(".")[0] == "lab" for name in names)


def test_listing_the_tasks_loads_nothing_heavy() -> None:
    done = subprocess.run(
        (sys.executable, "-X", "importtime", "-m", "invoke", "--list"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "invoke" in loaded, "importtime printed nothing: this test would see nothing"
    assert (
        loaded & {"pandas", "numpy", "matplotlib", "scipy", "httpx", "rich", "msgspec", "psutil", "jinja2"}
        == set()
    )
