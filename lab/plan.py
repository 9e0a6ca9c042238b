"""The plan: everything that will be done, resolved before anything starts. Pure functions, no clock, no disk
(but for `read_plan`).

`make_plan` turns experiment, stack, model and site into a `Plan`; `to_json`/`from_json` store it, and
`commands.py` writes it as a shell script. Paths and numbers that only a machine or a running trial knows stand in argv
as `${NAME}` placeholders, the same in plan.json and in the script; `Plan.places` gives those of the machine."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from lab.claims import Claim
from lab.container import Setup
from lab.dialect import Dialect, get_dialect
from lab.errors import LabError
from lab.experiment import Experiment, Source
from lab.models import Model
from lab.rundir import SCHEMA, Run, refuse_newer
from lab.seats import Seat
from lab.servable import left_out_of, without
from lab.site import Site
from lab.stack import Stack
from lab.told import COMMON_ENV, gpu_env
from lab.workload import Workload

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
    before it was noted).
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

    `left_out` are variants that cannot be served, with the reasons, and `weights` says where the model's come from
    (`lab/weights.py`); a file lacks the keys where none is left out and where the lab made them.
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
    capabilities: tuple[str, ...]
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
    weights: str = "built"


def make_plan(
    source: Source,
    *,
    stack: Stack,
    model: Model,
    model_sha256: str,
    site: Site,
    places: dict[str, str],
    containers: Setup | None = None,
    seats: Mapping[str, Seat] | None = None,
    repeats: int | None = None,
    seed: int = 1,
    weights: str = "built",
    unfit: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve an experiment. Each repeat visits every variant once, in an order drawn with `seed`.

    `containers` is what the containers share where the site's runtime is docker; `seats` says where each variant
    sits, without it nothing is bound but the site's CPUs. `unfit` are variants that the model does not fit into.
    """
    experiment = source.experiment
    count = experiment.repeats if repeats is None else repeats
    if not 1 <= count <= 100:
        raise LabError(
            f"--repeats {count} makes no sense",
            why="each repeat is a trial of every variant",
            fix="use 1 to 100",
        )
    dialect = get_dialect(stack.dialect)
    left_out = left_out_of(experiment, stack=stack, dialect=dialect, unfit=unfit)
    drawn = ("--load-format", "dummy") if weights == "dummy" else ()
    served = replace(without(experiment, left_out), server=(*drawn, *experiment.server))
    return Plan(
        schema=SCHEMA,
        experiment=experiment.name,
        question=experiment.question,
        experiment_sha256=source.sha256,
        stack=stack.name,
        stack_lock=stack.lock_hash,
        sglang=stack.sglang,
        model=model.name,
        model_sha256=model_sha256,
        site=site.name,
        runtime=site.runtime,
        capabilities=site.capabilities,
        repeats=count,
        seed=seed,
        port=site.port,
        ready_s=site.ready_s,
        load_s=site.load_s,
        stop_s=site.stop_s,
        places=places,
        preload=dialect.preload,
        trials=_trials(served, stack=stack, site=site, seats=seats, repeats=count, seed=seed),
        claims=experiment.claims,
        containers=containers,
        left_out=left_out,
        weights=weights,
    )


def _trials(
    experiment: Experiment,
    *,
    stack: Stack,
    site: Site,
    seats: Mapping[str, Seat] | None,
    repeats: int,
    seed: int,
) -> tuple[Trial, ...]:
    dialect = get_dialect(stack.dialect)
    draw = random.Random(seed)  # noqa: S311  an order of trials, not a secret
    trials: list[Trial] = []
    # In a container the loopback is the container's own, and the engine leads the host's loopback to its port.
    listen = "0.0.0.0" if site.runtime == "docker" else "127.0.0.1"  # noqa: S104
    for repeat in range(repeats):
        for variant in draw.sample(experiment.variants, k=len(experiment.variants)):
            argv = (
                *("${STACK}/bin/python", "-m", "sglang.launch_server", "--model-path", "${MODEL}"),
                *("--host", listen, "--port", "${PORT}"),
                *(*stack.server_args, *stack.observe_args, *experiment.server, *variant.args),
            )
            env = (*COMMON_ENV, *stack.env)
            seat = seats[variant.name] if seats is not None else _unseated(site)
            cache_on = "--disable-radix-cache" not in argv
            trials.append(
                Trial(
                    index=len(trials),
                    name=f"{len(trials):03d}-{variant.name}-r{repeat}",
                    variant=variant.name,
                    repeat=repeat,
                    server=Process(
                        argv=argv,
                        env=(*env, *dialect.server_env, *gpu_env(seat.gpus)),
                        cpus=seat.server_cpus,
                        mems=seat.server_mems,
                        gpus=seat.gpus,
                    ),
                    client=Process(
                        argv=("${STACK}/bin/python",),
                        env=(*env, *gpu_env(())),
                        cpus=seat.client_cpus,
                        mems=seat.client_mems,
                    ),
                    placed=seat.reason,
                    sampler_cpus=seat.sampler_cpus,
                    loads=tuple(
                        _step(load, repeat=repeat, cache_on=cache_on, dialect=dialect)
                        for load in experiment.loads_of(variant.name)
                    ),
                )
            )
    return tuple(trials)


def _unseated(site: Site) -> Seat:
    return Seat(server_cpus=site.server_cpus, client_cpus=site.client_cpus)


def _step(load: Workload, *, repeat: int, cache_on: bool, dialect: Dialect) -> LoadStep:
    return LoadStep(
        name=load.name,
        dataset=load.dataset,
        role=load.role,
        argv=dialect.client(load.argv(repeat)),
        requests=load.requests(),
        concurrency=load.concurrency,
        rate_per_s=load.rate_per_s,
        hit_rate=load.hit_rate(cache_on=cache_on),
        working_set_tokens=load.working_set_tokens(),
        output_tokens=load.output_tokens,
    )


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
    if plan.weights == "built":
        del said["weights"]
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
