"""From raw files to report.md: tabulate, judge, draw, render. Everything written here can be deleted and rebuilt,
and comes out the same: nothing depends on the clock or on the machine that renders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import pandas as pd

from lab.claims import Measure, Verdict
from lab.dialect import dialect_of
from lab.experiment import Experiment, load_file
from lab.gpurows import UNTESTED
from lab.hardware.sysfs import format_list
from lab.judge import judge, samples
from lab.metrics import METRICS
from lab.plan import Plan, read_plan
from lab.report.gpusection import GpuSection, gpu_section
from lab.report.numbers import Number, number
from lab.report.plots import draw_all
from lab.rundir import Run, read_json, write_json, write_text
from lab.tables import tabulate

PICTURES = {
    "ttft.png": "Time to first token, for the first request of each prefix and for later ones. "
    "Small points are requests, large points the median of each trial.",
    "cached-share.png": "How much of each prompt came from the cache, request by request in the order sent "
    "(first repeat). The dash is what a cache that never forgets would have served.",
    "eviction.png": "What the small pool forgot: each point is a request for a prefix. Below, prompt tokens served from "
    "the cache and prefix tokens that had to be computed again, added up over the load.",
}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What came of a run: its verdicts, and the trials that could not be used with the reason."""

    verdicts: tuple[Verdict, ...]
    unusable: tuple[tuple[str, str], ...]


def analyse(run: Run) -> Analysis:
    """Rebuild every derived file of the run."""
    plan = read_plan(run)
    tables = tabulate(run)
    absent = {**dict(dialect_of(plan.sglang).silent), **plan.left_out}
    verdicts = judge(plan.claims, tables, capabilities=plan.capabilities, absent=absent)
    write_json(run.verdicts, {"verdicts": [asdict(v) for v in verdicts]})
    pictures = draw_all(tables, run.plots)
    experiment = load_file(run.experiment)
    gpus = gpu_section(run, plan, experiment, tables)
    write_text(run.report, _markdown(run, plan, experiment, tables, verdicts, pictures, gpus))
    trials = tables["trials"]
    bad = trials[trials["validity"] != "valid"]
    return Analysis(
        verdicts=verdicts,
        unusable=tuple(
            (str(t), f"{v}: {r}")
            for t, v, r in zip(bad["trial"], bad["validity"], bad["reason"], strict=True)
        ),
    )


def _markdown(
    run: Run,
    plan: Plan,
    experiment: Experiment,
    tables: Mapping[str, pd.DataFrame],
    verdicts: tuple[Verdict, ...],
    pictures: tuple[str, ...],
    gpus: GpuSection | None,
) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    jinja = jinja2.Environment(  # noqa: S701  the output is Markdown, not HTML
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    jinja.filters["cell"] = cell
    environment = read_json(run.environment)
    checks = tables["checks"]
    return jinja.get_template("report.md.j2").render(
        run=run.path.name,
        sealed=run.sums.is_file(),
        plan=plan,
        silent=dialect_of(plan.sglang).silent,
        experiment=experiment,
        claims={c.name: c for c in plan.claims},
        verdicts=verdicts,
        counts={
            o: sum(v.outcome == o for v in verdicts) for o in ("held", "refuted", "inconclusive", "untested")
        },
        trials=tables["trials"].to_dict("records"),
        checks={str(k): rows.to_dict("records") for k, rows in checks.groupby("trial", sort=False)},
        numbers=(lines := numbers(experiment, tables)),
        unsteady=any("unsteady" in line.steady for line in lines),
        groups=_group_rows(tables["groups"]),
        pictures=[(name, PICTURES[name]) for name in pictures],
        environment=environment,
        metrics=METRICS,
        loads=_steps(plan),
        gpus=gpus,
        passed=_passed(checks),
        seats=_seats(plan),
    )


def _passed(checks: pd.DataFrame) -> dict[str, str]:
    """By trial how many checks were passed; one that could not be made is no pass."""
    found = {}
    for trial, rows in checks.groupby("trial", sort=False):
        untested = int(rows["detail"].astype(str).str.startswith(UNTESTED).sum())
        words = f", {untested} untested" if untested else ""
        found[str(trial)] = f"{int(rows['ok'].sum()) - untested} of {len(rows)}{words}"
    return found


def _seats(plan: Plan) -> list[dict[str, str]]:
    """What each variant's programs were bound to; nothing for plans of before that was noted."""
    return [
        {
            "variant": trial.variant,
            "gpus": ", ".join(trial.server.gpus),
            "server_cpus": format_list(trial.server.cpus),
            "server_mems": format_list(trial.server.mems),
            "client_cpus": format_list(trial.client.cpus),
            "why": trial.placed,
        }
        for trial in sorted(plan.trials, key=lambda trial: trial.variant)
        if trial.repeat == 0 and trial.placed
    ]


def _steps(plan: Plan) -> list[dict[str, object]]:
    """Every load once, with the variants that run it and the prediction for each."""
    seen: dict[str, dict[str, object]] = {}
    for trial in plan.trials:
        if trial.repeat:
            continue
        for step in trial.loads:
            row = seen.setdefault(step.name, {"step": step, "variants": {}})
            variants = row["variants"]
            if isinstance(variants, dict):
                variants[trial.variant] = step.hit_rate
    return list(seen.values())


def numbers(experiment: Experiment, tables: Mapping[str, pd.DataFrame]) -> list[Number]:
    """Every measured number over the repeats, with its interval and how steady it was."""
    found = []
    for load in experiment.loads:
        if load.role != "measure":
            continue
        measures = [
            Measure(table="requests", load=load.name, column="ttft_ms", rows="first"),
            Measure(table="requests", load=load.name, column="ttft_ms", rows="later"),
            Measure(table="requests", load=load.name, column="itl_ms"),
            *(Measure(table="loads", load=load.name, column=c) for c in LOAD_NUMBERS),
        ]
        for measure in measures:
            for variant in experiment.variants:
                values = list(samples(measure, variant.name, tables).values())
                if any(values) or (values and measure.column in ("hit_rate", "ttft_ms")):
                    label = measure.label().removesuffix(f" of {load.name}").removesuffix(f" in {load.name}")
                    metric = METRICS[measure.column]
                    found.append(number(values, metric, load=load.name, variant=variant.name, what=label))
    return found


# Load numbers worth a line; all but the hit rate only where they are not simply zero.
LOAD_NUMBERS = ("hit_rate", "predicted_hit_rate", "lru_hit_rate", "evicted_tokens", "groups_evicted")


def cell(text: object) -> str:
    """Text that may stand in a Markdown table cell."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _group_rows(groups: pd.DataFrame) -> list[dict[str, object]]:
    """The groups of loads in which anything was evicted."""
    if groups.empty:
        return []
    hit = groups.groupby(["trial", "load"])["evicted"].transform("sum") > 0
    return [{str(k): v for k, v in row.items()} for row in groups[hit].to_dict("records")]
