"""From an experiment to a `Plan`: in go experiment, stack, model, site and seats, out comes everything that will be done.
Pure: no clock, no disk."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from lab.container import Setup
from lab.dialect import Dialect, get_dialect
from lab.errors import LabError
from lab.experiment import Experiment, Source
from lab.models import Model
from lab.plan import LoadStep, Plan, Process, Trial
from lab.rundir import SCHEMA
from lab.seats import Seat
from lab.servable import left_out_of, without
from lab.site import Scale, Site
from lab.stack import Stack
from lab.told import COMMON_ENV, gpu_env, probe_env, rank_env
from lab.workload import Workload


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
    left_out: Mapping[str, str] | None = None,
    weights: str = "built",
    repeats: int | None = None,
    seed: int = 1,
) -> Plan:
    """Resolve an experiment. Each repeat visits every variant once, in an order drawn with `seed`.

    `containers` is what the containers share where the site's runtime is docker; `seats` says where each variant
    sits, without it nothing is bound but the site's CPUs; `left_out` are variants that cannot be served here
    (`lab.possible`), beside those that this SGLang cannot. `weights` "dummy" has SGLang draw them.
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
    without_these = {
        **left_out_of(experiment, stack=stack, dialect=dialect, capabilities=site.capabilities),
        **(left_out or {}),
    }
    scale = scale_of(site, stack=stack)
    drawn = ("--load-format", "dummy") if weights == "dummy" else ()
    running = replace(without(experiment, without_these), server=(*drawn, *experiment.server))
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
        trials=_trials(
            running,
            stack=stack,
            site=site,
            seats=seats,
            scale=scale,
            repeats=count,
            seed=seed,
        ),
        claims=experiment.claims,
        containers=containers,
        left_out=without_these,
        scale=scale,
        probe=experiment.probe,
        variants=tuple(variant.name for variant in running.variants),
        weights=weights,
    )


def scale_of(site: Site, *, stack: Stack) -> Scale:
    """The site's scale; where it names none, small for servers without a GPU."""
    return site.scale or ("small" if stack.device == "cpu" else "full")


def _trials(
    experiment: Experiment,
    *,
    stack: Stack,
    site: Site,
    seats: Mapping[str, Seat] | None,
    scale: Scale,
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
            trials.append(
                Trial(
                    index=len(trials),
                    name=f"{len(trials):03d}-{variant.name}-r{repeat}",
                    variant=variant.name,
                    repeat=repeat,
                    server=Process(
                        argv=argv,
                        env=(
                            *(*env, *dialect.server_env),
                            *(*gpu_env(seat.cuda_numbers), *rank_env(seat.rank_cpus)),
                            *probe_env(experiment.probe, path=dialect.probe_path),
                        ),
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
                        _step(load, argv=argv, repeat=repeat, dialect=dialect, scale=scale)
                        for load in experiment.loads_of(variant.name)
                    ),
                )
            )
    return tuple(trials)


def _unseated(site: Site) -> Seat:
    return Seat(server_cpus=site.server_cpus, client_cpus=site.client_cpus)


def _step(load: Workload, *, argv: tuple[str, ...], repeat: int, dialect: Dialect, scale: Scale) -> LoadStep:
    """The load against a server of these arguments."""
    scaled = load.said_scaled() if scale == "small" else ""
    if scaled:
        load = load.scaled()
    return LoadStep(
        name=load.name,
        dataset=load.dataset,
        role=load.role,
        argv=dialect.client(load.argv(repeat)),
        requests=load.requests(),
        concurrency=load.concurrency,
        rate_per_s=load.rate_per_s,
        hit_rate=load.hit_rate(cache_on="--disable-radix-cache" not in argv),
        working_set_tokens=load.working_set_tokens(),
        output_tokens=load.output_tokens,
        scaled=scaled,
        eviction=dict(pairwise(argv)).get("--radix-eviction-policy", "lru"),
    )
