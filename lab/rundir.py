"""The run directory: the one module that knows the names of files in it, and that guards its raw part.

Raw is everything `execute` wrote. It is listed in SHA256SUMS when the run ends, and only read afterwards;
tables, verdicts, plots and the report are derived and can be deleted and rebuilt at any time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lab.errors import LabError

SCHEMA = 1
RUN_DISK_GB = 0.5  # what a run may take
RUN_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{4}")
SERIES = "all"  # the folder of series below runs/; no experiment may have this name
DERIVED = ("tables", "plots", "verdicts.json", "report.md")

Json = dict[str, object]


@dataclass(frozen=True)
class Run:
    """One execution of a plan, as a folder."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def commands(self) -> Path:
        return self.path / "commands.sh"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def hardware(self) -> Path:
        return self.path / "hardware.json"

    @property
    def readme(self) -> Path:
        return self.path / "README.md"

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.py"

    @property
    def diff(self) -> Path:
        return self.path / "uncommitted.diff"

    @property
    def sums(self) -> Path:
        return self.path / "SHA256SUMS"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def tables(self) -> Path:
        return self.path / "tables"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def verdicts(self) -> Path:
        return self.path / "verdicts.json"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    def trial(self, name: str) -> TrialFiles:
        return TrialFiles(self.trials / name)


@dataclass(frozen=True)
class TrialFiles:
    """The files of one trial."""

    path: Path

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def server_log(self) -> Path:
        return self.path / "server.log"

    @property
    def client_log(self) -> Path:
        return self.path / "client.log"

    @property
    def server_info(self) -> Path:
        return self.path / "server_info.json"

    @property
    def gpus(self) -> Path:
        """Samples of the GPUs."""
        return self.path / "gpu.csv"

    @property
    def sampler_log(self) -> Path:
        return self.path / "sampler.log"

    @property
    def events(self) -> Path:
        """Folder with what the probe wrote, a file for each rank."""
        return self.path / "events"

    @property
    def export(self) -> Path:
        """Folder with the server's own record of each request."""
        return self.path / "export"

    def load(self, name: str) -> LoadFiles:
        return LoadFiles(self.path / "loads" / name)


@dataclass(frozen=True)
class LoadFiles:
    """The files of one load of a trial."""

    path: Path

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def bench(self) -> Path:
        return self.path / "bench.jsonl"

    @property
    def chat(self) -> Path:
        return self.path / "chat.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "client.log"

    @property
    def before(self) -> Path:
        return self.path / "metrics-before.prom"

    @property
    def after(self) -> Path:
        return self.path / "metrics-after.prom"


def write_text(path: Path, text: str) -> None:
    """Write `path` in one step: a reader or a crash sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Json) -> None:
    """Write `value` with its schema number, keys in the order given."""
    write_text(path, json.dumps({"schema": SCHEMA, **value}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Json:
    """Read a JSON object; LabError for one that is cut, not the lab's, or from a newer lab."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LabError(
            f"{_short(path)} is missing", why="the run was cut short or damaged", fix="start a new run"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LabError(
            f"{_short(path)} is not readable JSON",
            why=f"{error}; the file was cut short or changed",
            fix="restore the file, or start a new run",
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
        raise LabError(
            f"{_short(path)} has no schema number",
            why="it was not written by the lab",
            fix="restore the file",
        )
    refuse_newer(value["schema"], where=_short(path))
    return value


def refuse_newer(schema: int, *, where: str) -> None:
    """Raise LabError for a schema number above the lab's own."""
    if schema > SCHEMA:
        raise LabError(
            f"{where} has schema {schema}, this lab knows up to {SCHEMA}",
            why="the run was made by a newer lab",
            fix="update the lab: git pull && pip install -e .",
        )


def raw_files(run: Run) -> tuple[Path, ...]:
    """Every raw file of the run, sorted, relative to it."""
    found = []
    for path in sorted(run.path.rglob("*")):
        relative = path.relative_to(run.path)
        if path.is_file() and relative.parts[0] not in (*DERIVED, "SHA256SUMS"):
            found.append(relative)
    return tuple(found)


def seal(run: Run) -> None:
    """Write SHA256SUMS over the raw part and take away write permission from it."""
    files = raw_files(run)
    write_text(run.sums, "".join(f"{_sha256(run.path / f)}  {f.as_posix()}\n" for f in files))
    for file in files:
        (run.path / file).chmod(0o444)


def verify(run: Run) -> None:
    """Raise LabError if a raw file was changed, removed or added since the run was sealed."""
    if not run.sums.is_file():
        raise LabError(
            f"run {run.path.name} has no SHA256SUMS",
            why="it was killed before it ended",
            fix="finish it: invoke exp.NAME --resume",
        )
    listed: dict[str, str] = {}
    for line in run.sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    here = {f.as_posix() for f in raw_files(run)}
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - here)]
    wrong += [f"{name} was added" for name in sorted(here - listed.keys())]
    wrong += [
        f"{name} was changed"
        for name in sorted(listed.keys() & here)
        if _sha256(run.path / name) != listed[name]
    ]
    if wrong:
        raise LabError(
            f"the raw part of run {run.path.name} is not what was measured",
            why="; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            fix="restore the files, or start a new run; a report is never made from changed measurements",
        )


def list_runs(root: Path, *, experiment: str | None = None) -> tuple[Run, ...]:
    """The runs under `root` (runs/<experiment>/<run>), oldest first."""
    pattern = f"{experiment or '*'}/*"
    return tuple(
        Run(p)
        for p in sorted(root.glob(pattern), key=lambda p: (p.name, p.parent.name))
        if RUN_NAME.fullmatch(p.name)
    )


def fresh_name() -> str:
    """A name for a run or a series that begins now: UTC time and four random hexadecimal digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def series_file(root: Path, name: str) -> Path:
    """Where `invoke exp.all` notes a series of runs: runs/all/<name>.json, beside the folders of the experiments."""
    return root / SERIES / f"{name}.json"


def list_series(root: Path) -> tuple[Path, ...]:
    """The notes of all series under `root`, oldest first."""
    return tuple(sorted(p for p in (root / SERIES).glob("*.json") if RUN_NAME.fullmatch(p.stem)))


def index_file(root: Path) -> Path:
    """The page that lists all runs."""
    return root / "index.md"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(path: Path) -> str:
    """The path from the run's folder on, for messages."""
    for parent in path.parents:
        if RUN_NAME.fullmatch(parent.name):
            return path.relative_to(parent.parent).as_posix()
    return path.name
