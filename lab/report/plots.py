"""Pictures of what clients saw and of the cache, from the table of requests; in go rows of usable trials, out come
figures, None where there is nothing to show.

Every point is something that was measured: small points are requests, large ones a trial's median."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.loads import lost
from lab.report.style import COLOURS, INK, LOST


def ttft(requests: pd.DataFrame) -> Figure | None:
    """Time to first token per variant, first and later requests of a prefix apart, one panel a load."""
    loads = [
        n
        for n in dict.fromkeys(requests["load"])
        if requests.loc[requests["load"] == n, "ttft_ms"].notna().any()
    ]
    if not loads:
        return None
    variants = list(dict.fromkeys(sorted(requests["variant"])))
    figure, axes = plt.subplots(
        1, len(loads), figsize=(1.2 + 2.7 * len(loads), 3.2), squeeze=False, sharey=True
    )
    for axis, load in zip(axes[0], loads, strict=True):
        _ttft_panel(axis, requests[requests["load"] == load], variants)
        axis.set_title(load)
    axes[0][0].set_ylabel("time to first token (ms)")
    axes[0][0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.05, 0.02), ncols=3)
    return figure


def _ttft_panel(axis: Axes, rows: pd.DataFrame, variants: list[str]) -> None:
    for i, which in enumerate(("first", "later")):
        part = rows[(rows["group_order"] == 0) == (which == "first")]
        for j, variant in enumerate(variants):
            own = part[part["variant"] == variant]
            if own.empty:
                continue
            x = i + (j - (len(variants) - 1) / 2) * 0.3
            spread = np.linspace(-0.07, 0.07, len(own)) if len(own) > 1 else np.zeros(1)
            colour = COLOURS[j % len(COLOURS)]
            axis.scatter(x + spread, own["ttft_ms"], s=9, color=colour, alpha=0.35, linewidths=0)
            medians = own.groupby("repeat")["ttft_ms"].median()
            label = f"{variant}, median of each trial" if i == 1 else None
            axis.scatter(
                [x] * len(medians), medians, s=46, color=colour, edgecolor="white", zorder=3, label=label
            )
    axis.set_xticks([0, 1], ["first of a prefix", "later"])
    axis.set_xlim(-0.5, 1.5)


def cached_share(requests: pd.DataFrame) -> Figure | None:
    """Cached share of each request in the order sent, first repeat, one panel a load with a cache."""
    part = requests[requests["repeat"] == requests["repeat"].min()]
    part = part[part.groupby(["load", "variant"])["predicted_share"].transform("max") > 0]
    panels = [(str(k[0]), str(k[1]), rows) for k, rows in part.groupby(["load", "variant"], sort=False)]
    panels = sorted(panels, key=lambda p: (list(dict.fromkeys(part["load"])).index(p[0]), p[1]))
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.2, 1.45 * len(panels) + 0.5), squeeze=False)
    for axis, (load, variant, rows) in zip(axes[:, 0], panels, strict=True):
        colours = [COLOURS[int(g) % len(COLOURS)] for g in rows["group"]]
        axis.bar(rows["order"], rows["cached_share"], color=colours, width=0.8)
        axis.scatter(
            rows["order"],
            rows["predicted_share"],
            marker="_",
            s=120,
            color=INK,
            linewidths=1.2,
            label="predicted for a cache that never forgets",
        )
        axis.legend(loc="upper left", bbox_to_anchor=(0.45, 1.32), fontsize=8)
        axis.set_ylim(0, 1.05)
        axis.set_xlim(-0.8, rows["order"].max() + 0.8)
        axis.set_title(f"{load}, {variant}")
        axis.set_ylabel("cached share")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1][0].set_xlabel("request, in the order sent; colour = prefix group")
    figure.tight_layout(h_pad=0.9)
    return figure


def eviction(requests: pd.DataFrame) -> Figure | None:
    """For the load and trial with most evictions: each access to a prefix, found or lost."""
    evicted = requests[lost(requests)]
    if evicted.empty:
        return None
    counts = evicted.groupby(["trial", "load"]).size().reset_index(name="lost").sort_values("lost")
    trial, load = counts["trial"].iloc[-1], counts["load"].iloc[-1]
    rows = requests[(requests["trial"] == trial) & (requests["load"] == load)]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.2, 4.4), sharex=True, gridspec_kw={"height_ratios": [2, 1.2]}
    )
    again = rows["group_order"] > 0
    gone = lost(rows)
    for mask, marker, colour, face, label in (
        (~again, "o", INK, "white", "first request: computed"),
        (again & ~gone, "o", COLOURS[0], COLOURS[0], "found in the cache"),
        (gone, "X", LOST, LOST, "evicted meanwhile: computed again"),
    ):
        top.scatter(
            rows.loc[mask, "received_s"],
            rows.loc[mask, "group"],
            marker=marker,
            s=55,
            edgecolors=colour,
            facecolors=face,
            label=label,
        )
    top.set_yticks(sorted(rows["group"].unique()))
    top.set_ylabel("prefix group")
    top.set_title(f"{load} ({trial}): each request by its prefix group")
    top.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3, fontsize=8)
    found = rows["cached_tokens"].cumsum()
    missing = (rows["predicted_share"] - rows["cached_share"]) * rows["prompt_tokens"]
    bottom.step(rows["received_s"], found, where="post", color=COLOURS[0], label="from the cache")
    bottom.step(
        rows["received_s"], missing.where(gone, 0).cumsum(), where="post", color=LOST, label="computed again"
    )
    bottom.legend(loc="upper left", fontsize=8)
    bottom.set_ylabel("prompt tokens")
    bottom.set_xlabel("seconds since the load's first request")
    figure.subplots_adjust(hspace=0.32)
    return figure
