"""Which stack fits a machine, with the reason: the newest one that the NVIDIA driver can run, or the CPU's."""

from __future__ import annotations

from collections.abc import Iterable

from lab.hardware.model import Hardware
from lab.stack import Stack, driver_runs

CPU = "cpu"


def fitting_stack(hardware: Hardware, *, stacks: Iterable[Stack]) -> tuple[str, str]:
    """Name and reason. A machine without GPU, or with a driver too old for every stack, gets the CPU's."""
    if hardware.driver is None or not hardware.gpus:
        return CPU, "no NVIDIA GPU answers"
    version = hardware.driver.version
    fit = [stack for stack in stacks if stack.device == "cuda" and driver_runs(stack, driver=version)]
    if not fit:
        return CPU, f"driver {version} is too old for every stack with CUDA"
    newest = max(fit, key=lambda stack: tuple(map(int, stack.needs.driver.split("."))))
    return newest.name, f"the newest that driver {version} runs"
