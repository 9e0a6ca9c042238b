"""A plan as a shell script: `bash commands.sh` repeats the run with bash, curl and the stack (or, where it ran in
containers, Docker: see `dockerscript`), without the lab.

The script does what `execute` does, in the same order and with the same arguments; a golden test holds both
together. Its results go to a folder of their own and never into the run."""

from __future__ import annotations

import shlex

from lab import dockerscript
from lab.plan import PLACEHOLDERS, LoadStep, Plan, Process, Trial
from lab.scriptparts import client_process, deadlines, functions, trials
from lab.shell import by_flag, wrapped

HEAD = """\
#!/usr/bin/env bash
# Repeats one run of the experiment {experiment!r} without the lab: SGLang {sglang}, model {model}.
# Needs bash, curl and the folders below. Results go to OUT, one folder a trial.
set -euo pipefail

{places}
OUT=${{OUT:-$PWD/repeat-$(date -u +%Y%m%dT%H%M%SZ)}}
PORT=${{PORT:-{port}}}
READY_S={ready_s:g}

SCRATCH=$(mktemp -d)
SERVER=
stop_server() {{
  if [ -n "$SERVER" ] && kill -0 "$SERVER" 2>/dev/null; then
    kill -INT "$SERVER"
    for _ in $(seq {stop_polls}); do kill -0 "$SERVER" 2>/dev/null || break; sleep 0.2; done
    kill -KILL -- "-$SERVER" 2>/dev/null || true
    wait "$SERVER" 2>/dev/null || true
  fi
  SERVER=
}}
trap 'stop_server; rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT TERM

{functions}"""


def script(plan: Plan) -> str:
    """The whole script."""
    if plan.containers is not None:
        return dockerscript.script(plan, plan.containers)
    head = HEAD.format(
        experiment=plan.experiment,
        sglang=plan.sglang,
        model=plan.model,
        places="\n".join(f"{name}=${{{name}:-{shlex.quote(path)}}}" for name, path in plan.places.items()),
        port=plan.port or 31999,
        functions=functions(plan, running='kill -0 "$SERVER" 2>/dev/null'),
        **deadlines(plan),
    )
    return head + trials(plan, start=_start, load=_load)


def _start(trial: Trial) -> tuple[str, ...]:
    return (f"setsid {command(trial.server)} \\", '  > "$TRIAL/server.log" 2>&1 &', "SERVER=$!")


def _load(trial: Trial, step: LoadStep) -> tuple[str, ...]:
    return (f"{command(client_process(trial, step))} \\", '  >> "$LOAD/client.log" 2>&1')


def command(process: Process) -> str:
    """A process as one shell command with its whole environment, wrapped at the flags."""
    pin = ("taskset", "-c", ",".join(map(str, process.cpus))) if process.cpus else ()
    bind = ("numactl", f"--membind={','.join(map(str, process.mems))}") if process.mems else ()
    words = ["env", "-i", *(f"{key}={value}" for key, value in process.env), *bind, *pin, *process.argv]
    return wrapped(by_flag(words, also=("${STACK}/bin/python", "taskset", "numactl")), names=PLACEHOLDERS)
