"""The same readers on a real GPU, against nvidia-smi. Runs only where one is; CI has none, so it is skipped there even
when parts are required."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.hardware.detect import detect
from lab.hardware.model import Hardware, from_json, links_by_pair, to_json
from lab.hardware.nvml import read_use
from lab.hardware.placement import Request, place
from lab.telemetry.gpucsv import gaps, read_samples

SMI = shutil.which("nvidia-smi")


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    found = detect()
    if not found.gpus or SMI is None:
        pytest.skip(f"no GPU: {'; '.join(found.notes) or 'nvidia-smi is not here'}")
    return found


def smi(*words: str) -> str:
    assert SMI is not None
    return subprocess.run((SMI, *words), capture_output=True, text=True, check=True).stdout


def test_gpus_as_nvidia_smi_lists_them(hardware: Hardware) -> None:
    fields = "index,uuid,pci.bus_id,name,memory.total,compute_cap,persistence_mode,clocks.max.sm"
    rows = smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits").strip().splitlines()
    assert len(rows) == len(hardware.gpus)
    for row, gpu in zip(rows, hardware.gpus, strict=True):
        index, uuid, bus, name, memory, capability, persistence, clock = row.split(", ")
        assert (gpu.index, gpu.uuid, gpu.name) == (int(index), uuid, name)
        assert gpu.pci_bus_id == bus.lower()[-len(gpu.pci_bus_id) :]
        assert gpu.memory_mib == int(memory)
        assert gpu.compute_capability == capability
        assert gpu.persistence == (persistence == "Enabled")
        assert gpu.sm_clock_max_mhz == int(clock)


def test_the_matrix_as_nvidia_smi_draws_it(hardware: Hardware) -> None:
    links = links_by_pair(hardware)
    table = [line.split() for line in smi("topo", "-m").splitlines() if "\033" not in line or "GPU" in line]
    rows = [words for words in table if words and words[0].startswith("GPU") and "X" in words]
    if len(rows) != len(hardware.gpus):
        pytest.skip("nvidia-smi does not draw its matrix here")
    for a, words in enumerate(rows):
        for b in range(len(rows)):
            assert words[1 + b] == ("X" if a == b else links[a, b].label)


def test_the_machine_can_be_written_and_planned_for(hardware: Hardware) -> None:
    assert from_json(to_json(hardware), where="hardware.json") == hardware
    if not all(gpu.mig for gpu in hardware.gpus):
        assert place(hardware, Request(tp=1)).gpus


def test_use_is_told(hardware: Hardware) -> None:
    for use in read_use([gpu.uuid for gpu in hardware.gpus]):
        assert use.problem == ""
        assert use.used_mib is not None
        assert use.free_mib is not None


def test_the_sampler(hardware: Hardware, tmp_path: Path) -> None:
    gpus = [gpu.uuid for gpu in hardware.gpus]
    out = tmp_path / "gpu.csv"
    words = ("-m", "lab.telemetry.sampler", "--out", str(out), "--gpus", ",".join(gpus))
    started = time.time()
    running = subprocess.Popen((sys.executable, *words), stdout=subprocess.PIPE, text=True)
    time.sleep(3)
    running.send_signal(signal.SIGTERM)
    summary = json.loads(running.communicate(timeout=20)[0])
    samples, problems = read_samples(out)
    assert problems == []
    assert len(samples) == summary["rows"] >= 10 * len(gpus)
    assert {sample.gpu for sample in samples} == set(gpus)
    last = samples[-1]
    for value in (last.memory_used_mib, last.temperature_c, last.sm_clock_mhz, last.clock_reasons):
        assert value is not None
    assert not gaps(samples, gpus, start_s=started, end_s=samples[-1].time_s)
