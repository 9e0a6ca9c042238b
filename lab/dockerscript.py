"""A plan for containers as a shell script: what `commands.py` is for processes. Its `docker run` lines are made from
the same `Container`s that the lab gives to the engine, with shell variables for what only a machine knows."""

from __future__ import annotations

import shlex
from dataclasses import replace

from lab.boxes import VALUES, Folders, Names, container
from lab.container import RUN_LABEL, Container, Setup, run_words, volume_options
from lab.plan import LoadStep, Plan, Process, Trial, fill
from lab.scriptparts import client_process, deadlines, functions, trials
from lab.shell import by_flag, wrapped

NAMES = Names(run_id="${ID}")
VARIABLES = ("ID", "CALLER", "IMAGE", "SERVER", "MODEL", "LAB", "JIT", "TRIAL", "SCRATCH")
FOLDERS = Folders(trial="${TRIAL}", scratch="${SCRATCH}")

FIND_PORT = """\
  PORT=$(docker port "$SERVER" 30000/tcp | head -n 1); PORT=${PORT##*:}
"""

HEAD = """\
#!/usr/bin/env bash
# Repeats one run of the experiment {experiment!r} without the lab: SGLang {sglang}, model {model}.
# Needs bash, curl, Docker with the image {image_name}, and the folders below. Results go to OUT, one folder a trial.
set -euo pipefail

IMAGE=${{IMAGE:-{image}}}
MODEL=${{MODEL:-{model_folder}}}
LAB=${{LAB:-{lab}}}
JIT=${{JIT:-{jit}}}
OUT=${{OUT:-$PWD/repeat-$(date -u +%Y%m%dT%H%M%SZ)}}
READY_S={ready_s:g}

ID=repeat-$$-$(date +%s)
CALLER=$(id -u):$(id -g)
SCRATCH=$(mktemp -d)
SERVER=
stop_server() {{
  if [ -n "$SERVER" ]; then
    docker kill --signal SIGINT "$SERVER" > /dev/null 2>&1 || true
    for _ in $(seq {stop_polls}); do running || break; sleep 0.2; done
    docker rm --force "$SERVER" > /dev/null
  fi
  SERVER=
}}
running() {{ [ "$(docker inspect --format '{{{{.State.Running}}}}' "$SERVER")" = true ]; }}
clean_up() {{
  docker ps --all --quiet --filter "label={label}=$ID" | xargs -r docker rm --force > /dev/null
  docker network ls --quiet --filter "label={label}=$ID" | xargs -r docker network rm > /dev/null
  docker volume ls --quiet --filter "label={label}=$ID" | xargs -r docker volume rm > /dev/null
  rm -rf "$SCRATCH"
}}
trap clean_up EXIT
trap 'exit 130' INT TERM

{functions}
mkdir -p "$JIT"
docker network create --driver bridge --label "{label}=$ID" "{network}" > /dev/null
{volumes}
"""


def script(plan: Plan, setup: Setup) -> str:
    """The whole script."""
    head = HEAD.format(
        experiment=plan.experiment,
        sglang=plan.sglang,
        model=plan.model,
        image=setup.image,
        image_name=setup.image_name,
        model_folder=shlex.quote(setup.model),
        lab=shlex.quote(setup.lab),
        jit=shlex.quote(setup.jit),
        functions=functions(plan, running="running", find_port=FIND_PORT),
        **deadlines(plan),
        label=RUN_LABEL,
        network=NAMES.network,
        volumes="\n".join((_volume(NAMES.model, "${MODEL}"), _volume(NAMES.jit, "${JIT}"))),
    )
    return head + trials(
        plan,
        start=lambda trial: _start(trial, setup=setup, publish=plan.port),
        load=lambda trial, step: (_run("--rm", client_container(trial, step, setup=setup)),),
    )


def _volume(name: str, folder: str) -> str:
    options = [("--opt", f"{key}={value}") for key, value in volume_options(folder).items()]
    lines = [
        ("docker", "volume", "create", "--driver", "local", "--label", f"{RUN_LABEL}=${{ID}}"),
        *options,
        (name,),
    ]
    return f"{wrapped(lines, names=VARIABLES)} > /dev/null"


def _start(trial: Trial, *, setup: Setup, publish: int) -> tuple[str, ...]:
    server = server_container(trial, setup=setup, publish=publish)
    return (f'SERVER="{server.name}"', f"{_run('--detach', server)} > /dev/null")


def _run(how: str, box: Container) -> str:
    *options, command = run_words(box)
    python = f"{VALUES['STACK']}/bin/python"
    return wrapped([("docker", "run", how), *options, *by_flag(command, also=(python,))], names=VARIABLES)


def server_container(trial: Trial, *, setup: Setup, publish: int) -> Container:
    """The server's container of a trial, with `${NAME}` for what only the shell knows."""
    return container(
        f"{trial.index:03d}-server",
        _filled(trial.server, VALUES),
        setup=_variables(setup),
        names=NAMES,
        folders=FOLDERS,
        network=NAMES.network,
        user="${CALLER}",
        log="server.log",
        publish=publish,
    )


def client_container(trial: Trial, step: LoadStep, *, setup: Setup) -> Container:
    """The container that runs one load."""
    load = f"loads/{step.name}"
    values = {**VALUES, "LOAD": f"{VALUES['TRIAL']}/{load}"}
    return container(
        f"{trial.index:03d}-{step.name}",
        _filled(client_process(trial, step), values),
        setup=_variables(setup),
        names=NAMES,
        folders=FOLDERS,
        network="container:${SERVER}",
        user="${CALLER}",
        log=f"{load}/client.log",
    )


def _filled(process: Process, values: dict[str, str]) -> Process:
    return replace(
        process,
        argv=tuple(fill(word, values) for word in process.argv),
        env=tuple((key, fill(value, values)) for key, value in process.env),
    )


def _variables(setup: Setup) -> Setup:
    return replace(setup, image="${IMAGE}", model="${MODEL}", lab="${LAB}", jit="${JIT}")
