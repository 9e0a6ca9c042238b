"""A plan as a shell script: `bash commands.sh` repeats the run with bash, curl and the stack (or, where it ran in
containers, Docker: see `dockerscript`), without the lab.

The script does what `execute` does, in the same order and with the same arguments; a golden test holds both
together. Its results go to a folder of their own and never into the run."""

from __future__ import annotations

import shlex

from lab import dockerscript
from lab.dialect import dialect_of
from lab.plan import PLACEHOLDERS, LoadStep, Plan, Process, Trial
from lab.shell import asked_of_server, by_flag, wrapped

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

wait_ready() {{
  for _ in $(seq $((READY_S * 5))); do
    kill -0 "$SERVER" 2>/dev/null || {{ tail -n 20 "$TRIAL/server.log"; echo "the server ended" >&2; exit 1; }}
    {ready} && return
    sleep 0.2
  done
  echo "the server was not ready after $READY_S s" >&2; exit 1
}}

begin_load() {{
  LOAD=$TRIAL/loads/$1; mkdir -p "$LOAD"
  echo "  load $1"
  curl -sf -X POST -o "$LOAD/flush" "http://127.0.0.1:$PORT{flush}"
  curl -sf -o "$LOAD/metrics-before.prom" "http://127.0.0.1:$PORT{metrics}"
}}

end_load() {{ sleep 0.5; curl -sf -o "$LOAD/metrics-after.prom" "http://127.0.0.1:$PORT{metrics}"; }}
"""


def script(plan: Plan) -> str:
    """The whole script."""
    if plan.containers is not None:
        return dockerscript.script(plan, plan.containers)
    places = "\n".join(f"{name}=${{{name}:-{shlex.quote(path)}}}" for name, path in plan.places.items())
    head = HEAD.format(
        experiment=plan.experiment,
        sglang=plan.sglang,
        model=plan.model,
        places=places,
        port=plan.port or 31999,
        ready_s=max(1, int(plan.ready_s)),
        stop_polls=max(1, int(plan.stop_s * 5)),
        **asked_of_server(dialect_of(plan.sglang)),
    )
    return head + "".join(_trial(plan, trial) for trial in plan.trials) + '\necho "results are in $OUT"\n'


def _trial(plan: Plan, trial: Trial) -> str:
    lines = [
        "",
        f"# ---- trial {trial.index + 1} of {len(plan.trials)}: {trial.variant}, repeat {trial.repeat}",
        f'TRIAL=$OUT/{trial.name}; mkdir -p "$TRIAL"',
        'rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"',
        f'echo "trial {trial.name}"',
        f"setsid {command(trial.server)} \\",
        '  > "$TRIAL/server.log" 2>&1 &',
        "SERVER=$!",
        "wait_ready",
    ]
    for step in trial.loads:
        lines += [
            f"begin_load {step.name}",
            f"{_client(trial, step)} \\",
            '  >> "$LOAD/client.log" 2>&1',
            "end_load",
        ]
    return "\n".join([*lines, "stop_server", ""])


def _client(trial: Trial, step: LoadStep) -> str:
    process = Process(argv=(*trial.client.argv, *step.argv), env=trial.client.env, cpus=trial.client.cpus)
    return command(process)


def command(process: Process) -> str:
    """A process as one shell command with its whole environment, wrapped at the flags."""
    pin = ("taskset", "-c", ",".join(map(str, process.cpus))) if process.cpus else ()
    bind = ("numactl", f"--membind={','.join(map(str, process.mems))}") if process.mems else ()
    words = ["env", "-i", *(f"{key}={value}" for key, value in process.env), *bind, *pin, *process.argv]
    return wrapped(by_flag(words, also=("${STACK}/bin/python", "taskset", "numactl")), names=PLACEHOLDERS)
