"""NVML by NVIDIA's own binding (nvidia-ml-py): start and stop it, ask it, say in words why it does not answer; and how
much each GPU is used right now. A missing library, driver or function is an answer, never a traceback.

Facts: https://docs.nvidia.com/deploy/nvml-api/. Functions that a driver lacks answer FUNCTION_NOT_FOUND, those that a
GPU lacks NOT_SUPPORTED; a GPU that fell off the bus answers GPU_IS_LOST to everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pynvml

T = TypeVar("T")
Handle = object

NO_ANSWER = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_DEPRECATED,
    pynvml.NVML_ERROR_NOT_FOUND,
)
"""What a healthy GPU may answer; any other error means that the GPU itself is in trouble."""
INIT_WORDS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver here: libnvidia-ml.so.1 is not found",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "NVIDIA's library is here, its kernel driver is not loaded "
    "(modprobe nvidia)",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "NVIDIA's library and kernel driver have different versions, "
    "as after an update: reboot, or reload the driver",
    pynvml.NVML_ERROR_NO_PERMISSION: "the NVIDIA driver refuses this user: check the rights of /dev/nvidia*",
    pynvml.NVML_ERROR_UNKNOWN: "NVML does not start (Unknown Error); a container loses its GPUs so after "
    "systemctl daemon-reload: start it again",
}


class NvmlAbsentError(Exception):
    """NVML cannot be used here; the text says why, for the user."""


IDLE_MIB = 1024
"""What an idle GPU may hold: display servers and the counters' own context take some hundred MiB. Processes of other
containers do not always show, their memory does."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a GPU is used at the moment. `used_mib` is what programs hold, without what the driver reserves;
    `pids` are processes that compute on it, as this process's namespace or the host counts them."""

    uuid: str
    used_mib: int | None
    free_mib: int | None
    pids: tuple[int, ...]
    problem: str = ""


@contextmanager
def session() -> Iterator[None]:
    """NVML started, and shut down afterwards; raises NvmlAbsentError where it cannot be."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        words = INIT_WORDS.get(error.value, f"NVML does not start: {error}")
        raise NvmlAbsentError(words) from None
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def read_use(uuids: Sequence[str]) -> tuple[Use, ...]:
    """Memory and processes of each GPU of `uuids`, in their order."""
    try:
        with session():
            return tuple(_use(uuid) for uuid in uuids)
    except NvmlAbsentError as absent:
        return tuple(
            Use(uuid=uuid, used_mib=None, free_mib=None, pids=(), problem=str(absent)) for uuid in uuids
        )


def busy(uses: Sequence[Use]) -> dict[str, str]:
    """The GPUs that somebody uses, or that do not answer, by UUID, with words for it."""
    found: dict[str, str] = {}
    for use in uses:
        words = [use.problem] if use.problem else []
        words += [f"{len(use.pids)} process{'es' * (len(use.pids) > 1)}"] if use.pids else []
        if use.used_mib is not None and (use.pids or use.used_mib > IDLE_MIB):
            words.append(f"{use.used_mib} MiB")
        if words:
            found[use.uuid] = ", ".join(words)
    return found


def ask(call: Callable[[], T]) -> T | None:
    """The call's result, None when a healthy GPU does not offer it; raises NVMLError when the GPU is in trouble."""
    try:
        return call()
    except pynvml.NVMLLibraryMismatchError:  # how the binding reports some missing functions
        return None
    except pynvml.NVMLError as error:
        if error.value in NO_ANSWER:
            return None
        raise


def _use(uuid: str) -> Use:
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        used, free = memory_mib(handle)
        processes = ask(partial(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)) or ()
        pids = tuple(sorted(int(process.pid) for process in processes))
        return Use(uuid=uuid, used_mib=used, free_mib=free, pids=pids)
    except pynvml.NVMLError as error:
        return Use(uuid=uuid, used_mib=None, free_mib=None, pids=(), problem=str(error))


def memory_mib(handle: Handle) -> tuple[int | None, int | None]:
    """Used and free MiB. Version 2 of the call leaves out what the driver reserves (0.6 GiB on an A100), version 1
    counts it as used; an older driver has only version 1."""
    memory = ask(partial(pynvml.nvmlDeviceGetMemoryInfo, handle, version=pynvml.nvmlMemory_v2))
    if memory is None:
        memory = ask(partial(pynvml.nvmlDeviceGetMemoryInfo, handle))
    return (None, None) if memory is None else (int(memory.used) >> 20, int(memory.free) >> 20)
