"""What the environment asks of the probe: variables go in, `Settings` or None (no probe) comes out. A value that makes
no sense is never an error of the server's: the default is taken, and `notes` says so in the file's header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from labprobe.schema import LEVELS

FOLDER = "LAB_PROBE_DIR"
LEVEL = "LAB_PROBE_LEVEL"
QUEUE = "LAB_PROBE_QUEUE"
MEGABYTES = "LAB_PROBE_MB"
NVTX = "LAB_PROBE_NVTX"
FAULT = "LAB_PROBE_FAULT"

# About a minute of the busiest level on two CPU cores, 30 MB of memory.
QUEUE_EVENTS = 65_536
FILE_MB = 1024


@dataclass(frozen=True)
class Settings:
    """`faults` maps a hook to the number of its call whose body shall raise: for tests."""

    folder: str
    level: str = LEVELS[0]
    queue_events: int = QUEUE_EVENTS
    file_bytes: int = FILE_MB * 1_000_000
    nvtx: bool = False
    faults: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()


def read(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings, or None where no folder is given."""
    folder = environment.get(FOLDER, "")
    if not folder:
        return None
    notes: list[str] = []
    level = environment.get(LEVEL) or LEVELS[0]
    if level not in LEVELS:
        notes.append(f"{LEVEL}={level} is none of {', '.join(LEVELS)}: took {LEVELS[0]}")
        level = LEVELS[0]
    # nsys sets this variable in what it starts, so that the NVTX library finds it.
    listening = "1" if environment.get("NVTX_INJECTION64_PATH") else "0"
    return Settings(
        folder=folder,
        level=level,
        queue_events=_number(environment, QUEUE, QUEUE_EVENTS, notes),
        file_bytes=_number(environment, MEGABYTES, FILE_MB, notes) * 1_000_000,
        nvtx=environment.get(NVTX, listening) == "1",
        faults=_faults(environment.get(FAULT, "")),
        notes=tuple(notes),
    )


def _number(environment: Mapping[str, str], name: str, default: int, notes: list[str]) -> int:
    text = environment.get(name, "")
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text:
        notes.append(f"{name}={text} is not a number above 0: took {default}")
    return default


def _faults(text: str) -> dict[str, int]:
    """`insert:2,run:1`."""
    pairs = (part.partition(":") for part in text.split(",") if part)
    return {name: int(number) for name, _, number in pairs if number.isdecimal()}
