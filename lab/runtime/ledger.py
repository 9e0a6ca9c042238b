"""What outlives the lab if the lab is killed: one JSON file per runtime, written before anything is started,
with who owns it, the mark that all its processes carry, and the processes themselves. The next lab reads the
files of labs that are dead and ends what they left. A file is replaced whole, so it is never seen
half-written."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.runtime.owner import Owner, is_dead, me, rebooted
from lab.runtime.procfs import end_all, family

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Child:
    """A started process: its pid (also its process group and session) and start time in ticks since boot."""

    name: str
    pid: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a dead lab had left: the pids that were killed, and those that could not be."""

    run_id: str
    owner_pid: int
    killed: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The content of one file."""

    run_id: str
    mark: str
    owner: Owner
    processes: tuple[Child, ...]


class Record:
    """One runtime's file in the ledger."""

    def __init__(self, path: Path, entry: _Entry) -> None:
        self._path = path
        self._entry = entry
        self._children: tuple[Child, ...] = ()

    @property
    def mark(self) -> str:
        """The value of `LAB_RUN` that belongs to this runtime alone."""
        return self._entry.mark

    def add(self, child: Child) -> None:
        """Note a process that was just started; raises `LabError` when the file cannot be written."""
        self._children = (*self._children, child)
        self._write()

    def remove(self, child: Child) -> None:
        """Forget a process of which nothing is left."""
        self._children = tuple(other for other in self._children if other != child)
        self._write()

    def close(self) -> None:
        """Remove the file: nothing of this runtime is left."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        entry, owner = self._entry, self._entry.owner
        content = {
            "schema": SCHEMA,
            "run_id": entry.run_id,
            "mark": entry.mark,
            "owner": {"pid": owner.pid, "start": owner.start},
            "place": {"host": owner.host, "boot": owner.boot, "pid_namespace": owner.pid_namespace},
            "processes": [{"name": c.name, "pid": c.pid, "start": c.start} for c in self._children],
        }
        aside = self._path.with_suffix(".tmp")
        try:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            aside.replace(self._path)
        except OSError as error:
            raise LabError(
                f"cannot write {self._path}",
                why=f"{error.strerror}; the lab notes there what it starts, to end it even if it is killed",
                fix="make that folder writable, or free some disk space",
            ) from error


class Ledger:
    """The folder of these files. Labs that share it do not disturb each other."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir

    def check_writable(self) -> None:
        """Make the folder; `LabError` when nothing can be written there."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise LabError(
                f"the folder {self._folder} cannot be written",
                why=f"{error.strerror}; the lab notes there what it starts, to end it even if it is killed",
                fix="make it writable, or set XDG_STATE_HOME to another one",
            ) from error

    def open(self, *, run_id: str) -> Record:
        """A new file for one runtime of this process; raises `LabError` when it cannot be written."""
        token = secrets.token_hex(8)
        entry = _Entry(run_id=run_id, mark=f"{run_id}/{token}", owner=me(), processes=())
        self.check_writable()
        record = Record(self._folder / f"lab-{token}.json", entry)
        record._write()
        return record

    def sweep(self, say: Callable[[str], None]) -> tuple[Swept, ...]:
        """End what dead labs left here and remove their files; `say` gets a line for each thing done.

        Processes of a lab that still runs, and strangers that got a pid of ours later, stay untouched. So do
        the files of another machine or container, whose pids mean nothing here.
        """
        swept = [self._sweep_file(path, say=say) for path in sorted(self._folder.glob("lab-*.json"))]
        return tuple(one for one in swept if one is not None)

    def _sweep_file(self, path: Path, *, say: Callable[[str], None]) -> Swept | None:
        try:
            entry = _parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # its lab has just ended
            return None
        except (OSError, ValueError) as error:
            say(f"{path} is not a process list of this version of the lab ({error}); left as it is")
            return None
        if not is_dead(entry.owner):
            return None
        killed, left = ((), ()) if rebooted(entry.owner) else _end(entry)
        if killed:
            say(f"ended {len(killed)} processes left by run {entry.run_id}, whose lab is dead")
        if left:
            say(f"could not end {', '.join(map(str, left))} of run {entry.run_id}")
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(".tmp").unlink(missing_ok=True)
        return Swept(run_id=entry.run_id, owner_pid=entry.owner.pid, killed=killed, left=left)


def _end(entry: _Entry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    leaders = tuple((child.pid, child.start) for child in entry.processes)
    return end_all(lambda: family(entry.mark, leaders=leaders), settle_s=0.0)


def _parse(text: str) -> _Entry:
    """One file's content; `ValueError` for anything this version did not write."""
    content = json.loads(text)
    try:
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, known is {SCHEMA}")
        children = tuple(
            Child(name=str(c["name"]), pid=int(c["pid"]), start=int(c["start"])) for c in content["processes"]
        )
        mark = str(content["mark"])
        if "/" not in mark:  # an empty mark would match strangers
            raise ValueError(f"mark {mark!r}")
        return _Entry(
            run_id=str(content["run_id"]),
            mark=mark,
            owner=Owner(
                pid=int(content["owner"]["pid"]),
                start=int(content["owner"]["start"]),
                host=str(content["place"]["host"]),
                boot=str(content["place"]["boot"]),
                pid_namespace=str(content["place"]["pid_namespace"]),
            ),
            processes=children,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
