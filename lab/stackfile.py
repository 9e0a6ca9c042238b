"""The form of a stack.toml: which tables and keys it has and of which type. A file goes in, checked tables come out;
whatever is missing, unknown or of the wrong type is a `LabError` that names the file, the key and the valid ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from lab.errors import LabError

SCHEMA = 1

# table -> key -> type; "" is the top level of stack.toml
_KEYS: Mapping[str, Mapping[str, type]] = {
    "": {
        "schema": int,
        "name": str,
        "description": str,
        "sglang": str,
        "torch": str,
        "python": str,
        "device": str,
        "dialect": str,
        "needs": dict,
        "image": dict,
        "env": dict,
        "server": dict,
        "verify": dict,
    },
    "needs": {
        "memory_gb": float,
        "disk_gb": float,
        "system": str,
        "machine": str,
        "glibc": str,
        "driver": str,
    },
    "image": {
        "base": str,
        "digest": str,
        "python": str,
        "date": str,
        "packages": list,
        "wheelhouse": list,
        "source": list,
        "torch_cuda": str,
        "cuda_toolkit": str,
        "nsys": str,
        "ncu": str,
        "build_gb": float,
    },
    "server": {"args": list, "observe": list},
    "verify": {"imports": list, "command": list},
}
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a table",
    list: "a list of strings",
}


class StackFile:
    """A stack.toml whose keys have been checked."""

    def __init__(self, file: Path) -> None:
        """Read and check `file`; `LabError` when it is not as it should be."""
        self.file = file
        self._top = _read_toml(file)
        _check_keys(self._top, table="", file=file)
        if self._top["schema"] != SCHEMA:
            raise LabError(
                f"{file} has schema {self._top['schema']}, this lab reads schema {SCHEMA}",
                fix="use the version of the lab that the stack was written for",
            )
        for table in _KEYS:
            if table:
                _check_keys(self._table(table), table=table, file=file)

    def text(self, table: str, key: str) -> str:
        """A string; `table` is "" for the top level."""
        return str(self._table(table)[key])

    def size_gb(self, table: str, key: str) -> float:
        """A size in GB (10^9 bytes)."""
        value = float(str(self._table(table)[key]))
        if not 0 <= value < 1e6:
            raise LabError(
                f"{key} in {self.file} must be between 0 and a million GB, it is {value}",
                fix="correct the value",
            )
        return value

    def strings(self, table: str, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._table(table)[key]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise LabError(
                f"{key} in {self.file} must be a list of strings, it is {values!r}",
                fix="put each value in quotes",
            )
        return tuple(values)

    def pairs(self, table: str) -> tuple[tuple[str, str], ...]:
        """A table of strings with free keys, sorted."""
        found = self._table(table)
        for key, value in found.items():
            if not isinstance(value, str):
                raise LabError(
                    f"{key} in [{table}] of {self.file} must be a string, it is {value!r}",
                    fix="put the value in quotes",
                )
        return tuple(sorted((key, str(value)) for key, value in found.items()))

    def _table(self, table: str) -> Mapping[str, object]:
        found = self._top[table] if table else self._top
        if not isinstance(found, dict):
            raise TypeError(f"[{table}] must have been checked before")
        return found


def _read_toml(file: Path) -> dict[str, object]:
    try:
        return dict(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{file} is not valid TOML", why=str(error), fix="correct the file") from None
    except OSError as error:
        raise LabError(f"cannot read {file}", why=str(error), fix="make the file readable") from None


def _check_keys(data: Mapping[str, object], *, table: str, file: Path) -> None:
    """Every key of the table there, none besides, each of its type."""
    expected = _KEYS[table]
    where = f"[{table}] of {file}" if table else str(file)
    valid = f"the keys are: {', '.join(expected)}"
    for key in data:
        if key not in expected:
            raise LabError(f"unknown key {key!r} in {where}", why=valid, fix="correct or remove the key")
    for key, kind in expected.items():
        if key not in data:
            raise LabError(f"key {key!r} is missing in {where}", why=valid, fix="add the key")
        if not _is_a(data[key], kind):
            raise LabError(
                f"{key} in {where} must be {_TYPE_NAMES[kind]}, it is {data[key]!r}",
                why=valid,
                fix="correct the value",
            )


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):  # which Python counts as a number
        return False
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind)
