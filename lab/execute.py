"""The only step that touches the world: runs a plan's trials and writes the raw part of the run directory.

Each trial starts a fresh server and a client host, runs the loads one after the other (each from a flushed
cache, with the server's metrics read before and after), and stops both. A trial that fails is written down with phase,
reason and last log lines, and the next one goes on; nothing of ours survives, however it ends."""

from __future__ import annotations

import errno
import shutil
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lab import scratch
from lab.client import ClientHost
from lab.dialect import dialect_of
from lab.errors import LabError
from lab.gpuwatch import GpuWatch
from lab.plan import LoadStep, Plan, Process, Trial, fill
from lab.progress import Progress
from lab.rundir import LoadFiles, Run, TrialFiles, read_json, seal, write_json, write_text
from lab.runtime.base import Command, ProcessFault, Program, Runtime, StartFailed, Stopped, Waiting
from lab.runtime.waiting import end_behind
from lab.server import Server, ServerError

# Two servers in a row that do not start will not be followed by one that does: the run stops there.
START_FAILURES_IN_A_ROW = 2


class ClientError(Exception):
    """A load's client program ended with an exit code other than 0."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How many trials are ok, failed and not run."""

    ok: int
    failed: int
    not_run: int


@dataclass
class Progressing:
    """Where a trial stands, so that whatever interrupts it can be written down."""

    phase: str = "start"
    port: int = 0
    listens: int = 0
    gpu_pids: tuple[int, ...] = ()
    ready_s: float | None = None
    processes: list[Program] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A trial's folders on this machine, and the placeholders' values as its programs see them."""

    values: dict[str, str]
    trial: Path
    scratch: Path

    def inside(self, path: Path) -> str:
        """A path below the trial's folder as the trial's programs see it."""
        return f"{self.values['TRIAL']}/{path.relative_to(self.trial).as_posix()}"


def execute(plan: Plan, run: Run, *, runtime: Runtime, progress: Progress) -> Outcome:
    """Run every trial of the plan that is not ok yet, then seal the raw part. Safe to call again to resume.

    `LabError` when the disk is full: then not even that a trial failed can be written down.
    """
    try:
        return _execute(plan, run, runtime=runtime, progress=progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LabError(
            "the disk with the run is full",
            why=f"{error.strerror}: {error.filename or run.path}",
            fix=f"make room, then repeat what is missing: invoke exp.{plan.experiment} --resume",
        ) from error


def _execute(plan: Plan, run: Run, *, runtime: Runtime, progress: Progress) -> Outcome:
    ok = failed = in_a_row = 0
    with runtime:
        try:
            for trial in plan.trials:
                files = run.trial(trial.name)
                if _status(files) == "ok":
                    ok += 1
                    continue
                _set_aside(files)
                title = f"trial {trial.index + 1}/{len(plan.trials)} {trial.variant}, repeat {trial.repeat}"
                started = time.monotonic()
                fault = run_trial(plan, trial, files, runtime=runtime, progress=progress, title=title)
                seconds = time.monotonic() - started
                if fault is None:
                    ok, in_a_row = ok + 1, 0
                    progress.step(f"{title}: ok in {seconds:.0f} s")
                    continue
                failed += 1
                in_a_row = in_a_row + 1 if isinstance(fault, StartFailed) else 0
                progress.step(f"{title}: FAILED after {seconds:.0f} s: {str(fault).splitlines()[0]}")
                if in_a_row == START_FAILURES_IN_A_ROW:
                    progress.step("two servers in a row did not start: the rest of the run is left out")
                    break
        finally:
            seal(run)
    return Outcome(ok=ok, failed=failed, not_run=len(plan.trials) - ok - failed)


def run_trial(
    plan: Plan,
    trial: Trial,
    files: TrialFiles,
    *,
    runtime: Runtime,
    progress: Progress,
    title: str,
) -> Exception | None:
    """One trial from start to stop; returns what made it fail, None if nothing did."""
    files.path.mkdir(parents=True)
    folder = scratch.make()
    at = Progressing()
    began = _now()
    write_json(files.status, {"status": "running", "phase": "start", "started": began})
    stops: list[Stopped] = []
    watch = GpuWatch(trial.server.gpus, out=files.gpus, log=files.sampler_log, cpus=trial.sampler_cpus)
    fault: BaseException | None = None
    try:
        watch.start()
        _serve(
            *(plan, trial, files),
            folder=folder,
            runtime=runtime,
            progress=progress,
            title=title,
            at=at,
            watch=watch,
        )
    except ProcessFault as error:
        fault = error
    except (ServerError, ClientError) as error:
        fault = end_behind(at.processes[0]) or error
    except BaseException as error:
        fault = error
        raise
    finally:
        lines = () if fault is None else _last_lines(fault, at)
        progress.live(f"{title}: stopping")
        for process in reversed(at.processes):
            stops.append(runtime.stop(process, grace_s=plan.stop_s))
        still_used = watch.stop()
        shutil.rmtree(folder, ignore_errors=True)
        write_json(
            files.status,
            {
                "status": "ok" if fault is None else "failed",
                "phase": "done" if fault is None else at.phase,
                "reason": "" if fault is None else _reason(fault),
                "last_lines": list(lines),
                "started": began,
                "ended": _now(),
                "port": at.port,
                "listens": at.listens,
                "ready_s": at.ready_s,
                **({"gpu_pids": list(at.gpu_pids), "gpus_left": still_used} if trial.server.gpus else {}),
                "stopped": [
                    {"name": s.name, "how": s.how, "seconds": round(s.seconds, 2), "exit_code": s.exit_code}
                    for s in stops
                ],
            },
        )
    return fault if isinstance(fault, Exception) else None


def _serve(
    plan: Plan,
    trial: Trial,
    files: TrialFiles,
    *,
    folder: Path,
    runtime: Runtime,
    progress: Progress,
    title: str,
    at: Progressing,
    watch: GpuWatch,
) -> None:
    values = {**plan.places, **runtime.values(trial=files.path, scratch=folder, port=plan.port), "LOAD": ""}
    at.listens = int(values["PORT"])
    place = _Place(values=values, trial=files.path, scratch=folder)
    server = runtime.start(_command("server", trial.server, place, log=files.server_log, listens=True))
    at.processes.append(server)
    host_argv = ("${LAB}/load/host.py", "${SCRATCH}/mailbox", *plan.preload)
    client = runtime.start(_command("client", trial.client, place, log=files.client_log, more=host_argv))
    at.processes.append(client)
    host = ClientHost(client, mailbox=folder / "mailbox")
    at.port = runtime.port_of(server)

    def starting(waiting: Waiting) -> None:
        progress.live(f"{title}: starting the server | {waiting.last_line}")

    dialect = dialect_of(plan.sglang)
    url = f"http://127.0.0.1:{at.port}{dialect.health}"
    at.ready_s = runtime.wait_ready(server, url=url, deadline_s=plan.ready_s, say=starting)
    at.gpu_pids = watch.pids()
    host.wait_ready(deadline_s=plan.ready_s, watch=(server,))
    api = Server(at.port, dialect=dialect)
    try:
        api.wait_warm(deadline_s=plan.ready_s)
        write_json(files.server_info, {"server_info": api.info()})
        for step in trial.loads:
            at.phase = f"load {step.name}"
            progress.live(f"{title}: {at.phase}, {step.requests} requests")
            _load(plan, step, files.load(step.name), api=api, host=host, server=server, place=place)
        at.phase = "stop"
    finally:
        api.close()


def _load(
    plan: Plan,
    step: LoadStep,
    files: LoadFiles,
    *,
    api: Server,
    host: ClientHost,
    server: Program,
    place: _Place,
) -> None:
    """Flush, read the metrics, run the client, read the metrics again."""
    files.path.mkdir(parents=True)
    api.flush()
    before = api.metrics()
    write_text(files.before, before)
    argv = tuple(fill(word, {**place.values, "LOAD": place.inside(files.path)}) for word in step.argv)
    requests = step.requests + dialect_of(plan.sglang).extra_requests(step.dataset)
    done = host.run(argv, log=place.inside(files.log), deadline_s=plan.load_s, watch=(server,))
    write_text(files.after, api.settled_metrics(before=before, requests=requests))
    write_json(files.status, {"exit": done.exit, "started": done.started, "ended": done.ended})
    if done.exit != 0:
        log = files.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise ClientError(
            "\n".join([f"the client of load {step.name!r} ended with exit code {done.exit}", *log])
        )


def _command(
    name: str,
    process: Process,
    place: _Place,
    *,
    log: Path,
    more: tuple[str, ...] = (),
    listens: bool = False,
) -> Command:
    return Command(
        name=name,
        argv=tuple(fill(word, place.values) for word in (*process.argv, *more)),
        env=tuple((key, fill(value, place.values)) for key, value in process.env),
        cwd=place.scratch,
        log=log,
        cpus=process.cpus,
        mems=process.mems,
        gpus=process.gpus,
        port=int(place.values["PORT"]) if listens else 0,
        profiler=process.profiler,
    )


def _status(files: TrialFiles) -> str:
    if not files.status.exists():
        return "none"
    return str(read_json(files.status).get("status"))


def _set_aside(files: TrialFiles) -> None:
    """Keep what an earlier attempt left, under another name: raw files are never overwritten."""
    if not files.path.exists():
        return
    attempt = 1
    while (aside := files.path.with_name(f"{files.path.name}.failed-{attempt}")).exists():
        attempt += 1
    files.path.rename(aside)


def _reason(fault: BaseException) -> str:
    if isinstance(fault, KeyboardInterrupt):
        return "interrupted: " + (str(fault) or "Ctrl-C")
    if isinstance(fault, LabError):
        return fault.problem
    if isinstance(fault, ProcessFault):
        return f"{fault.name}: {fault.reason}"
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__


def _last_lines(fault: BaseException, at: Progressing) -> tuple[str, ...]:
    if isinstance(fault, ProcessFault) and fault.last_lines:
        return fault.last_lines
    if isinstance(fault, ClientError):
        return tuple(str(fault).splitlines()[1:])
    return at.processes[0].log_end() if at.processes else ()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
