"""Hooks that cannot harm: `wrap` puts a body around a function of the server so that the function is called exactly
once, with its own arguments, whatever the body does. What a body raises is counted; after some errors it is left out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A body that fails this often fails always; building a traceback on each pass would cost more than the hook.
ERRORS_ALLOWED = 20

Function = Callable[..., object]


@dataclass(frozen=True)
class Hook:
    """A function of the server, `parameters` that its signature must begin with, and what is done around it.

    `before` gets the call's arguments; what it returns goes, with the result and the arguments, to `after`.
    """

    name: str
    module: str
    path: str
    parameters: tuple[str, ...]
    before: Function
    after: Function

    @property
    def target(self) -> str:
        return f"{self.module}.{self.path}"


class Guard:
    """The errors of one hook's bodies."""

    def __init__(self, name: str, *, report: Callable[[str, str], None], fault: int = 0) -> None:
        self.name = name
        self.on = True
        self.errors = 0
        self._report = report
        self.faults = fault > 0
        self._calls_to_fault = fault

    def failed(self, error: Exception) -> None:
        """Count an error; the first and the last allowed are reported."""
        self.errors += 1
        if self.errors in (1, ERRORS_ALLOWED):
            self._report(self.name, f"{type(error).__name__}: {error}"[:300])
        if self.errors >= ERRORS_ALLOWED:
            self.on = False

    def maybe_fault(self) -> None:
        """Raise in the call that a test asked for."""
        self._calls_to_fault -= 1
        if not self._calls_to_fault:
            raise RuntimeError("this fault was asked for")


def wrap(original: Function, hook: Hook, guard: Guard) -> Function:
    """`original` with the hook's bodies around it. An exception of `original` passes through; `after` is skipped then."""
    before, after = hook.before, hook.after

    @functools.wraps(original)
    def wrapper(*args: object, **kwargs: object) -> object:
        ready, token = False, None
        if guard.on:
            try:
                token = before(*args, **kwargs)
                ready = True
            except Exception as error:  # what a body raises must never reach the scheduler
                guard.failed(error)
        result = original(*args, **kwargs)
        if ready:
            try:
                if guard.faults:
                    guard.maybe_fault()
                after(token, result, *args, **kwargs)
            except Exception as error:  # what a body raises must never reach the scheduler
                guard.failed(error)
        return result

    return wrapper


def attach(module: object, hook: Hook, guard: Guard) -> tuple[str, str]:
    """Put the hook in its place in `module`: ("on", ""), or ("missing" | "changed", what was found)."""
    *parents, name = hook.path.split(".")
    owner = module
    for parent in parents:
        owner = getattr(owner, parent, None)
    # A method that a class only inherits is not its own to change.
    original = vars(owner).get(name) if owner is not None else None
    if not callable(original):
        return "missing", f"{hook.path} is not a function of {hook.module}"
    found = tuple(inspect.signature(original).parameters)
    if found[: len(hook.parameters)] != hook.parameters:
        return "changed", f"expected ({', '.join(hook.parameters)}), found ({', '.join(found)})"
    setattr(owner, name, wrap(original, hook, guard))
    return "on", ""


def after_import(modules: Mapping[str, Callable[[object], None]]) -> None:
    """Call each function with its module: now if it is imported already, else right after it is."""
    import sys

    waiting = dict(modules)
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)(sys.modules[name])
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """Finds nothing itself: it asks the other finders, and makes the loader of a module we wait for tell us."""

    def __init__(self, waiting: dict[str, Callable[[object], None]]) -> None:
        self._waiting = waiting

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        import sys

        call = self._waiting.pop(name, None)
        if call is None:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None:
                _tell(spec.loader, call)
                return spec
        return None


def _tell(loader: object, call: Callable[[object], None]) -> None:
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: object) -> None:
        execute(module)
        call(module)

    loader.exec_module = exec_module  # type: ignore[attr-defined]  # on this one loader object, not on its class
