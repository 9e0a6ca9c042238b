"""What every program of a trial is told through its environment, whatever the experiment, and why. What depends on SGLang's
version stands in `lab/dialect.py` and the stack's `stack.toml`."""

from __future__ import annotations

from lab.experiment import Probe

COMMON_ENV = (
    ("HOME", "${SCRATCH}/home"),
    ("TMPDIR", "${SCRATCH}/tmp"),
    ("PATH", "${STACK}/bin:/usr/bin:/bin"),
    ("LANG", "C.UTF-8"),
    ("TZ", "UTC"),
    ("PYTHONUNBUFFERED", "1"),
    # Asked by torch for the names of its folders; in a container the caller's uid has no name.
    ("USER", "lab"),
    ("LOGNAME", "lab"),
    ("TRITON_CACHE_DIR", "${JIT}/triton"),
    ("TORCHINDUCTOR_CACHE_DIR", "${JIT}/inductor"),
    ("FLASHINFER_WORKSPACE_BASE", "${JIT}/flashinfer"),
)


def gpu_env(gpus: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """CUDA numbers GPUs by speed unless told otherwise; UUIDs keep the order of ranks, an empty list hides all."""
    return (("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), ("CUDA_VISIBLE_DEVICES", ",".join(gpus)))


def rank_env(cpus: tuple[tuple[int, ...], ...]) -> tuple[tuple[str, str], ...]:
    """The CPUs of each rank of a server on CPUs; without them SGLang starts no more ranks than there are NUMA nodes
    (`srt/utils/numa_utils.py`, `init_threads_binding`). Nothing for one rank, or for ranks on GPUs."""
    if len(cpus) < 2:
        return ()
    return (("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, own)) for own in cpus)),)


def probe_env(level: Probe, *, path: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """What loads the probe into a server (docs/decisions/0011-probe.md); `path` is the release's way in."""
    if level == "off":
        return ()
    return (
        ("PYTHONPATH", ":".join(path)),
        ("LAB_PROBE_DIR", "${TRIAL}/events"),
        ("LAB_PROBE_LEVEL", level),
    )
