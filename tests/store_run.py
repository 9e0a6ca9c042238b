"""Pack a real run for tests/data/runs: `python tests/store_run.py RUN NAME`.

Paths of the machine are replaced, the raw part is sealed again where it was sealed, everything derived is rebuilt from
the replaced files, and all but the plots goes into tests/data/runs/NAME.tar.xz. test_stored_runs.py rebuilds it and compares.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import places
from lab.report.render import analyse
from lab.rundir import Run, raw_files, seal

DATA = Path(__file__).resolve().parent / "data" / "runs"


def main() -> None:
    source, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    root = source.parents[2]  # of the checkout that holds runs/<experiment>/<run>
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / source.name)
        shutil.copytree(source, run.path)
        sealed = run.sums.exists()
        for file in raw_files(run):
            path = run.path / file
            path.chmod(0o644)
            path.write_bytes(scrub(path.read_bytes(), root=root))
        if sealed:
            seal(run)
        analyse(run)
        shutil.rmtree(run.plots)
        DATA.mkdir(parents=True, exist_ok=True)
        with tarfile.open(DATA / f"{name}.tar.xz", "w:xz", preset=9) as tar:
            tar.add(run.path, arcname=run.path.name, filter=anonymous)


def scrub(text: bytes, *, root: Path) -> bytes:
    for path, instead in ((places.cache(), b"/lab-cache"), (root, b"/lab-checkout")):
        text = text.replace(str(path).encode(), instead)
    text = re.sub(rb"/(?:root|home|opt)/[\w./-]*?/lib/python3", b"/lab-python/lib/python3", text)
    return re.sub(rb"/tmp/sglang-lab-[\w-]+", b"/lab-scratch", text)


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info


if __name__ == "__main__":
    main()
