"""What a run needs before it can be planned for good: which runtime and why, the stack (built as a folder, or as an image),
the model, and where programs find them. `resolve` decides and starts nothing; `make` builds what is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from lab import places
from lab.boxes import PLACES, Names
from lab.claims import Capability
from lab.container import STACK, Container, Mount, Setup
from lab.errors import LabError, unknown_name
from lab.hardware.model import Hardware
from lab.hardware.nvml import busy, read_use
from lab.images.build import build_image, image_tag
from lab.modelfiles import BUILD_LIMIT_S, Builder, with_python
from lab.models import Model
from lab.progress import Progress
from lab.rundir import read_json
from lab.runtime.docker import caller
from lab.runtime.engine import Engine, EngineError, accepted_ulimits, connect
from lab.runtime.owner import me
from lab.site import RUNTIMES, Site
from lab.stack import Stack
from lab.stacks.build import ensure, stack_folder
from lab.weights import Weights, container_folder, ensure_weights

# NCCL registers memory with the GPU, and deep stacks of C++ threads outgrow 8 MB: NVIDIA asks for both limits in the
# notes of its containers.
ULIMITS = {"memlock": -1, "stack": 67_108_864}


class NoImageError(LabError):
    """The stack's image is not there and cannot be built."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was decided; `site.runtime` is never empty here, and `site.reasons` say why it is what it is.

    `insisted` tells that a person named the runtime. `hardware` is the machine, `busy` its GPUs in use by UUID,
    with words. `places` are the plan's placeholders as programs see them, `containers` and `engine` None for
    processes.
    """

    stack: Stack
    model: Model
    weights: Weights
    site: Site
    hardware: Hardware
    busy: dict[str, str]
    places: dict[str, str]
    containers: Setup | None = None
    engine: Engine | None = None
    insisted: bool = False


def resolve(
    stack: Stack,
    model: Model,
    *,
    weights: Weights,
    site: Site,
    hardware: Hardware,
    runtime: str,
    dry_run: bool,
) -> Prepared:
    """Decide the runtime and where everything is. `LabError` when docker is asked for and no engine answers,
    unless nothing will be started."""
    insisted = bool(runtime or site.runtime)
    name, reason, engine = _choose(site, asked=runtime, dry_run=dry_run)
    here = stack.device == "cuda" and not dry_run
    used = busy(read_use([gpu.uuid for gpu in hardware.gpus])) if here else {}
    site = replace(
        site,
        runtime=name,
        capabilities=capabilities(site, stack=stack, hardware=hardware),
        reasons=(f"runtime {name}: {reason}", *site.reasons),
    )
    cache = places.cache()
    jit = cache / "jit" / f"{stack.name}-{stack.lock_hash[:12]}"
    if name == "process" and stack.device != "cpu":
        raise LabError(
            f"stack {stack.name!r} runs in containers only",
            why=f"CUDA's tools are in its image; the runtime is process: {reason}",
            fix="start a Docker engine, or use --stack cpu",
        )
    if name == "process":
        where = {
            "STACK": str(stack_folder(stack, cache=cache)),
            "MODEL": str(weights.folder),
            "LAB": str(places.PACKAGE),
            "JIT": str(jit),
        }
        return Prepared(
            stack=stack, model=model, weights=weights, site=site, hardware=hardware, busy=used, places=where
        )
    tag = image_tag(stack)
    image = engine.image(tag) if engine is not None else None
    setup = Setup(
        image=tag if image is None else image.id,
        image_name=tag,
        model=str(weights.folder),
        lab=str(places.PACKAGE),
        jit=str(jit),
        gpu_request="cdi" if engine is not None and engine.has_cdi else "nvidia",
        shm_gb=site.shm_gb,
        memory_gb=site.memory_gb,
        ulimits=ULIMITS,
    )
    return Prepared(
        stack=stack,
        model=model,
        weights=weights,
        site=site,
        hardware=hardware,
        busy=used,
        places=dict(PLACES),
        containers=setup,
        engine=engine,
        insisted=insisted,
    )


def capabilities(site: Site, *, stack: Stack, hardware: Hardware) -> tuple[Capability, ...]:
    """What claims and variants may count on: what the site's file says, and GPUs and NVLink where a server uses them.

    Profilers are not among it: nothing runs them yet.
    """
    found: set[Capability] = set(site.capabilities)
    if stack.device == "cuda" and hardware.gpus:
        found.add("gpu")
        if any(link.nvlinks for link in hardware.links):
            found.add("nvlink")
    return tuple(sorted(found))


def _choose(site: Site, *, asked: str, dry_run: bool) -> tuple[str, str, Engine | None]:
    """The runtime's name, why it, and the engine if it is docker."""
    wanted = asked or site.runtime
    if wanted and wanted not in RUNTIMES:
        raise unknown_name("runtime", wanted, RUNTIMES)
    if wanted == "process":
        return wanted, "--runtime" if asked else "the site's file says so", None
    try:
        engine = connect()
    except LabError as error:
        if wanted and not dry_run:
            raise
        if wanted:
            return wanted, f"asked for, although {error.problem} ({error.why})", None
        return "process", f"{error.problem} ({error.why})", None
    if wanted:
        return wanted, f"{'--runtime' if asked else 'the site file says so'}; engine {engine.version}", engine
    return "docker", f"Docker engine {engine.version} answers", engine


