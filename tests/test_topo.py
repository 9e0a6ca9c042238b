"""What `invoke topo` prints, on the plan's box and on machines where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nvmlstandin import DRIVER_NOT_LOADED, MIG_ON, NO_GPU, PLAN_BOX, WORKSTATION, hardware_of, stand_in

from lab.hardware.model import from_json
from lab.hardware.topo import show

PLAN_MATRIX = """
      GPU0  GPU1  GPU2  GPU3  GPU4  GPU5  GPU6  CPU Affinity  NUMA Affinity
GPU0  X     NV12  PXB   PXB   SYS   SYS   SYS   0-31,64-95    0
GPU1  NV12  X     PXB   PXB   SYS   SYS   SYS   0-31,64-95    0
GPU2  PXB   PXB   X     NV12  SYS   SYS   SYS   0-31,64-95    0
GPU3  PXB   PXB   NV12  X     SYS   SYS   SYS   0-31,64-95    0
GPU4  SYS   SYS   SYS   SYS   X     PXB   PXB   32-63,96-127  1
GPU5  SYS   SYS   SYS   SYS   PXB   X     NV12  32-63,96-127  1
GPU6  SYS   SYS   SYS   SYS   PXB   NV12  X     32-63,96-127  1
""".strip("\n")


def test_the_plans_box(golden: Callable[[str, str], None]) -> None:
    text = show(hardware_of(PLAN_BOX))
    assert PLAN_MATRIX in text
    assert "NVLink joins (0,1), (2,3), (5,6); alone: GPU 4" in text
    for line in (
        "TP=1: GPU 4: NUMA node 1",
        "TP=2: GPUs 0, 1: an NVLink pair (NV12), NUMA node 0",
        "TP=4: GPUs 0-3: two NVLink pairs over PXB, NUMA node 0",
        "worse: GPUs 2-5 would cross NUMA nodes 0, 1 (SYS)",
    ):
        assert line in text
    golden("topo-plan.txt", text)


def test_a_busy_gpu_is_marked_and_passed_over() -> None:
    text = show(hardware_of(PLAN_BOX), busy={PLAN_BOX.uuid(1): "1 process, 7000 MiB"})
    assert f"{PLAN_BOX.uuid(1)}  in use: 1 process, 7000 MiB" in text
    assert (
        "TP=2: GPUs 2, 3: an NVLink pair (NV12), NUMA node 0; GPU 1 in use, else it would be GPUs 0, 1"
        in text
    )


def test_the_json_is_a_hardware_file_with_the_choices_besides() -> None:
    hardware = hardware_of(PLAN_BOX)
    text = show(hardware, as_json=True, busy={PLAN_BOX.uuid(5): "used"})
    assert from_json(text, where="topo.json") == hardware
    raw = json.loads(text)
    assert raw["islands"] == [[0, 1], [2, 3], [5, 6]]
    assert raw["placements"]["2"]["gpus"] == [PLAN_BOX.uuid(0), PLAN_BOX.uuid(1)]
    assert raw["placements"]["1"]["mems"] == [1]
    assert raw["busy"] == {PLAN_BOX.uuid(5): "used"}


def test_what_a_machine_cannot_do_is_said_in_its_place() -> None:
    text = show(hardware_of(MIG_ON))
    assert "MIG mode" in text
    assert "TP=2: not here: needs 2 free GPUs, 1 is free" in text
    raw = json.loads(show(hardware_of(WORKSTATION), as_json=True))
    assert raw["placements"]["4"]["impossible"] == "TP=4 needs 4 GPUs, this machine has 2"


def test_without_gpu_the_cpus_are_shown() -> None:
    text = show(hardware_of(NO_GPU))
    assert "no GPU: the server runs on CPUs" in text
    assert "CPUs: server 0-2,4-6, client 3,7; memory node 0" in text
    assert "note: driver 555.42.06 sees no GPU" in text
    assert "GPU0" not in text


def test_limits_of_the_process_are_shown() -> None:
    hardware = replace(hardware_of(PLAN_BOX), cpus_allowed=(0, 1, 2, 3, 64), mems_allowed=(0,), cpu_quota=2.5)
    text = show(hardware)
    assert "this process may use CPUs 0-3,64" in text
    assert "this process may use the memory of NUMA nodes 0" in text
    assert "this process may use the time of 2.5 CPUs" in text


def test_what_is_not_known_is_a_question_mark_not_a_crash() -> None:
    hardware = hardware_of(PLAN_BOX)
    gpus = tuple(replace(gpu, numa_node=None, cpus=(), memory_mib=None) for gpu in hardware.gpus)
    text = show(replace(hardware, gpus=gpus, links=(), driver=None))
    assert "no NVIDIA driver" in text
    assert "UNKNOWN" in text
    assert "NUMA node not known" in text


def test_a_driver_that_does_not_answer(tmp_path: Path) -> None:
    made = stand_in(tmp_path, PLAN_BOX.with_lines(f"init {DRIVER_NOT_LOADED}"))
    code = "import sys; from pathlib import Path; from lab.hardware.detect import detect;"
    code += "from lab.hardware.topo import show; print(show(detect(Path(sys.argv[1]))))"
    words = (sys.executable, "-c", code, str(made.root))
    done = subprocess.run(words, env=made.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "note: NVIDIA's library is here, its kernel driver is not loaded" in done.stdout
    assert "no GPU: the server runs on CPUs" in done.stdout
