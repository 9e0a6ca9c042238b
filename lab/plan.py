"""The plan: everything that will be done, resolved before anything starts, as data. Pure functions, no clock, no disk
(but for `read_plan`).

`planning.make_plan` makes a `Plan`; `to_json`/`from_json` store it, and
`commands.py` writes it as a shell script. Paths and numbers that only a machine or a running trial knows stand in argv
as `${NAME}` placeholders, the same in plan.json and in the script; `Plan.places` gives those of the machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import msgspec

from lab.claims import Capability, Claim
from lab.container import Setup
from lab.errors import LabError
from lab.experiment import Probe
from lab.rundir import Run, refuse_newer
from lab.site import Scale

PLACEHOLDERS = {
    "STACK": "folder of the built software stack",
    "MODEL": "folder of the model",
    "LAB": "the lab's Python package, for its client programs and texts",
    "JIT": "a folder that keeps what kernels were compiled at run time",
    "TRIAL": "the trial's folder",
    "LOAD": "the load's folder",
    "SCRATCH": "a short-lived folder of the trial: HOME and TMPDIR of its processes",
    "PORT": "the server's port on loopback",
}
PLACEHOLDER = re.compile(r"\$\{(" + "|".join(PLACEHOLDERS) + r")\}")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process to start: placeholders in `argv` and `env` are filled in when the trial runs.

    `cpus` are CPU numbers and `mems` NUMA nodes, empty for all; `gpus` are UUIDs in the order of ranks;
    `profiler` names what watches the process, if anything does.
    """

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cpus: tuple[int, ...]
    mems: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    profiler: str = ""


@dataclass(frozen=True, kw_only=True)
class LoadStep:
    """One load of a trial: the client's argv, and what the workload predicts.

    `hit_rate` is cached over prompt tokens with an unbounded cache (0..1); `working_set_tokens` against the
    pool tells whether eviction is expected; `output_tokens` is the length of every answer (None in plans of
    before it was noted). `scaled` says what is smaller here than in the experiment's file;
    `eviction` is how the server's tree chooses what to forget.
    """

    name: str
    dataset: str
    role: str
    argv: tuple[str, ...]
    requests: int
    concurrency: int
    rate_per_s: float | None
    hit_rate: float
    working_set_tokens: int
    output_tokens: int | None = None
    scaled: str = ""
    eviction: str = "lru"

    @property
    def one_by_one(self) -> bool:
        """Whether a request is sent only when the one before has ended, so that their order is known."""
        return self.concurrency == 1 and self.rate_per_s is None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One variant, one repeat, one fresh server; `placed` says why it sits where it does."""

    index: int
    name: str
    variant: str
    repeat: int
    server: Process
    client: Process
    loads: tuple[LoadStep, ...]
    placed: str = ""
    sampler_cpus: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment resolved for a site, a stack and a model. Seconds in the deadlines.

    `left_out` are variants that this SGLang or this machine cannot serve, with the reasons; a file without any lacks the
    key. `scale` is "small" where loads with small numbers took those, `probe` how much is written down
    inside the servers. `variants` are those that run, in the experiment's order: the first one's answers are what
    the others' are compared with. `weights` says where the model's come from (`lab/weights.py`).
    """

    schema: int
    experiment: str
    question: str
    experiment_sha256: str
    stack: str
    stack_lock: str
    sglang: str
    model: str
    model_sha256: str
    site: str
    runtime: str
    capabilities: tuple[Capability, ...]
    repeats: int
    seed: int
    port: int
    ready_s: float
    load_s: float
    stop_s: float
    places: dict[str, str]
    preload: tuple[str, ...]
    trials: tuple[Trial, ...]
    claims: tuple[Claim, ...]
    containers: Setup | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    scale: Scale = "full"
    probe: Probe = "off"
    variants: tuple[str, ...] = ()
    weights: str = "built"


def fill(text: str, values: dict[str, str]) -> str:
    """Replace the placeholders in `text`; one without a value is our bug and raises KeyError.

    Any other dollar sign or name in braces, such as in a question of the chat load, stays as it is.
    """
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)


def to_json(plan: Plan) -> str:
    """The plan as text, the same for the same plan."""
    said = msgspec.to_builtins(plan)
    if not plan.left_out:
        del said["left_out"]
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, *, where: str) -> Plan:
    """Read a plan back, every field checked by type."""
    try:
        raw = msgspec.json.decode(text)
        if isinstance(raw, dict) and isinstance(raw.get("schema"), int):
            refuse_newer(raw["schema"], where=where)
        return msgspec.convert(raw, Plan)
    except msgspec.MsgspecError as error:
        raise LabError(
            f"{where} is not a plan of this lab",
            why=f"{error}; it was cut short or changed",
            fix="restore the file, or start a new run",
        ) from error


def read_plan(run: Run) -> Plan:
    """The plan of a run, checked."""
    if not run.plan.is_file():
        raise LabError(
            f"run {run.path.name} has no plan.json", why="it was cut short or damaged", fix="start a new run"
        )
    return from_json(run.plan.read_text(encoding="utf-8", errors="replace"), where=run.plan.name)
