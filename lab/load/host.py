"""The client's host process: imports what clients need while the server starts, then runs them one by one.

It runs with the stack's interpreter as `python host.py MAILBOX MODULE...`. For each `task-N.json` that
appears in MAILBOX ({"argv": [...], "log": path}) it forks, and the child runs `python ARGV...` in all but
the start-up: same module or file, same sys.argv, __main__ executed from its source. `done-N.json` then
tells the exit code and the time. Importing SGLang's client takes eight seconds of CPU; done here it is
over before the server is ready, and no load is measured while its client still imports.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

POLL_S = 0.02


def main() -> None:
    # Asked to end, it just ends: nothing is open, and unwinding a process this size takes half a second.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    mailbox = Path(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            importlib.import_module(name)
        except (
            ImportError
        ) as error:  # a module of another SGLang version; the load itself will import what it needs
            print(f"host: {name} not preloaded: {error}", flush=True)
    (mailbox / "ready").touch()
    number = 0
    while True:
        task = mailbox / f"task-{number}.json"
        if not task.exists():
            time.sleep(POLL_S)
            continue
        answer = run(json.loads(task.read_text(encoding="utf-8")))
        partial = mailbox / f"done-{number}.json.part"
        partial.write_text(json.dumps(answer), encoding="utf-8")
        partial.rename(mailbox / f"done-{number}.json")
        number += 1


def run(task: dict[str, object]) -> dict[str, object]:
    """Run one task in a child; exit codes are those of a shell (128 + n for signal n)."""
    started = time.time()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70
        try:
            code = execute(task)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"exit": code if code >= 0 else 128 - code, "started": started, "ended": time.time()}


def execute(task: dict[str, object]) -> int:
    """In the child: point stdout and stderr at the log, then be `python ARGV...`."""
    log = os.open(str(task["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    argv = [str(word) for word in task["argv"]]  # type: ignore[attr-defined]
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None:
            return 0
        if isinstance(stop.code, int):
            return stop.code
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
