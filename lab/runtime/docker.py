"""Programs in containers: in goes a `Command`, out come readiness, exit codes and a `Stopped` record, or a
`ProcessFault`, as from the process runtime. Server and client have a container each; the client shares the server's
network, so that both speak over the loopback of one private network (`docs/decisions/0010-docker-runtime.md`)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lab.boxes import VALUES, Folders, Names, container
from lab.container import OWNER_LABEL, Container, Setup
from lab.plan import Process
from lab.runtime.base import Command, How, NeverReady, Program, StartFailed, Stopped
from lab.runtime.contained import Contained
from lab.runtime.engine import Engine, EngineError, EngineGone, Thing
from lab.runtime.interrupt import Interrupts
from lab.runtime.owner import from_label, is_dead, me
from lab.runtime.waiting import Say, died_while_starting, first_ended, until_ready

_LOST_S = 20.0  # a restarted engine is back in two or three
_RETURN_S = 30.0  # how long the clean-up waits for an engine that does not answer
_KILL_S = 10.0
_ENDING_S = 2.0


class DockerRuntime:
    """Starts containers, watches them, and removes everything it made when its `with` block is left.

    In the main thread, like the process runtime: Ctrl-C, SIGTERM and SIGHUP leave the block by an exception.
    What a killed lab leaves is found by label: see `sweep`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        setup: Setup,
        run_id: str,
        say: Callable[[str], None],
        lost_s: float = _LOST_S,
        return_s: float = _RETURN_S,
    ) -> None:
        self._engine = engine
        self._setup = setup
        self._names = Names(run_id=run_id, owner=me().label())
        self._say = say
        self._lost_s = lost_s
        self._return_s = return_s
        self._started: list[Contained] = []
        self._server: Contained | None = None
        self._port = 0
        self._interrupts = Interrupts()

    # ---- the block

    def __enter__(self) -> DockerRuntime:
        self._interrupts.begin()
        try:
            names, labels = self._names, self._names.labels
            Path(self._setup.jit).mkdir(parents=True, exist_ok=True)
            self._engine.create_network(names.network, labels=labels)
            self._engine.create_volume(names.model, folder=self._setup.model, labels=labels)
            self._engine.create_volume(names.jit, folder=self._setup.jit, labels=labels)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.closing()
        try:
            for program in reversed(self._started):
                self.stop(program)
            self._remove_all()
        finally:
            self._interrupts.end(error=error)

    def _remove_all(self) -> None:
        """Everything with our label, also what was made but not yet noted when an exception came."""
        until = time.monotonic() + self._return_s
        while True:
            try:
                _remove(self._engine, [t for t in self._engine.ours() if self._is_mine(t)], say=self._say)
                return
            except EngineError as error:
                if time.monotonic() > until:
                    self._say(f"left behind at the engine: {error}; once it answers: invoke clean")
                    return
                time.sleep(0.5)

    def _is_mine(self, thing: Thing) -> bool:
        return all(thing.labels.get(key) == value for key, value in self._names.labels.items())

    # ---- starting

    def values(self, *, trial: Path, scratch: Path, port: int) -> dict[str, str]:  # noqa: ARG002
        """What the plan's placeholders are in a container. `port` is the host's for the server, 0 for any."""
        self._port = port
        return {name: VALUES[name] for name in ("TRIAL", "SCRATCH", "PORT")}

    def start(self, command: Command) -> Contained:
        """Start the program's container and return at once; `StartFailed` when the engine refuses.

        A program that does not listen joins the network of the server that was started before it.
        """
        network = self._names.network
        if command.port == 0 and self._server is not None:
            network = f"container:{self._server.id}"
        box = self._container(command, network=network)
        made = ""
        try:
            made = self._engine.create(box)
            self._engine.start(made)
        except EngineError as error:
            self._forget(made, box)
            if self._server is not None and network != self._names.network:
                _raise_if_ended(self._server)  # whose network there is none any more
            raise StartFailed(_explained(str(error), box), name=command.name, phase="start") from None
        program = Contained(
            name=command.name,
            container=box.name,
            container_id=made,
            log=command.log,
            engine=self._engine,
            lost_s=self._lost_s,
        )
        self._started.append(program)
        if command.port:
            self._server = program
        return program

    def _container(self, command: Command, *, network: str) -> Container:
        process = Process(
            argv=command.argv,
            env=command.env,
            cpus=command.cpus,
            mems=command.mems,
            gpus=command.gpus,
            profiler=command.profiler,
        )
        trial = command.log.parent
        return container(
            f"{len(self._started):03d}-{command.name}",
            process,
            setup=self._setup,
            names=self._names,
            folders=Folders(trial=str(trial), scratch=str(command.cwd)),
            network=network,
            user=caller(),
            log=command.log.name,
            publish=self._port if command.port else None,
        )

    def _forget(self, container_id: str, box: Container) -> None:
        """A container that could not be started stays at the engine, and keeps its name."""
        if container_id:
            with contextlib.suppress(EngineError):  # then found by its label when the block is left
                self._engine.remove(Thing(kind="container", id=container_id, name=box.name, labels={}))

    def port_of(self, program: Program) -> int:
        """The host's loopback port that leads to the program."""
        try:
            return self._engine.published(_mine(program).id)
        except EngineError as error:
            _raise_if_ended(_mine(program))  # its port goes with it
            raise StartFailed(
                str(error), name=program.name, phase="start", last_lines=program.log_end()
            ) from None

    # ---- watching and ending

    def wait_ready(self, program: Program, *, url: str, deadline_s: float, say: Say | None = None) -> float:
        """As the process runtime's; the port is the engine's own, so nobody else can answer there."""
        try:
            return until_ready(
                program, url=url, deadline_s=deadline_s, say=say, hurried=lambda: self._interrupts.hurried
            )
        except NeverReady as fault:
            reason = fault.reason + _mine(program).circumstances()
            raise NeverReady(
                reason, name=fault.name, phase=fault.phase, last_lines=fault.last_lines
            ) from None

    def stop(self, program: Program, *, grace_s: float = 20.0) -> Stopped:
        """End the program: SIGINT, SIGTERM, each with `grace_s` seconds, then SIGKILL for the container, which
        is removed. A second call returns the same record."""
        mine = _mine(program)
        if mine.stopped is not None:
            return mine.stopped
        began = time.monotonic()
        how = self._ask_to_end(mine, grace_s=grace_s)
        left = self._engine_removes(mine)
        mine.stopped = Stopped(
            name=mine.name,
            how=how,
            seconds=time.monotonic() - began,
            exit_code=mine.exit_code(),
            left=(0,) if left else (),
        )
        if self._server is mine:
            self._server = None
        return mine.stopped

    def _ask_to_end(self, program: Contained, *, grace_s: float) -> How:
        if program.exit_code() is not None:
            return "already"
        polite: tuple[How, ...] = ("SIGINT", "SIGTERM")  # the first is container.STOP_SIGNAL
        for how in polite:
            if not self._send(program, how):
                break
            if first_ended((program,), within_s=grace_s, hurried=lambda: self._interrupts.hurried):
                return how
        self._send(program, "SIGKILL")
        program.ended.wait(_KILL_S)
        return "SIGKILL"

    def _send(self, program: Contained, signal: str) -> bool:
        try:
            self._engine.signal(program.id, signal)
        except EngineGone:
            return False
        except EngineError:
            pass  # it has ended a moment ago
        return True

    def _engine_removes(self, program: Contained) -> bool:
        """Remove the container; whether it had to be left for the end of the block."""
        try:
            thing = Thing(kind="container", id=program.id, name=program.container, labels={})
            self._engine.remove(thing)
        except EngineError:
            return True
        return False