def without_containers(prepared: Prepared, *, error: NoImageError) -> Prepared:
    """The same as processes, because the image cannot be had and nobody insisted on containers."""
    site = replace(prepared.site, reasons=prepared.site.reasons[1:])
    found = resolve(
        prepared.stack,
        prepared.model,
        weights=prepared.weights,
        site=site,
        hardware=prepared.hardware,
        runtime="process",
        dry_run=False,
    )
    reason = f"runtime process: a Docker engine answers, but {error.problem} (--runtime docker insists)"
    return replace(found, site=replace(found.site, reasons=(reason, *found.site.reasons[1:])))


def make(prepared: Prepared, *, progress: Progress) -> tuple[Prepared, dict[str, object]]:
    """Build what is missing; returns what was decided, now complete, and a description of the software."""
    if prepared.containers is None or prepared.engine is None:
        folder = ensure(prepared.stack, cache=places.cache(), say=progress.step, live=progress.live)
        builder = with_python(folder / "bin" / "python")
        _ensure(prepared, builder=builder, progress=progress)
        return prepared, {"stack": read_json(folder / "lab-stack.json")}
    engine, setup = prepared.engine, prepared.containers
    image = engine.image(setup.image_name)
    if image is None:
        try:
            build_image(prepared.stack, cache=places.cache(), say=progress.step, live=progress.live)
        except LabError as error:
            raise NoImageError(error.problem, why=error.why, fix=error.fix) from error
        image = engine.image(setup.image_name)
    if image is None:
        raise LabError(f"the engine lost the image {setup.image_name}", fix="run the same command again")
    setup = replace(setup, image=image.id)
    try:
        limits, refused = accepted_ulimits(
            engine, wanted=setup.ulimits, probe=lambda wanted: _probe(image.id, ulimits=wanted)
        )
        builder = _in_container(engine, image=image.id, models=places.cache() / "models")
        _ensure(prepared, builder=builder, progress=progress)
        folder = container_folder(prepared.model, prepared.weights, cache=places.cache())
    except EngineError as error:
        raise LabError(
            "the Docker engine cannot run the stack's image",
            why=str(error),
            fix="see invoke doctor, or use --runtime process",
        ) from error
    setup = replace(setup, ulimits=limits, model=str(folder))
    reasons = (*prepared.site.reasons, *((refused,) if refused else ()))
    ready = replace(prepared, containers=setup, site=replace(prepared.site, reasons=reasons))
    about = {"name": setup.image_name, "id": image.id, "labels": image.labels, "bytes": image.size_bytes}
    return ready, {"image": about, "engine": engine.version}


def _ensure(prepared: Prepared, *, builder: Builder, progress: Progress) -> None:
    ensure_weights(prepared.model, prepared.weights, cache=places.cache(), builder=builder, say=progress.step)


def _probe(image: str, *, ulimits: dict[str, int]) -> Container:
    """A container that ends at once, to see what the engine accepts."""
    return _short(
        image, name="probe", argv=("true",), log="/dev/null", ulimits=tuple(sorted(ulimits.items()))
    )


def _in_container(engine: Engine, *, image: str, models: Path) -> Builder:
    """A builder of models that runs in the stack's image; the folders lie in it where they lie on the host."""

    def build(argv: tuple[str, ...]) -> tuple[int, str]:
        log = models / f".{os.getpid()}.log"
        mounts = (
            Mount(kind="bind", source=str(places.PACKAGE), target=str(places.PACKAGE), read_only=True),
            Mount(kind="bind", source=str(models), target=str(models)),
        )
        box = _short(
            image, name="model", argv=(f"{STACK}/bin/python", "-I", *argv), log=str(log), mounts=mounts
        )
        try:
            code, said = engine.run_once(box, limit_s=BUILD_LIMIT_S)
            return code, (log.read_text(encoding="utf-8", errors="replace") if log.exists() else said)
        finally:
            log.unlink(missing_ok=True)

    return build


def _short(
    image: str,
    *,
    name: str,
    argv: tuple[str, ...],
    log: str,
    mounts: tuple[Mount, ...] = (),
    ulimits: tuple[tuple[str, int], ...] = (),
) -> Container:
    """A container for a program of seconds, without a network."""
    names = Names(run_id=f"prepare-{os.getpid()}", owner=me().label())
    return Container(
        name=f"{names.prefix}-{name}",
        image=image,
        argv=argv,
        env=(("HOME", "/tmp"),),  # noqa: S108  the container's own
        labels=tuple(sorted(names.labels.items())),
        user=caller(),
        network="none",
        mounts=mounts,
        log=log,
        workdir="/",
        ulimits=ulimits,
    )
