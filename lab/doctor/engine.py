"""Rows on the Docker engine: whether it answers, the stacks' images and the profilers in them, room for images, and whether
containers get GPUs and keep them. In go the engine's own account (`docker info`) and a root to read from; out come rows."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab.doctor.finding import Finding, finding, text_of
from lab.hardware.model import Hardware
from lab.images.build import image_tag
from lab.runtime.engine import Engine
from lab.stack import Stack, driver_runs

HOOK = "nvidia-container-runtime-hook"
CDI = "nvidia.com/gpu"
REGENERATE = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
FIRST_NVIDIA_DEVICE = "dev/char/195:0"


def images(engine: Engine, stacks: Sequence[Stack], *, hardware: Hardware) -> list[Finding]:
    """The image of each stack that is built or that this machine could use, and the profilers in those for GPUs."""
    rows = []
    for stack in stacks:
        tag = image_tag(stack)
        image = engine.image(tag)
        if image is None and not usable(stack, hardware):
            continue
        rows.append(
            finding(
                f"image of stack {stack.name}",
                good=image is not None,
                state="not built yet" if image is None else f"{image.size_bytes / 1e9:.1f} GB",
                matters=f"containers of stack {stack.name} start from {tag}",
                fix=f"invoke image.build --stack {stack.name}",
            )
        )
        rows += [] if image is None else list(profilers(stack, image.labels))
    return rows


def usable(stack: Stack, hardware: Hardware) -> bool:
    """Whether the stack could serve here: on the CPU always, on GPUs when some answer and their driver is new enough."""
    driver = hardware.driver.version if hardware.driver else ""
    return stack.device == "cpu" or bool(hardware.gpus and driver_runs(stack, driver=driver))


def profilers(stack: Stack, labels: Mapping[str, str]) -> Iterator[Finding]:
    """nsys and ncu by the image's labels, which its build measured; nothing for a stack without profilers."""
    wanted = {name: text for name, text in (("nsys", stack.image.nsys), ("ncu", stack.image.ncu)) if text}
    if not wanted:
        return
    found = {name: labels.get(f"lab.{name}", "") for name in wanted}
    yield finding(
        f"profilers in image {stack.name}",
        good=found == wanted,
        state=", ".join(f"{name} {version or 'missing'}" for name, version in found.items()),
        matters="their versions belong to the CUDA of the stack: "
        + ", ".join(f"{name} {version}" for name, version in wanted.items()),
        fix=f"invoke image.build --stack {stack.name}",
    )


def room(info: Mapping[str, object], stack: Stack, *, built: bool, root: Path) -> Iterator[Finding]:
    """Disk where the engine keeps images, for the stack that fits; nothing where that folder is not visible here."""
    folder = root / str(info.get("DockerRootDir") or "nowhere").lstrip("/")
    try:
        free = shutil.disk_usage(folder).free / 1e9
    except OSError:
        return
    needs = 0.0 if built else stack.image.build_gb
    yield finding(
        "disk for images",
        good=free >= needs,
        state=f"{free:.1f} GB free in {info['DockerRootDir']}",
        matters=f"the image of stack {stack.name} is built" if built else _needs(stack),
        fix="docker system df shows what takes room; docker builder prune; or give the engine a larger data-root",
    )


def _needs(stack: Stack) -> str:
    return f"building the image of stack {stack.name} takes up to {stack.image.build_gb:g} GB"


def toolkit(
    info: Mapping[str, object], hardware: Hardware, *, root: Path, path: str | None = None
) -> Finding:
    """Can the engine give GPUs to containers, by UUID, as the lab asks for them? `path` is where programs are looked for,
    this process's PATH where not given; the engine may have another."""
    driver = hardware.driver.version if hardware.driver else ""
    matters = "without it no container gets a GPU; --runtime process does without"
    if info.get("CDISpecDirs"):
        fault, fix = _cdi_fault(info, hardware, root=root, driver=driver)
        state = fault or "CDI, with a specification of these GPUs"
        return finding("container toolkit", good=not fault, state=state, matters=matters, fix=fix)
    runtimes = info.get("Runtimes")
    found = ["runtime nvidia"] if isinstance(runtimes, Mapping) and "nvidia" in runtimes else []
    found += [HOOK] if shutil.which(HOOK, path=os.environ.get("PATH") if path is None else path) else []
    return finding(
        "container toolkit",
        good=bool(found),
        state=" and ".join(found) or f"neither runtime nvidia nor {HOOK} in sight",
        matters=matters,
        fix="install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker "
        "&& sudo systemctl restart docker",
    )


def _cdi_fault(info: Mapping[str, object], hardware: Hardware, *, root: Path, driver: str) -> tuple[str, str]:
    """What is wrong with the CDI specifications, and what to type; empty when nothing is.

    A specification names driver files by version, so one of before an update points to files that are gone. The lab
    asks for `nvidia.com/gpu=UUID`.
    """
    specs = "\n".join(_specs(info, root))
    devices = info.get("DiscoveredDevices")
    listed = (
        [str(device.get("ID", "")) for device in devices if isinstance(device, Mapping)]
        if isinstance(devices, Sequence)
        else []
    )
    if not any(CDI in name for name in (specs, *listed)):
        return "the engine knows CDI, no specification names NVIDIA's GPUs", REGENERATE
    versions = set(re.findall(r"libcuda\.so\.(\d+\.[\d.]*\d)", specs))
    if versions and driver and driver not in versions:
        return f"the CDI specification is for driver {', '.join(sorted(versions))}, not {driver}", REGENERATE
    named = specs + "\n".join(listed)
    absent = [gpu.index for gpu in hardware.gpus if gpu.uuid not in named]
    if absent:
        gpus = ", ".join(map(str, absent))
        return f"the CDI specification has no UUID of GPU {gpus}", f"{REGENERATE} --device-name-strategy=uuid"
    return "", ""


def _specs(info: Mapping[str, object], root: Path) -> Iterator[str]:
    folders = info.get("CDISpecDirs")
    for folder in folders if isinstance(folders, Sequence) else ():
        place = root / str(folder).lstrip("/")
        for file in sorted((*place.glob("*.yaml"), *place.glob("*.json"))):
            yield text_of(file) or ""


def reload_loss(info: Mapping[str, object], *, root: Path) -> Finding:
    """Do running containers lose their GPUs when somebody types `systemctl daemon-reload`?

    They do where systemd keeps the containers' cgroups and the GPUs were added behind its back, by hook or runtime, and
    /dev/char has no links to them (NVIDIA/nvidia-docker issue 1730, with these three remedies).
    """
    driver = str(info.get("CgroupDriver", ""))
    safe = (
        "CDI tells systemd of the GPUs"
        if info.get("CDISpecDirs")
        else f"cgroup driver {driver or 'not known'}, not systemd"
        if driver != "systemd"
        else "/dev/char has links to the GPUs"
        if os.path.lexists(root / FIRST_NVIDIA_DEVICE)
        else ""
    )
    return finding(
        "GPUs after daemon-reload",
        good=bool(safe),
        state=safe or "systemd takes GPUs from running containers at systemctl daemon-reload",
        matters="package updates reload systemd, and the server dies with an unknown error in mid-trial",
        fix="sudo nvidia-ctk system create-dev-char-symlinks --create-all (again after each boot), or use CDI",
    )
