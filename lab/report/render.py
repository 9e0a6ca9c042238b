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
from lab.experiment import Experiment, Picture, load_file
from lab.gpurows import UNTESTED
from lab.hardware.sysfs import format_list
from lab.judge import judge, samples
from lab.metrics import METRICS, Metric
from lab.plan import Plan, read_plan
from lab.probed import absent_columns
from lab.report.gpusection import GpuSection, gpu_section
from lab.report.numbers import Number, number
from lab.report.pictures import DRAWINGS, draw_all
from lab.rundir import Run, read_json, write_json, write_text
from lab.tables import tabulate

# What only a profiler on a GPU tells; the lab runs none yet.
PROFILED = dict.fromkeys(
    (
        "attention_share",
        "kernel_names_shared",
        "launch_us_median",
        "comm_share",
        "sm_share",
        "gpu_idle_share",
    ),
    "the lab runs no GPU profiler yet",
)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What came of a run: its verdicts, and the trials that could not be used with the reason."""

    verdicts: tuple[Verdict, ...]
    unusable: tuple[tuple[str, str], ...]


def analyse(run: Run) -> Analysis:
    """Rebuild every derived file of the run."""
    plan = read_plan(run)
    tables = tabulate(run)
    silent = dict(dialect_of(plan.sglang).silent)
    absent = {**PROFILED, **absent_columns(plan, tables["checks"]), **silent, **plan.left_out}
    verdicts = judge(plan.claims, tables, capabilities=plan.capabilities, absent=absent)
    write_json(run.verdicts, {"verdicts": [asdict(v) for v in verdicts]})
    experiment = load_file(run.experiment)
    pictures = draw_all(tables, run.plots, names=experiment.pictures)
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
    pictures: tuple[Picture, ...],
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
        silent=[
            (column, why) for column, why in dialect_of(plan.sglang).silent if not _known(column, tables)
        ],
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
        pictures=[(f"{name}.png", DRAWINGS[name].caption) for name in pictures],
        environment=environment,
        metrics=_explained(experiment),
        scaled=sorted({(x.name, x.scaled) for trial in plan.trials for x in trial.loads if x.scaled}),
        loads=_steps(plan),
        gpus=gpus,
        passed=_passed(checks),
        seats=_seats(plan),
    )


def _known(column: str, tables: Mapping[str, pd.DataFrame]) -> bool:
    """Whether a column that the release is silent about came from elsewhere, such as the probe."""
    return any(column in tables[n] and bool(tables[n][column].notna().any()) for n in ("loads", "requests"))


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
    """Every measured number over the repeats, with its interval and how steady it was: those of every experiment, and
    those that its claims are about."""
    found = []
    for load in experiment.loads:
        if load.role != "measure":
            continue
        for measure in _measures(experiment, load.name):
            for variant in experiment.variants:
                values = list(samples(measure, variant.name, tables).values())
                if any(values) or (values and (measure.column in ALWAYS or measure in _claimed(experiment))):
                    label = measure.label().removesuffix(f" of {load.name}").removesuffix(f" in {load.name}")
                    metric = METRICS[measure.column]
                    found.append(number(values, metric, load=load.name, variant=variant.name, what=label))
    return found


def _explained(experiment: Experiment) -> list[Metric]:
    """The columns that this page has numbers of, and those of every request."""
    names = [m.column for load in experiment.loads for m in _measures(experiment, load.name)]
    also = (
        "e2e_ms",
        "queue_ms",
        "server_ttft_ms",
        "prompt_tokens",
        "cached_tokens",
        "cached_share",
        "hit_rate_lost",
    )
    return [metric for metric in METRICS.values() if metric.column in {*names, *also, "lru_agreement"}]


def _measures(experiment: Experiment, load: str) -> list[Measure]:
    common = [
        Measure(table="requests", load=load, column="ttft_ms", rows="first"),
        Measure(table="requests", load=load, column="ttft_ms", rows="later"),
        Measure(table="requests", load=load, column="itl_ms"),
        *(Measure(table="loads", load=load, column=c) for c in LOAD_NUMBERS),
    ]
    claimed = [m for m in _claimed(experiment) if m.load == load and m.column in METRICS]
    return list(dict.fromkeys((*common, *claimed)))


def _claimed(experiment: Experiment) -> list[Measure]:
    return [m for claim in experiment.claims for m in (claim.measure, claim.base) if m is not None]


# Load numbers worth a line; all but the hit rate only where they are not simply zero.
LOAD_NUMBERS = (
    *(
        "output_tokens_per_s",
        "hit_rate",
        "predicted_hit_rate",
        "lru_hit_rate",
        "evicted_tokens",
        "groups_evicted",
    ),
    *("running_mean", "running_max", "waiting_max", "retracted_requests", "kv_used_share_max"),
)
ALWAYS = ("hit_rate", "ttft_ms")


def cell(text: object) -> str:
    """Text that may stand in a Markdown table cell."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _group_rows(groups: pd.DataFrame) -> list[dict[str, object]]:
    """The groups of loads in which anything was evicted."""
    if groups.empty:
        return []
    hit = groups.groupby(["trial", "load"])["evicted"].transform("sum") > 0
    return [{str(k): v for k, v in row.items()} for row in groups[hit].to_dict("records")]
