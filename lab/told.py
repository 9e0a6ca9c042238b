"""What every program of a trial is told through its environment, whatever the experiment, and why. What depends on SGLang's
version stands in `lab/dialect.py` and the stack's `stack.toml`."""

from __future__ import annotations

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
