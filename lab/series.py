"""A series: one `invoke exp.all`, remembered so that it can be gone on with. In go and out come small JSON files,
runs/all/<UTC>-<id>.json: what was asked for, and for each experiment its run and how that ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from lab.errors import LabError, unknown_name
from lab.rundir import Json, list_series, read_json, series_file, write_json

State = Literal["running", "ended", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One experiment of a series. `run` is the name of its run, empty before that has a folder; `code` the exit code it ended
    with, `seconds` how long it took. `stopped` means that an error ended it, and `reason` which."""

    experiment: str
    run: str = ""
    state: State = "running"
    code: int | None = None
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a series asked for, as fields of `conduct.Asked`, and its parts by experiment in the order they were run."""

    name: str
    asked: dict[str, str | int | None]
    parts: dict[str, Part] = field(default_factory=dict)

    def noting(self, part: Part) -> Series:
        """The series with this part in the place of the experiment's earlier one."""
        return replace(self, parts={**self.parts, part.experiment: part})


def write_series(root: Path, series: Series) -> None:
    """Write the series, in one step; `LabError` where that is not possible."""
    path = series_file(root, series.name)
    told: Json = {"asked": series.asked, "parts": [asdict(part) for part in series.parts.values()]}
    try:
        write_json(path, told)
    except OSError as error:
        raise LabError(
            "the note of the series cannot be written",
            why=f"{error.strerror}: {error.filename or path}",
            fix="make room, and runs/all writable; then go on with: invoke exp.all --resume",
        ) from error


def read_series(path: Path) -> Series:
    """Read a series back; `LabError` for a file that is cut, not the lab's, or of a newer lab."""
    raw = read_json(path)
    try:
        parts = msgspec.convert(raw.get("parts"), tuple[Part, ...])
        asked = msgspec.convert(raw.get("asked"), dict[str, str | int | None])
    except msgspec.ValidationError as error:
        raise LabError(
            f"{path.name} is not a series of this lab",
            why=f"{error}; it was changed",
            fix="delete it, and start a new series: invoke exp.all",
        ) from error
    return Series(name=path.stem, asked=asked, parts={part.experiment: part for part in parts})


def find_series(root: Path, which: str | None) -> Series:
    """The series of that name, or the newest."""
    known = {path.stem: path for path in list_series(root)}
    if not known:
        raise LabError(
            "there is no series yet", why="`invoke exp.all` was never started here", fix="invoke exp.all"
        )
    if which is None:
        return read_series(known[max(known)])
    name = Path(which).name.removesuffix(".json")
    if name not in known:
        raise unknown_name("series", name, known)
    return read_series(known[name])
