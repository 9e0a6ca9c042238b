"""For releases of SGLang without plugins (before 0.5.11): Python imports a module of this name at its start, in every
process whose PYTHONPATH holds this folder, spawned ones included. It loads the probe, then runs the `sitecustomize` that
it stands in front of, if there is one."""

import os
import sys


def _load_probe() -> None:
    if os.environ.get("LAB_PROBE_DIR"):
        from labprobe.load import load

        load()


def _run_the_other() -> None:
    from importlib.machinery import PathFinder

    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(sys.modules[__name__])


try:
    _load_probe()
except Exception as error:
    print(f"labprobe: not loaded: {error!r}", file=sys.stderr)
_run_the_other()
