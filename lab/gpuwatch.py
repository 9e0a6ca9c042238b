"""Watching a trial's GPUs while it runs: are they free before it starts, a sampler of its own beside it, who uses them once
the server is ready, and free again afterwards. Nothing here for a trial without GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lab import places
from lab.hardware.nvml import busy, read_use
from lab.hardware.sysfs import format_list
from lab.runtime.base import StartFailed

FREE_S = 60.0  # a large server's memory is given back some seconds after its processes are gone
LOOK_S = 0.5
STOP_S = 5.0


class GpuWatch:
    """The watch of one trial. `out` is gpu.csv, `log` what the sampler says of itself; `free_s` bounds, in seconds, how long
    it waits for GPUs to be free, before and after."""

    def __init__(
        self, gpus: Sequence[str], *, out: Path, log: Path, cpus: Sequence[int], free_s: float = FREE_S
    ) -> None:
        self._gpus = tuple(gpus)
        self._free_s = free_s
        self._out = out
        self._log = log
        self._cpus = format_list(cpus)
        self._sampler: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the sampler; `StartFailed` when a GPU is in use or does not answer."""
        if not self._gpus:
            return
        used = self._wait_until_free()
        if used:
            words = "; ".join(f"{gpu}: {what}" for gpu, what in used.items())
            raise StartFailed(f"a GPU of this trial is not free: {words}", name="gpu", phase="start")
        argv = (
            *(sys.executable, "-m", "lab.telemetry.sampler", "--out", str(self._out)),
            *("--gpus", ",".join(self._gpus), *(("--cpus", self._cpus) if self._cpus else ())),
        )
        path = os.pathsep.join(filter(None, (str(places.ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        with self._log.open("ab") as log:
            self._sampler = subprocess.Popen(  # noqa: S603  our own program
                argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def pids(self) -> tuple[int, ...]:
        """Who computes on the GPUs now, as the driver counts: right after the server is ready, that is the server."""
        return tuple(sorted({pid for use in read_use(self._gpus) for pid in use.pids})) if self._gpus else ()

    def stop(self) -> str:
        """End the sampler and wait until the GPUs are free; what still uses them, in words. Nothing where none was started."""
        if self._sampler is None:
            return ""
        self._sampler.terminate()
        try:
            self._sampler.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._sampler.kill()
            self._sampler.wait()
        self._sampler = None
        return "; ".join(f"{gpu}: {what}" for gpu, what in self._wait_until_free().items())

    def _wait_until_free(self) -> dict[str, str]:
        """The GPUs that are still in use after the bound, with words; empty as soon as all are free."""
        until = time.monotonic() + self._free_s
        while True:
            uses = read_use(self._gpus)
            used = busy(uses)
            lost = any(use.problem for use in uses)  # waiting brings no lost GPU back
            if not used or lost or time.monotonic() > until:
                return used
            time.sleep(LOOK_S)
