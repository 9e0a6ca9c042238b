"""Which variants of an experiment can be served here, and where each sits: in go experiment, stack, site, machine and model, out
come seats, the variants that are left out with the reasons, and the arithmetic of how the model fits. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.dialect import get_dialect
from lab.experiment import Experiment
from lab.fitting import fitting
from lab.hardware.model import Hardware
from lab.models import Model
from lab.seats import Seat, seats, unseated
from lab.servable import left_out_of, without
from lab.site import Site
from lab.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Possible:
    """`seats` by variant; `left_out` with the reasons, whatever they are; `fits` is the arithmetic, in words."""

    seats: dict[str, Seat]
    left_out: dict[str, str]
    fits: tuple[str, ...]


def possible(
    experiment: Experiment,
    *,
    model: Model,
    stack: Stack,
    site: Site,
    hardware: Hardware,
    asked: Sequence[str],
    busy: Mapping[str, str],
) -> Possible:
    """What this SGLang, this machine and this model allow, in that order: a variant that an earlier one refuses is not asked
    of the later ones. `LabError` when nothing is left."""
    refused = left_out_of(
        experiment, stack=stack, dialect=get_dialect(stack.dialect), capabilities=site.capabilities
    )
    left = without(experiment, refused)
    unplaced = unseated(left, stack=stack, site=site, hardware=hardware, asked=asked, busy=busy)
    left = without(left, unplaced)
    found = seats(left, stack=stack, site=site, hardware=hardware, asked=asked, busy=busy)
    fits = fitting(left, model=model, stack=stack, hardware=hardware, seats=found)
    return Possible(seats=found, left_out={**refused, **unplaced, **fits.left_out}, fits=fits.reasons)
