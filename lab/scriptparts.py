"""What the script of a run on processes (`commands`) and of one in containers (`dockerscript`) have in common: waiting for the
server, the calls around a load, the frame of a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lab.dialect import dialect_of
from lab.plan import LoadStep, Plan, Process, Trial
from lab.shell import asked_of_server

FUNCTIONS = """\
wait_ready() {{
{find_port}  for _ in $(seq $((READY_S * 5))); do
    {running} || {{ tail -n 20 "$TRIAL/server.log"; echo "the server ended" >&2; exit 1; }}
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


def functions(plan: Plan, *, running: str, find_port: str = "") -> str:
    """`wait_ready`, `begin_load`, `end_load`; `running` is a command that succeeds while the server runs."""
    return FUNCTIONS.format(running=running, find_port=find_port, **asked_of_server(dialect_of(plan.sglang)))


def client_process(trial: Trial, step: LoadStep) -> Process:
    """The client of one load, bound as the trial's client is."""
    return replace(trial.client, argv=(*trial.client.argv, *step.argv))


def deadlines(plan: Plan) -> dict[str, object]:
    """For a script's head: seconds to wait for the server, and how often (every 0.2 s) to look for its end."""
    return {"ready_s": max(1, int(plan.ready_s)), "stop_polls": max(1, int(plan.stop_s * 5))}


def trials(
    plan: Plan,
    *,
    start: Callable[[Trial], Sequence[str]],
    load: Callable[[Trial, LoadStep], Sequence[str]],
) -> str:
    """Every trial, and the last line; `start` gives the lines that start its server, `load` those of a client."""
    texts = [_trial(plan, trial, start=start(trial), load=load) for trial in plan.trials]
    return "".join(texts) + '\necho "results are in $OUT"\n'


def _trial(
    plan: Plan, trial: Trial, *, start: Sequence[str], load: Callable[[Trial, LoadStep], Sequence[str]]
) -> str:
    lines = [
        "",
        f"# ---- trial {trial.index + 1} of {len(plan.trials)}: {trial.variant}, repeat {trial.repeat}",
        f'TRIAL=$OUT/{trial.name}; mkdir -p "$TRIAL"',
        'rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"',
        f'echo "trial {trial.name}"',
        *start,
        "wait_ready",
    ]
    for step in trial.loads:
        lines += [f"begin_load {step.name}", *load(trial, step), "end_load"]
    return "\n".join([*lines, "stop_server", ""])
