"""The report's pictures: which there are, their captions, and drawing them. In go tables, out come PNG files; a picture
whose data are missing is not made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lab.experiment import Picture
from lab.report import passplots, plots
from lab.report.style import STYLE

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One kind of picture: how it is drawn from the tables of usable, measured rows, and what is to be seen."""

    draw: Callable[[Tables], Figure | None]
    caption: str


DRAWINGS: Mapping[Picture, Drawing] = {
    "ttft": Drawing(
        draw=lambda tables: plots.ttft(tables["requests"]),
        caption="Time to first token, for the first request of each prefix and for later ones. "
        "Small points are requests, large points the median of each trial.",
    ),
    "measures": Drawing(
        draw=lambda tables: passplots.measures(tables["requests"], tables["loads"]),
        caption="Throughput and latencies by variant; each point is a trial.",
    ),
    "cached-share": Drawing(
        draw=lambda tables: plots.cached_share(tables["requests"]),
        caption="How much of each prompt came from the cache, request by request in the order sent "
        "(first repeat). The dash is what a cache that never forgets would have served.",
    ),
    "eviction": Drawing(
        draw=lambda tables: plots.eviction(tables["requests"]),
        caption="What the small pool forgot: each point is a request for a prefix. Below, prompt tokens served from "
        "the cache and prefix tokens that had to be computed again, added up over the load.",
    ),
    "tree": Drawing(
        draw=lambda tables: passplots.tree(tables["forwards"]),
        caption="Hit by hit: what each prefill pass found in the radix tree and what it computed, and the size of the tree "
        "at that moment (first repeat).",
    ),
    "service": Drawing(
        draw=lambda tables: passplots.service(tables["requests"]),
        caption="The order of service: each point is a request, by its prefix group (first repeat). Filled: its prefix came "
        "from the cache.",
    ),
    "batches": Drawing(
        draw=lambda tables: passplots.batches(tables["forwards"]),
        caption="Batches as they were formed: requests in the decode batch and in the queue; each tick is a prefill pass "
        "(first repeat; the loads and variants with the largest batches).",
    ),
    "pools": Drawing(
        draw=lambda tables: passplots.pools(tables["forwards"]),
        caption="Both levels of the memory pool: KV slots, and rows of the request table on the right (first repeat).",
    ),
    "steps": Drawing(
        draw=lambda tables: passplots.steps(tables["forwards"]),
        caption="How long a decode step took, from the launch of a pass to the next launch, by the size of its batch. "
        "Small points are passes, large ones the medians of each size.",
    ),
}


def draw_all(tables: Tables, folder: Path, *, names: tuple[Picture, ...]) -> tuple[Picture, ...]:
    """Draw those of `names` that the valid trials allow; returns the names of those made, in that order."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    usable = tables["trials"].loc[tables["trials"]["validity"] == "valid", "trial"]
    measured = {
        name: tables[name][tables[name]["trial"].isin(usable) & (tables[name]["role"] == "measure")]
        for name in ("requests", "loads", "forwards")
    }
    made: list[Picture] = []
    if measured["requests"].empty:
        return ()
    with mpl.rc_context(STYLE):
        for name in names:
            figure = DRAWINGS[name].draw(measured)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
                made.append(name)
    return tuple(made)