def sweep(engine: Engine, say: Callable[[str], None]) -> tuple[Thing, ...]:
    """Remove what dead labs left at the engine, and only that: their containers, networks and volumes.

    A thing without an owner's label, or whose owner runs or cannot be seen from here (another machine or
    container that uses the same engine), stays; so does what the engine does not let go, which is said.
    """
    dead = []
    try:
        for thing in engine.ours():
            owner = from_label(thing.labels.get(OWNER_LABEL, ""))
            if owner is not None and is_dead(owner):
                dead.append(thing)
        return _remove(engine, dead, say=say)
    except EngineError as error:
        say(f"could not look for what killed labs left at the engine: {error}")
        return ()


def caller() -> str:
    """`uid:gid` of whoever runs the lab: what the containers write belongs to them."""
    return f"{os.getuid()}:{os.getgid()}"


def _remove(engine: Engine, things: list[Thing], *, say: Callable[[str], None]) -> tuple[Thing, ...]:
    removed = []
    for thing in things:
        try:
            engine.remove(thing)
            removed.append(thing)
        except EngineGone:
            raise
        except EngineError as error:
            say(f"could not remove {thing.kind} {thing.name}: {error}")
    return tuple(removed)


def _explained(reason: str, box: Container) -> str:
    """What the engine said, and what it means where that is not plain."""
    taken = f"port {box.publish} of this machine is in use; the site's file names it (0 takes a free one)"
    unknown = "NVIDIA's container toolkit does not know a GPU that the plan names: see nvidia-smi -L"
    for words, meaning in (
        ("No such image", f"the image {box.image} is not there; build it: invoke image.build"),
        ("could not select device driver", "the engine has no NVIDIA container toolkit: see invoke doctor"),
        ("Requested CPUs are not available", "the site's file names CPUs that this machine lacks"),
        ("Requested memory nodes are not", "the site's file names NUMA nodes that this machine lacks"),
        ("is already in use by container", "a container of that name exists: see docker ps --all"),
        ("address already in use", taken),
        ("port is already allocated", taken),
        ("unknown device", unknown),
        ("unresolvable CDI devices", unknown),
    ):
        if words in reason:
            return f"{meaning} ({reason})"
    return f"the engine did not start it: {reason}"


def _raise_if_ended(program: Contained) -> None:
    """What the engine refused may have come from the program's end, of which we hear a moment later."""
    if program.ended.wait(_ENDING_S):
        raise died_while_starting(program) from None


def _mine(program: Program) -> Contained:
    if not isinstance(program, Contained):
        raise TypeError(f"{program.name} was not started by this runtime")
    return program
