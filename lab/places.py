"""Where the lab keeps things: the one module that knows folders outside a run."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path, user_state_path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lab"
EXPERIMENTS = PACKAGE / "experiments"
SITES = PACKAGE / "sites"
RUNS = ROOT / "runs"


def cache() -> Path:
    """Built stacks and models; XDG_CACHE_HOME moves it."""
    return user_cache_path("sglang-lab", appauthor=False)


def state() -> Path:
    """The ledger of started processes; XDG_STATE_HOME moves it."""
    return user_state_path("sglang-lab", appauthor=False)
