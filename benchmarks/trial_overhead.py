"""One trial of the lab against the shell script that does the same (the run's own commands.sh), in turns.

The trial's time is from its status.json, start of the server to the end of all processes; the script's is that of
`bash commands.sh`, which also makes its folders, in milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from checkout import make_checkout


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder))
        checkout.tiny("overhead", questions=20, output=32)
        ratios = []
        for i in range(pairs):
            code, output = checkout.invoke("exp.overhead")
            assert code in (0, 2), output
            run = checkout.newest_run("overhead")
            status = json.loads((run / "trials" / "000-only-r0" / "status.json").read_text())
            assert status["status"] == "ok", output
            lab = datetime.fromisoformat(status["ended"]) - datetime.fromisoformat(status["started"])
            start = time.perf_counter()
            environment = {"PATH": os.environ["PATH"], "OUT": f"{folder}/script-{i}"}
            subprocess.run(
                ["bash", str(run / "commands.sh")],
                env=environment,
                check=True,
                capture_output=True,
                cwd=folder,
            )
            script = time.perf_counter() - start
            ratios.append(lab.total_seconds() / script)
            print(
                f"lab {lab.total_seconds():.1f} s, script {script:.1f} s, ratio {ratios[-1]:.3f}", flush=True
            )
    print(f"median ratio {median(ratios):.3f}: the lab adds {100 * (median(ratios) - 1):+.1f} % to a trial")


if __name__ == "__main__":
    main()
