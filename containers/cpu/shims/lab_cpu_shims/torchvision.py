"""Lets the Python part of the published torchvision wheel be imported beside a torch without CUDA.

The wheel's compiled operators are linked against CUDA and do not load; torchvision takes that quietly, except
that `torchvision/_meta_registrations.py` describes the shapes of two operators without asking whether they
exist. Their signatures are declared here, without any implementation, so a call still raises
NotImplementedError.
"""

from __future__ import annotations

import torch

OPERATORS = (
    "nms",
    "qnms",
)  # those that torchvision registers without asking whether its extension was loaded
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_library: torch.library.Library | None = None  # the declarations last as long as this object


def declare_operators() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms`, once."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        _library.define(name + SIGNATURE)
