"""Which variants of an experiment fit where they sit: in go experiment, model, stack, machine and seats, out come the variants
that are left out and the arithmetic of all, or a `LabError` when none is left. Pure; `lab/fit.py` does the sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lab.dialect import get_dialect
from lab.errors import LabError
from lab.experiment import Experiment
from lab.fit import Fit, Memory, fit
from lab.hardware.model import Hardware
from lab.models import Model
from lab.seats import Seat, tensor_parallel
from lab.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """`left_out` are variants that do not fit, with the reasons; `reasons` is the arithmetic, a line for each kind of server."""

    left_out: dict[str, str]
    reasons: tuple[str, ...]


def fitting(
    experiment: Experiment, *, model: Model, stack: Stack, hardware: Hardware, seats: Mapping[str, Seat]
) -> Fitting:
    """How the variants of the experiment fit; `LabError` with the arithmetic when none does."""
    left_out: dict[str, str] = {}
    reasons: dict[str, None] = {}  # kept in order, each once
    for variant in experiment.variants:
        argv = (*stack.server_args, *experiment.server, *variant.args)
        memory = _memory(stack, hardware=hardware, seat=seats.get(variant.name, Seat()))
        longest = max((load.longest_tokens() for load in experiment.loads_of(variant.name)), default=0)
        found = fit(model, argv, memory=memory, dialect=get_dialect(stack.dialect), longest=longest)
        reasons[f"fit: {found.words}"] = None
        if found.refusal:
            left_out[variant.name] = _said(found)
    if len(left_out) == len(experiment.variants):
        raise LabError(
            f"{model.name} does not fit: {experiment.name!r} cannot be run with it here",
            why="; ".join(dict.fromkeys(left_out.values())),
            fix=_fix(experiment, model=model, stack=stack, hardware=hardware),
        )
    return Fitting(left_out=left_out, reasons=tuple(reasons))


def _said(found: Fit) -> str:
    return found.refusal if found.refusal == found.words else f"{found.refusal} ({found.words})"


def _fix(experiment: Experiment, *, model: Model, stack: Stack, hardware: Hardware) -> str:
    if model.source == "built":
        return "raise --max-total-tokens in the experiment's file, or shorten its loads"
    if stack.device != "cuda":
        return f"{model.name} needs a GPU, or a machine with more memory; --model nano is made for this one"
    common = (*stack.server_args, *experiment.server)
    ranks = {tensor_parallel((*common, *variant.args)) for variant in experiment.variants}
    now = ", ".join(f"TP={rank}" for rank in sorted(ranks))
    dialect, memory = get_dialect(stack.dialect), _memory(stack, hardware=hardware, seat=Seat())
    for tp in (2, 4, 8):
        argv = (*common, "--tp-size", str(tp))
        if (
            tp <= len(hardware.gpus)
            and not fit(model, argv, memory=memory, dialect=dialect, longest=0).refusal
        ):
            return (
                f"it would fit on {tp} GPUs (TP={tp}), and this experiment's servers have {now}: "
                "invoke exp.tp has more, or take a smaller --model"
            )
    return "take a smaller --model, or a machine with more or larger GPUs"


def _memory(stack: Stack, *, hardware: Hardware, seat: Seat) -> Memory:
    """The smallest GPU of the seat, or of the machine where the seat has none; without CUDA, the machine's memory."""
    if stack.device == "cuda":
        cards = [gpu for gpu in hardware.gpus if gpu.uuid in seat.gpus] or list(hardware.gpus)
        sizes = [(gpu.memory_mib, gpu.name) for gpu in cards if gpu.memory_mib is not None]
        mib, name = min(sizes, default=(None, "a GPU"))
        return Memory(mib=mib, gpu=name)
    # Nodes outside of what this process may use do not count.
    nodes = [
        n.memory_mib for n in hardware.nodes if n.number in hardware.mems_allowed or not hardware.mems_allowed
    ]
    known = [mib for mib in nodes if mib is not None]
    return Memory(
        mib=sum(known) if known and len(known) == len(nodes) else None,
        base_gib=stack.needs.memory_gb * 1e9 / 2**30,
    )
