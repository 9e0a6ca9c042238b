"""The text of `invoke models`: every model of the catalogue with its size, its licence, who may fetch it, and where its weights
are on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from lab import places
from lab.errors import LabError
from lab.models import CATALOGUE, Model, kv_bytes_per_token, parameters, weight_bytes
from lab.weights import hub_cache, locate, require


def show() -> int:
    """Print the catalogue; always 0."""
    print(text(cache=places.cache(), hub=hub_cache(os.environ)))
    return 0


def text(*, cache: Path, hub: Path) -> str:
    """The catalogue as lines, a paragraph a model."""
    found = {name: _found(model, cache=cache, hub=hub) for name, model in CATALOGUE.items()}
    return "\n\n".join(_paragraph(model, found=found[name]) for name, model in CATALOGUE.items())


def _paragraph(model: Model, *, found: str) -> str:
    origin = f"{model.repository}, revision {model.pinned}" if model.repository else "lab/nano.py"
    lines = (
        f"{model.name}: {model.description}",
        f"  size     {size(model)}, {kv_bytes_per_token(model) / 1024:g} KiB of KV cache a token, "
        f"context {model.context:,} tokens",
        f"  from     {origin}",
        f"  licence  {model.licence}; {model.access}",
        f"  weights  {found}",
    )
    return "\n".join(lines)


def size(model: Model) -> str:
    """Parameters, and what the weights take, in decimal GB as they are published."""
    count = parameters(model)
    if count < 1e9:
        return f"{count / 1e6:.1f} million parameters, {weight_bytes(model) / 1e6:.0f} MB ({model.dtype})"
    return f"{count / 1e9:.2f} billion parameters, {weight_bytes(model) / 1e9:.0f} GB ({model.dtype})"


def _found(model: Model, *, cache: Path, hub: Path) -> str:
    weights = locate(model, asked="", cache=cache, hub=hub)
    if model.source == "built":
        return f"in {weights.folder}" if weights.folder.is_dir() else "not made yet; the first run makes it"
    try:
        require(model, weights)
    except LabError as error:
        return f"{error.problem}; {error.why}\n  to get   {error.fix}"
    return f"in {weights.folder}"
