"""Pictures of what the GPUs did: power, SM clock and memory over the time of a trial, its loads shaded. In go a run's gpu.csv
and tables, out come PNG files. Long trials are drawn by their mean and range in short stretches, so an hour is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lab.plan import Plan, Trial
from lab.report.style import COLOURS, INK, STYLE
from lab.rundir import Run, TrialFiles, read_json

POINTS = 900  # of a line; a picture is not wider in pixels
SPOILT_SHOWN = 4
BESIDE = 0.1  # of the time of all loads, shown before and after them
PANELS = (
    ("power_w", "power (W)"),
    ("sm_clock_mhz", "SM clock (MHz)"),
    ("memory_used_mib", "memory used (GiB)"),
)
READ = ("time_s", "gpu", *(column for column, _ in PANELS))
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A number over time, thinned: the mean of each stretch, its lowest and its highest value."""

    time_s: Floats
    mean: Floats
    low: Floats
    high: Floats


def draw_gpus(
    run: Run, plan: Plan, tables: Mapping[str, pd.DataFrame], *, names: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """A picture for each trial of `shown`; returns file names with captions. `names` are the GPUs' by UUID."""
    trials = {trial.name: trial for trial in plan.trials}
    made = []
    with mpl.rc_context(STYLE):
        for name, why in shown(tables):
            figure = over_time(trials[name], run.trial(name), names=names)
            if figure is None:
                continue
            file = f"gpus-{name}.png"
            figure.savefig(run.plots / file, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            caption = (
                f"GPUs of trial {name}, {why}: power, clock and memory while its loads ran (shaded). "
                "Where a line is thinned, the pale band spans what was seen."
            )
            made.append((file, caption))
    return tuple(made)


def shown(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, str]]:
    """Trials worth a picture, with the reason: the first usable one of each variant, and some whose GPUs failed a check."""
    trials, checks = tables["trials"], tables["checks"]
    usable = trials[trials["validity"] == "valid"].drop_duplicates("variant")
    found = [(str(name), "the first usable one of its variant") for name in usable["trial"]]
    of_gpus = checks[~checks["ok"].astype(bool) & checks["name"].str.contains("GPU", regex=False)]
    spoilt = of_gpus.drop_duplicates("trial").head(SPOILT_SHOWN)
    words = (f'which failed the check "{name}"' for name in spoilt["name"])
    found += zip(map(str, spoilt["trial"]), words, strict=True)
    return sorted(found)


def over_time(trial: Trial, files: TrialFiles, *, names: Mapping[str, str]) -> Figure | None:
    """The picture of one trial: a panel a number, a line a GPU; None without samples."""
    if not files.gpus.is_file():
        return None
    frame = pd.read_csv(files.gpus, usecols=list(READ), on_bad_lines="skip", low_memory=False)
    windows = [(step.name, *_window(files, step.name)) for step in trial.loads]
    start, end = min(w[1] for w in windows), max(w[2] for w in windows)
    beside = BESIDE * (
        end - start
    )  # starting the server may take longer than the loads, and is not asked about
    frame = frame[frame["gpu"].isin(trial.server.gpus)].apply(_numbers)
    frame = frame[frame["time_s"].between(start - beside, end + beside)]
    if frame.empty:
        return None
    frame = frame.assign(memory_used_mib=frame["memory_used_mib"] / 1024)  # GiB from here on
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(8.2, 5.4), sharex=True)
    for axis, (column, label) in zip(axes, PANELS, strict=True):
        for i, gpu in enumerate(trial.server.gpus):
            own = frame[frame["gpu"] == gpu]
            # Later lines are thinner, so that two of the same height are both seen.
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": max(1.0, 2.4 - 0.7 * i)}
            _draw(axis, own, column, start=start, label=names.get(gpu, gpu), style=style)
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        for j, (_, a, b) in enumerate(windows):
            axis.axvspan(a - start, b - start, color=INK, alpha=0.05 + 0.05 * (j % 2), linewidth=0)
    _name_loads(axes[0], windows, start=start)
    figure.suptitle(f"trial {trial.name}", x=0.125, y=0.985, ha="left", fontsize=10.5)
    axes[-1].set_xlabel("seconds since the first load began")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.08, 0.02), ncols=4)
    return figure


def thin(time_s: Sequence[float] | Floats, values: Sequence[float] | Floats, *, points: int = POINTS) -> Line:
    """At most `points` stretches of equal length in time; one that has no value is left out, so a gap stays a gap
    only where it is longer than a stretch. Fewer values than `points` stay as they are."""
    times, numbers = np.asarray(time_s, dtype=float), np.asarray(values, dtype=float)
    if len(times) <= points:
        return Line(time_s=times, mean=numbers, low=numbers, high=numbers)
    order = np.argsort(times, kind="stable")
    times, numbers = times[order], numbers[order]
    width = (times[-1] - times[0]) / points or 1.0
    stretch = np.minimum((times - times[0]) // width, points - 1)
    begins = np.flatnonzero(np.diff(stretch, prepend=-1.0))
    counts = np.diff(begins, append=len(times))
    return Line(
        time_s=np.add.reduceat(times, begins) / counts,
        mean=np.add.reduceat(numbers, begins) / counts,
        low=np.minimum.reduceat(numbers, begins),
        high=np.maximum.reduceat(numbers, begins),
    )


def _draw(
    axis: Axes, own: pd.DataFrame, column: str, *, start: float, label: str, style: dict[str, object]
) -> None:
    known = own[own[column].notna()]
    if known.empty:
        return
    line = thin(known["time_s"].to_numpy(dtype=float) - start, known[column].to_numpy(dtype=float))
    axis.plot(line.time_s, line.mean, label=label, **style)  # type: ignore[arg-type]  # a colour and a width
    if (line.low != line.high).any():
        axis.fill_between(line.time_s, line.low, line.high, color=str(style["color"]), alpha=0.2, linewidth=0)


def _name_loads(axis: Axes, windows: Sequence[tuple[str, float, float]], *, start: float) -> None:
    """Names above the shades, on two levels where there are so many that neighbours might overlap."""
    for j, (name, a, b) in enumerate(windows):
        axis.text(
            (a + b) / 2 - start,
            1.03 + 0.11 * (j % 2 if len(windows) > 4 else 0),
            name,
            transform=axis.get_xaxis_transform(),
            ha="center",
            fontsize=8,
            color=INK,
        )


def _window(files: TrialFiles, load: str) -> tuple[float, float]:
    status = read_json(files.load(load).status)
    return float(str(status["started"])), float(str(status["ended"]))


def _numbers(column: pd.Series[str]) -> pd.Series[float] | pd.Series[str]:
    """Numbers of a column of which a cut line may have left text; such a cell is missing."""
    return column if column.name == "gpu" else pd.to_numeric(column, errors="coerce")
