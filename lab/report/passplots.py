"""Pictures of what went on inside the server, from the table of forward passes; in go tables of usable trials, out come
figures, None where there is nothing to show. Each shows the first repeat, as it was measured."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.report.style import COLOURS, INK, LOST

MOST_PANELS = 4
MOST_POINTS = 4000
Panel = tuple[str, str, pd.DataFrame]


def batches(forwards: pd.DataFrame) -> Figure | None:
    """Decode batch and queue over time, with a tick for each prefill pass."""
    return _over_time(_panels(forwards, by="running"), _batch_panel, ylabel="requests")


def pools(forwards: pd.DataFrame) -> Figure | None:
    """Both levels of the memory pool over time: KV slots used, evictable and free, and rows of the request table."""
    known = forwards[forwards["kv_used"].notna()]
    return _over_time(_panels(known, by="kv_used"), _pool_panel, ylabel="KV slots")


def tree(forwards: pd.DataFrame) -> Figure | None:
    """Hit by hit: what each prefill pass took from the tree and what it computed, and how large the tree was then."""
    prefill = forwards[(forwards["mode"] == "prefill") & forwards["kv_evictable"].notna()]
    panels = _panels(prefill[prefill["cached_tokens"] >= 0], by="cached_tokens")
    panels = [panel for panel in panels if panel[2]["cached_tokens"].sum() > 0]
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.2, 1.9 * len(panels) + 0.7), squeeze=False)
    for axis, (load, variant, rows) in zip(axes[:, 0], panels, strict=True):
        x = np.arange(len(rows))
        axis.bar(x, rows["cached_tokens"], color=COLOURS[0], width=0.85, label="found in the tree")
        axis.bar(
            x,
            rows["new_tokens"],
            bottom=rows["cached_tokens"],
            color=COLOURS[1],
            width=0.85,
            label="computed",
        )
        size = rows["kv_evictable"] + rows["kv_protected"]
        axis.step(x, size, where="mid", color=INK, linewidth=1.2, label="tree when the pass was formed")
        axis.set_title(f"{load}, {variant}")
        axis.set_ylabel("tokens")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1][0].set_xlabel("prefill pass")
    _legend(figure, axes[0][0])
    figure.tight_layout(h_pad=0.9)
    return figure


def service(requests: pd.DataFrame) -> Figure | None:
    """In which order the scheduler served the prefix groups, one panel a variant."""
    known = requests[requests["service_order"].notna()]
    shared = known.groupby(["load", "variant"])["group_order"].transform("max") > 0
    panels = _panels(known[shared], by="group", at_most=6)
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.2, 1.5 * len(panels) + 0.6), squeeze=False)
    for axis, (load, variant, rows) in zip(axes[:, 0], panels, strict=True):
        hit = rows["cached_share"] > 0.5 * rows["predicted_share"].where(rows["predicted_share"] > 0, 1)
        for mask, face, label in (
            (hit, True, "prefix found in the cache"),
            (~hit, False, "prefix computed"),
        ):
            part = rows[mask]
            colours = [COLOURS[int(g) % len(COLOURS)] for g in part["group"]]
            axis.scatter(
                part["service_order"],
                part["group"],
                s=26,
                edgecolors=colours,
                facecolors=colours if face else "white",
                label=label,
            )
        axis.set_title(f"{load}, {variant}: {rows['cached_tokens'].sum():,.0f} tokens from the cache")
        axis.set_ylabel("prefix group")
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[-1][0].set_xlabel("request, in the order of service")
    _legend(figure, axes[0][0])
    figure.tight_layout(h_pad=0.9)
    return figure


def steps(forwards: pd.DataFrame) -> Figure | None:
    """Time from a decode pass's launch to the next launch, against its batch; one colour a variant, one panel a load."""
    decode = forwards[(forwards["mode"] == "decode") & forwards["step_ms"].notna()]
    loads = list(dict.fromkeys(decode["load"]))[:MOST_PANELS]
    if not loads:
        return None
    figure, axes = plt.subplots(1, len(loads), figsize=(1.2 + 2.9 * len(loads), 3.2), squeeze=False)
    variants = list(dict.fromkeys(forwards["variant"]))
    for axis, load in zip(axes[0], loads, strict=True):
        part = decode[decode["load"] == load]
        most = max(4.0, float(part["requests"].max()))
        for i, variant in enumerate(variants):
            own = part[part["variant"] == variant]
            if own.empty:
                continue
            shown = own.iloc[:: max(1, len(own) // MOST_POINTS)]
            aside = (i - (len(variants) - 1) / 2) * 0.012 * most
            x = shown["requests"] + aside
            colour = COLOURS[i % len(COLOURS)]
            axis.scatter(x, shown["step_ms"], s=6, color=colour, alpha=0.25, linewidths=0)
            medians = own.groupby("requests")["step_ms"].median()
            axis.plot(
                medians.index + aside, medians, "o-", color=colour, markersize=3.5, linewidth=1, label=variant
            )
        axis.set_xlim(0, most * 1.08)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(0, float(part["step_ms"].quantile(0.99)) * 1.2)
        axis.set_title(load)
        axis.set_xlabel("requests in the batch")
    axes[0][0].set_ylabel("decode pass (ms)")
    _legend(figure, axes[0][0])
    figure.tight_layout()
    return figure


def measures(requests: pd.DataFrame, loads: pd.DataFrame) -> Figure | None:
    """Throughput, time to first token and time per output token by variant: a point a trial, one row a load."""
    usable = loads[(loads["role"] == "measure") & loads["output_tokens_per_s"].notna()]
    names = list(dict.fromkeys(usable["load"]))
    if not names:
        return None
    medians = requests.groupby(["trial", "load"])[["ttft_ms", "tpot_ms"]].median().reset_index()
    rows = usable.merge(medians, on=["trial", "load"], how="left")
    columns = (
        ("output_tokens_per_s", "output tokens/s"),
        ("ttft_ms", "median TTFT (ms)"),
        ("tpot_ms", "median TPOT (ms)"),
    )
    variants = list(dict.fromkeys(rows["variant"]))
    figure, axes = plt.subplots(
        len(names), 3, figsize=(8.6, (0.5 + 0.28 * len(variants)) * len(names) + 0.6), squeeze=False
    )
    for row, load in zip(axes, names, strict=True):
        for axis, (column, title) in zip(row, columns, strict=True):
            for i, variant in enumerate(variants):
                own = rows[(rows["load"] == load) & (rows["variant"] == variant)][column]
                axis.scatter(own, [i] * len(own), s=24, color=COLOURS[i % len(COLOURS)], alpha=0.8)
            axis.set_yticks(
                range(len(variants)), variants if column == columns[0][0] else [""] * len(variants)
            )
            axis.set_ylim(len(variants) - 0.5, -0.5)
            axis.set_xlim(left=0)
            axis.grid(axis="x")
            axis.set_title(f"{load}: {title}" if column == columns[0][0] else title, fontsize=9)
    figure.tight_layout()
    return figure


def _panels(rows: pd.DataFrame, *, by: str, at_most: int = MOST_PANELS) -> list[Panel]:
    """The loads and variants with the largest `by`, in the order of the loads, of the first repeat."""
    if rows.empty:
        return []
    rows = rows[rows["repeat"] == rows["repeat"].min()]
    found = [(str(k[0]), str(k[1]), part) for k, part in rows.groupby(["load", "variant"], sort=False)]
    largest = sorted(found, key=lambda panel: -float(panel[2][by].max()))[:at_most]
    chosen = {panel[:2] for panel in largest}
    loads = list(dict.fromkeys(rows["load"]))
    return sorted((p for p in found if p[:2] in chosen), key=lambda p: (loads.index(p[0]), p[1]))


def _over_time(
    panels: list[Panel], draw: Callable[[Axes, pd.DataFrame], None], *, ylabel: str
) -> Figure | None:
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.2, 1.7 * len(panels) + 0.7), squeeze=False)
    for axis, (load, variant, rows) in zip(axes[:, 0], panels, strict=True):
        draw(axis, rows.assign(at=rows["t_s"] - rows["t_s"].min()))
        axis.set_title(f"{load}, {variant}")
        axis.set_ylabel(ylabel)
        axis.set_ylim(bottom=0)
    axes[-1][0].set_xlabel("seconds since the load's first forward pass")
    _legend(figure, axes[0][0])
    figure.tight_layout(h_pad=0.9)
    return figure


