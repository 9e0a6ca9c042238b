"""Read SGLang's `/metrics` page: Prometheus text goes in, a `Snapshot` of counters, gauges and histograms
comes out; two snapshots of one server make counter differences. A page that is cut or garbled is a `LabError`
with its line; NaN and infinity are kept and listed; a counter that fell is marked, not subtracted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from lab.errors import LabError, unknown_name

Labels: TypeAlias = tuple[tuple[str, str], ...]
Series: TypeAlias = tuple[str, Labels]


class Histogram(NamedTuple):
    """One histogram series. Its unit is the one in its name."""

    sum: float
    observations: float
    """The `_count`."""
    buckets: tuple[tuple[float, float], ...]
    """(upper edge, observations at or below it), edges ascending, the last edge infinite."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All metrics at one moment. Labels are sorted (name, value) pairs; names are as printed, and a counter's
    always ends in `_total`."""

    source: str
    counters: Mapping[Series, float]
    gauges: Mapping[Series, float]
    histograms: Mapping[Series, Histogram]
    not_finite: tuple[Series, ...]
    """Series whose value (for a histogram: sum or any count) is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class CounterDelta:
    """What one counter did between two snapshots.

    `delta` is None unless `state` is "ok". "reset": it is lower than before, or gone, because the server was
    restarted. "not_finite": NaN or infinite on one side.
    """

    name: str
    labels: Labels
    before: float
    after: float | None
    delta: float | None
    state: str


