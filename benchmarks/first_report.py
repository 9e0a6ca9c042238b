"""From a bare machine to the first report: a fresh environment, an empty cache, the README's first command; then
the same experiment again with the stack built. Prints each step and the ratio of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from checkout import LEFT_OUT


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone, environment = Path(folder) / "clone", Path(folder) / "venv"
        shutil.copytree(ROOT, clone, ignore=LEFT_OUT)
        keep = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
        variables = {
            **keep,
            "PATH": f"{environment}/bin:{os.environ['PATH']}",
            "XDG_CACHE_HOME": f"{folder}/cache",
            "XDG_STATE_HOME": f"{folder}/state",
        }
        taken = []

        def step(name: str, *words: str) -> None:
            start = time.perf_counter()
            if words:
                subprocess.run(words, cwd=clone, env=variables, check=True)
            else:
                venv.create(environment, with_pip=True)
            taken.append(time.perf_counter() - start)
            print(f"{name}: {taken[-1]:.0f} s", flush=True)

        step("environment")
        step("pip install -e .", "pip", "install", "--quiet", "-e", ".")
        step("invoke exp.radix, nothing built", "invoke", "exp.radix")
        first = sum(taken)
        step("invoke exp.radix, stack built", "invoke", "exp.radix")
    print(f"first report after {first:.0f} s, of 360 allowed: ratio {first / 360:.2f}")
    print(f"with the stack built {taken[-1]:.0f} s, of 180 allowed: ratio {taken[-1] / 180:.2f}")
    print(f"first over later: {first / taken[-1]:.2f}")


if __name__ == "__main__":
    main()