def _batch_panel(axis: Axes, rows: pd.DataFrame) -> None:
    decode = rows[rows["mode"] == "decode"]
    axis.step(decode["at"], decode["requests"], where="post", color=COLOURS[0], label="in the decode batch")
    axis.step(rows["at"], rows["waiting"], where="post", color=COLOURS[1], linewidth=1, label="waiting")
    prefill = rows[rows["mode"] != "decode"]
    axis.scatter(
        prefill["at"],
        np.zeros(len(prefill)),
        marker="|",
        s=60,
        color=LOST,
        linewidths=0.8,
        label="a prefill pass",
        clip_on=False,
    )


def _pool_panel(axis: Axes, rows: pd.DataFrame) -> None:
    used, evictable = rows["kv_used"], rows["kv_evictable"]
    axis.fill_between(rows["at"], 0, used, step="post", color=COLOURS[0], alpha=0.8, label="used by requests")
    axis.fill_between(
        rows["at"],
        used,
        used + evictable,
        step="post",
        color=COLOURS[2],
        alpha=0.5,
        label="evictable: kept by the tree",
    )
    total = float((used + evictable + rows["kv_free"]).max())
    axis.axhline(total, color=INK, linewidth=0.8, linestyle=":", label="the pool")
    slots = axis.twinx()
    slots.step(rows["at"], rows["slots_used"], where="post", color=COLOURS[1], linewidth=1)
    slots.set_ylabel("rows of the\nrequest table", color=COLOURS[1])
    slots.set_ylim(bottom=0)
    slots.grid(visible=False)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.05, -0.06), ncols=4, fontsize=8)