def read(path: Path) -> Snapshot:
    """The snapshot in the file. LabError when it cannot be opened, is not text, or `parse` refuses it."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise LabError(f"cannot read {path}", why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise LabError(
            f"{path} is not UTF-8 text", why=f"byte {error.start + 1} cannot be decoded"
        ) from error
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "the metrics page") -> Snapshot:
    """The snapshot in a page of Prometheus text format 0.0.4, which SGLang serves at `/metrics`.

    `source` is named in errors. LabError when the page is empty, ends inside a line, holds a line that is not
    the format, or a histogram that lacks a part.
    """
    if not text.strip():
        raise LabError(f"{source} is empty", why="a server with --enable-metrics always reports something")
    if not text.endswith("\n"):
        last = text.count("\n") + 1
        raise LabError(
            f"{source}, line {last}: the page ends inside this line", why=repr(text.splitlines()[-1][:200])
        )
    counters: dict[Series, float] = {}
    gauges: dict[Series, float] = {}
    histograms: dict[Series, Histogram] = {}
    for family in _families(text, source):
        if family.type == "counter":
            _add(counters, family.samples, source)
        elif family.type == "gauge":
            _add(gauges, family.samples, source)
        elif family.type == "histogram":
            histograms.update(_histograms(family, source))
        else:
            lines = text.split("\n")
            at = next((n for n, line in enumerate(lines, start=1) if line.startswith(family.name)), 0)
            raise LabError(
                f"{source}, line {at}: {family.name} is of type {family.type!r}",
                why="SGLang writes counters, gauges and histograms, each after its '# TYPE' line",
            )
    plain = [
        series for table in (counters, gauges) for series, value in table.items() if not math.isfinite(value)
    ]
    odd = [series for series, value in histograms.items() if not _is_finite(value)]
    return Snapshot(
        source=source,
        counters=counters,
        gauges=gauges,
        histograms=histograms,
        not_finite=(*plain, *odd),
    )


def difference(before: Snapshot, after: Snapshot, *, by_name: bool = False) -> tuple[CounterDelta, ...]:
    """How far every counter moved, sorted by name and labels.

    A series that is absent before counts from 0: SGLang creates a counter on first use. With `by_name`, all
    label sets of a name are summed into one delta with empty labels; one that was reset makes the sum reset.
    """
    series = sorted(before.counters.keys() | after.counters.keys())
    deltas = [_delta(one, before.counters.get(one, 0.0), after.counters.get(one)) for one in series]
    if not by_name:
        return tuple(deltas)
    groups: dict[str, list[CounterDelta]] = {}
    for delta in deltas:
        groups.setdefault(delta.name, []).append(delta)
    return tuple(_summed(name, group) for name, group in groups.items())


def total(
    deltas: Iterable[CounterDelta],
    name: str,
    *,
    where: Mapping[str, str] | None = None,
    default: float | None = None,
) -> float:
    """The sum of all deltas of `name`, of those whose labels contain `where` when it is given.

    A counter that neither snapshot has gives `default`; without a default that is a LabError, and so are a
    reset counter and one that is not finite.
    """
    everything = tuple(deltas)
    chosen = [delta for delta in everything if delta.name == name and _has(delta.labels, where)]
    if not chosen:
        return _absent("counter", name, {delta.name for delta in everything}, default)
    result = 0.0
    for delta in chosen:
        if delta.delta is None:
            raise LabError(
                f"the counter {name} cannot be subtracted: {delta.before} before, {delta.after} after",
                why="it is not finite"
                if delta.state == "not_finite"
                else "it went backwards: the server was restarted between both readings",
                fix="repeat the trial",
            )
        result += delta.delta
    return result


def value(
    snapshot: Snapshot,
    name: str,
    *,
    where: Mapping[str, str] | None = None,
    default: float | None = None,
) -> float:
    """The sum of a counter or gauge over its label sets at one moment; absent as in `total`. May be NaN."""
    tables = (snapshot.counters, snapshot.gauges)
    chosen = [
        number
        for table in tables
        for (n, labels), number in table.items()
        if n == name and _has(labels, where)
    ]
    if not chosen:
        return _absent("metric", name, {n for table in tables for n, _ in table}, default)
    return math.fsum(chosen)


def _absent(kind: str, name: str, known: set[str], default: float | None) -> float:
    if default is None:
        raise unknown_name(kind, name, known)
    return default


def _has(labels: Labels, where: Mapping[str, str] | None) -> bool:
    return not where or where.items() <= dict(labels).items()


def _delta(series: Series, before: float, after: float | None) -> CounterDelta:
    name, labels = series
    delta: float | None = None
    if not math.isfinite(before) or (after is not None and not math.isfinite(after)):
        state = "not_finite"
    elif after is None or after < before:
        state = "reset"
    else:
        state, delta = "ok", after - before
    return CounterDelta(name=name, labels=labels, before=before, after=after, delta=delta, state=state)


def _summed(name: str, group: list[CounterDelta]) -> CounterDelta:
    bad = next((delta.state for delta in group if delta.state != "ok"), None)
    afters = [delta.after for delta in group if delta.after is not None]
    return CounterDelta(
        name=name,
        labels=(),
        before=sum(delta.before for delta in group),
        after=sum(afters) if afters else None,
        delta=None if bad else sum(delta.delta for delta in group if delta.delta is not None),
        state=bad or "ok",
    )


def _families(text: str, source: str) -> list[Metric]:
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        raise _bad_line(text, source) from error
    # The library takes words after the value for a timestamp. SGLang writes none, so two lines run together.
    if any(sample.timestamp is not None for family in families for sample in family.samples):
        raise _bad_line(text, source)
    return families


def _bad_line(text: str, source: str) -> LabError:
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            samples = [sample for family in text_string_to_metric_families(line) for sample in family.samples]
        except ValueError:
            samples = []
        else:
            if all(sample.timestamp is None for sample in samples):
                continue
        return LabError(f"{source}, line {number}: not a line of Prometheus text", why=repr(line[:200]))
    return LabError(f"{source} is not Prometheus text", why="no single line is at fault")


def _labels(sample: Sample, *, without: str = "") -> Labels:
    return tuple(sorted((name, value) for name, value in sample.labels.items() if name != without))


def _add(table: dict[Series, float], samples: Iterable[Sample], source: str) -> None:
    for sample in samples:
        series = (sample.name, _labels(sample))
        if series in table:
            raise LabError(
                f"{source}: {sample.name} stands twice with the same labels", why=str(dict(series[1]))
            )
        table[series] = float(sample.value)


def _histograms(family: Metric, source: str) -> dict[Series, Histogram]:
    parts: dict[Labels, dict[str, float]] = {}
    buckets: dict[Labels, list[tuple[float, float]]] = {}
    for sample in family.samples:
        labels = _labels(sample, without="le")
        part = sample.name.removeprefix(family.name)
        known = parts.setdefault(labels, {})
        if part != "_bucket":
            known[part] = float(sample.value)
            continue
        try:
            edge = float(sample.labels["le"])
        except (KeyError, ValueError) as error:
            raise LabError(f"{source}: {family.name} has a bucket without a number in its 'le'") from error
        buckets.setdefault(labels, []).append((edge, float(sample.value)))
    result: dict[Series, Histogram] = {}
    for labels, known in parts.items():
        edges = tuple(sorted(buckets.get(labels, [])))
        if known.keys() != {"_sum", "_count"} or not edges or edges[-1][0] != math.inf:
            raise LabError(
                f"{source}: the histogram {family.name} is not complete",
                why=f"it needs _sum, _count and buckets up to +Inf for {dict(labels)}; the page may be cut",
            )
        result[family.name, labels] = Histogram(known["_sum"], known["_count"], edges)
    return result


def _is_finite(histogram: Histogram) -> bool:
    numbers = (histogram.sum, histogram.observations, *(count for _, count in histogram.buckets))
    return all(math.isfinite(number) for number in numbers)
