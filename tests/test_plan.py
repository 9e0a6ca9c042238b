"""The plan and its script: the same every time, every variant once a repeat, and both say the same to the word."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fakerun
import pytest
from fakerun import PLACES, make_fake_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import commands, places
from lab.errors import LabError
from lab.experiment import Source, load_experiment
from lab.plan import PLACEHOLDER, PLACEHOLDERS, Plan, Process, fill, from_json, to_json
from lab.rundir import SCHEMA
from lab.site import Site

RADIX = load_experiment("radix", folder=places.EXPERIMENTS)
PINNED = Site(name="pinned", server_cpus=(0, 1, 2), client_cpus=(3,), port=31000)


@pytest.fixture
def plan() -> Plan:
    """Radix on a machine with four CPUs; the file's hash is left out, prose may change without changing the plan."""
    return make_fake_plan(replace(RADIX, sha256="0" * 64), repeats=2, site=PINNED)


def test_golden_plan(plan: Plan, golden: Callable[[str, str], None]) -> None:
    golden("plan-radix.json", to_json(plan))


def test_golden_commands(plan: Plan, golden: Callable[[str, str], None]) -> None:
    golden("commands-radix.sh", commands.script(plan))


def test_planning_is_pure(plan: Plan) -> None:
    """Twice the same, whatever the global random state; and nothing on this machine has to exist for it."""
    random.seed(99)
    again = make_fake_plan(replace(RADIX, sha256="0" * 64), repeats=2, site=PINNED)
    assert again == plan
    assert to_json(again) == to_json(plan)
    assert commands.script(again) == commands.script(plan)


def test_a_plan_comes_back_from_its_file(plan: Plan) -> None:
    assert from_json(to_json(plan), where="plan.json") == plan


@pytest.mark.parametrize("repeats", [1, 3, 20])
def test_each_repeat_visits_each_variant_once(repeats: int) -> None:
    plan = make_fake_plan(RADIX, repeats=repeats)
    variants = sorted(v.name for v in RADIX.experiment.variants)
    assert [t.index for t in plan.trials] == list(range(repeats * len(variants)))
    for repeat in range(repeats):
        assert sorted(t.variant for t in plan.trials if t.repeat == repeat) == variants
    assert len({t.name for t in plan.trials}) == len(plan.trials)
    if repeats == 20:
        orders = {tuple(t.variant for t in plan.trials if t.repeat == r) for r in range(repeats)}
        assert len(orders) > 2, "the order within a repeat is drawn, not fixed"


def test_variants_of_a_repeat_get_the_same_load(plan: Plan) -> None:
    for repeat in range(plan.repeats):
        trials = {t.variant: t for t in plan.trials if t.repeat == repeat}
        on, off = trials["cache-on"], trials["cache-off"]
        loads = {step.name: step.argv for step in on.loads}
        assert all(step.argv == loads[step.name] for step in off.loads)
        assert all(step.hit_rate == 0 for step in off.loads), "nothing is predicted without a cache"
        assert any(step.hit_rate > 0.5 for step in on.loads)


def test_the_default_of_repeats_is_the_experiments() -> None:
    assert make_fake_plan(RADIX).repeats == RADIX.experiment.repeats


@pytest.mark.parametrize("repeats", [0, -3, 101, 10**9])
def test_absurd_repeats(repeats: int) -> None:
    with pytest.raises(LabError, match=f"--repeats {repeats} makes no sense") as caught:
        make_fake_plan(RADIX, repeats=repeats)
    assert "1 to 100" in caught.value.fix


def test_only_known_placeholders_and_no_other_path(plan: Plan) -> None:
    for trial in plan.trials:
        words = [*trial.server.argv, *(w for step in trial.loads for w in step.argv)]
        words += [value for _, value in (*trial.server.env, *trial.client.env)]
        for word in words:
            assert set(PLACEHOLDER.findall(word)) <= PLACEHOLDERS.keys(), word
            assert not word.startswith("/"), word


def test_the_server_environment_is_whole_and_minimal(plan: Plan) -> None:
    env = dict(plan.trials[0].server.env)
    assert env["HOME"].startswith("${SCRATCH}")
    assert env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    assert not any("TOKEN" in key or "PROXY" in key.upper() for key in env)


def test_fill_replaces_placeholders_and_nothing_else() -> None:
    assert fill("a ${PORT} $HOME $$ ${port} 5$", {"PORT": "1"}) == "a 1 $HOME $$ ${port} 5$"
    assert fill("${NOWHERE}", {"PORT": "1"}) == "${NOWHERE}"  # such as in a question
    with pytest.raises(KeyError):
        fill("${TRIAL}", {"PORT": "1"})


# ---- reading a plan that is not right


def broken(plan: Plan, **changes: object) -> str:
    return json.dumps({**json.loads(to_json(plan)), **changes})


def test_a_plan_from_a_newer_lab(plan: Plan) -> None:
    with pytest.raises(LabError, match=f"plan.json has schema {SCHEMA + 1}") as caught:
        from_json(broken(plan, schema=SCHEMA + 1, new_field=1), where="plan.json")
    assert "newer lab" in caught.value.why


def test_a_plan_cut_anywhere_is_refused(plan: Plan) -> None:
    text = to_json(plan)
    for at in (0, 1, 17, len(text) // 3, len(text) // 2, len(text) - 3):
        with pytest.raises(LabError, match=r"plan\.json is not a plan of this lab") as caught:
            from_json(text[:at], where="plan.json")
        assert caught.value.why
        assert caught.value.fix


@pytest.mark.parametrize(
    "changes",
    [
        {"repeats": "two"},
        {"trials": None},
        {"trials": [{}]},
        {"claims": [1]},
        {"places": []},
        {"schema": "1"},
    ],
)
def test_a_plan_with_a_wrong_type_is_refused(plan: Plan, changes: dict[str, object]) -> None:
    with pytest.raises(LabError, match="is not a plan of this lab"):
        from_json(broken(plan, **changes), where="plan.json")


@pytest.mark.parametrize("text", ["[]", "null", '"plan"', "3"])
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises(LabError, match="is not a plan of this lab"):
        from_json(text, where="plan.json")


# ---- the script

# Bash itself parses the script; what it would start is written down instead: argv, each word ended by a NUL byte,
# goes to where the program's output goes. curl calls are listed in order, nothing waits.
STUBS = """
setsid() { "$@"; }
env() { printf '%s\\0' env "$@"; }
curl() { echo "$*" >> "$OUT/curl"; }
mktemp() { mkdir -p "$OUT/scratch"; echo "$OUT/scratch"; }
kill() { return 0; }
sleep() { :; }
source "$SCRIPT"
"""


def play(plan: Plan, tmp_path: Path) -> Path:
    """Run the plan's script under bash with the stubs; returns its OUT."""
    script = tmp_path / "commands.sh"
    script.write_text(commands.script(plan))
    out = tmp_path / "out"
    out.mkdir()
    env = {"OUT": str(out), "SCRIPT": str(script), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(("bash", "-c", STUBS), env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


def words(file: Path) -> list[str]:
    return file.read_bytes().decode().removesuffix("\0").split("\0")


def expected(process: Process, values: dict[str, str], *more: str) -> list[str]:
    """What the plan says, as `execute` would fill it in."""
    pin = ["taskset", "-c", ",".join(map(str, process.cpus))] if process.cpus else []
    env = [f"{key}={fill(value, values)}" for key, value in process.env]
    return ["env", "-i", *env, *pin, *(fill(word, values) for word in (*process.argv, *more))]


@pytest.mark.parametrize("site", [PINNED, Site(name="free")])
def test_the_script_starts_what_the_plan_says_word_for_word(site: Site, tmp_path: Path) -> None:
    plan = make_fake_plan(RADIX, repeats=2, site=site)
    out = play(plan, tmp_path)
    for trial in plan.trials:
        folder = out / trial.name
        values = {
            **PLACES,
            "TRIAL": str(folder),
            "SCRATCH": str(out / "scratch"),
            "PORT": str(site.port or 31999),
            "LOAD": "",
        }
        assert words(folder / "server.log") == expected(trial.server, values)
        for step in trial.loads:
            load = folder / "loads" / step.name
            assert words(load / "client.log") == expected(
                trial.client, {**values, "LOAD": str(load)}, *step.argv
            )


def test_the_script_flushes_and_reads_metrics_around_each_load(plan: Plan, tmp_path: Path) -> None:
    calls = [line.rpartition("/")[2] for line in (play(plan, tmp_path) / "curl").read_text().splitlines()]
    want: list[str] = []
    for trial in plan.trials:
        want.append("health")
        for _ in trial.loads:
            want += ["flush_cache", "metrics", "metrics"]
    assert calls == want


def test_the_script_is_sound_bash(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "commands.sh").write_text(commands.script(plan))
    done = subprocess.run(("bash", "-n", tmp_path / "commands.sh"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_places_with_spaces_and_quotes(tmp_path: Path) -> None:
    awkward = {name: f'{path}/it\'s a "$HOME" `x` folder' for name, path in PLACES.items()}
    plan = replace(make_fake_plan(RADIX, repeats=1), places=awkward)
    server = words(play(plan, tmp_path) / plan.trials[0].name / "server.log")
    assert f"{awkward['STACK']}/bin/python" in server
    assert awkward["MODEL"] in server


text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=12)
pieces = st.lists(
    st.one_of(text, st.sampled_from(["${PORT}", "$PORT", "$(ls)", "`ls`", "'", '"', "\\", "!", "${x}"]))
)


@settings(max_examples=50)
@given(st.lists(pieces.map("".join), min_size=1, max_size=30))
def test_any_word_reaches_the_program_as_it_stands(argv: list[str]) -> None:
    """Questions of a chat load may hold anything; bash gets them through `command`."""
    process = Process(argv=tuple(argv), env=(("KEY", argv[0]),), cpus=())
    values = {name: f"the {name}" for name in PLACEHOLDERS}
    set_all = "".join(f"{name}='{value}'\n" for name, value in values.items())
    script = f"env() {{ printf '%s\\0' \"$@\"; }}\n{set_all}{commands.command(process)}\n"
    done = subprocess.run(("bash",), input=script.encode(), capture_output=True, timeout=60)
    assert done.stderr == b""
    filled = [fill(word, values) for word in argv]
    assert done.stdout.decode().removesuffix("\0").split("\0") == ["-i", f"KEY={filled[0]}", *filled]


def test_the_fake_experiment_can_be_planned(tmp_path: Path) -> None:
    source: Source = fakerun.small(tmp_path)
    assert len(make_fake_plan(source).trials) == 4


def test_the_script_binds_the_client_as_the_plan_does() -> None:
    plan = make_fake_plan(RADIX, repeats=1)
    trial = plan.trials[0]
    bound = replace(trial, client=replace(trial.client, mems=(1,), cpus=(3,)))
    text = commands.script(replace(plan, trials=(bound,)))
    assert text.count("  --membind=1 ") == text.count("taskset -c 3 ") == len(trial.loads)


def scaled_source(**changes: object) -> Source:
    experiment = replace(RADIX.experiment, **changes)  # type: ignore[arg-type]
    loads = tuple(replace(load, small={"output_tokens": 3}) for load in experiment.loads)
    return replace(RADIX, experiment=replace(experiment, loads=loads))


def test_loads_are_small_where_the_cpu_serves_unless_the_site_says_otherwise() -> None:
    """And a load without small numbers is the same everywhere."""
    plan = make_fake_plan(scaled_source())
    steps = plan.trials[0].loads
    assert plan.scale == "small"
    assert {step.output_tokens for step in steps} == {3}
    assert all(step.scaled.startswith("output_tokens 3 instead of") for step in steps)
    full = make_fake_plan(scaled_source(), site=replace(PINNED, scale="full"))
    assert full.scale == "full"
    assert {step.scaled for step in full.trials[0].loads} == {""}
    assert {step.scaled for step in make_fake_plan(RADIX).trials[0].loads} == {""}


def test_the_servers_get_the_probe_and_the_clients_do_not() -> None:
    plan = make_fake_plan(scaled_source(probe="requests"))
    for trial in plan.trials:
        server, client = dict(trial.server.env), dict(trial.client.env)
        assert server["LAB_PROBE_LEVEL"] == plan.probe == "requests"
        assert server["LAB_PROBE_DIR"] == "${TRIAL}/events"
        assert server["PYTHONPATH"] == "${LAB}/probe"
        assert not {"LAB_PROBE_DIR", "PYTHONPATH"} & set(client)
    off = make_fake_plan(scaled_source(probe="off"))
    assert "LAB_PROBE_DIR" not in dict(off.trials[0].server.env)


def test_a_variant_that_needs_what_is_absent_is_left_out() -> None:
    gpu = replace(RADIX.experiment.variants[0], name="gpu", needs=("gpu",))
    source = replace(RADIX, experiment=replace(RADIX.experiment, variants=(*RADIX.experiment.variants, gpu)))
    plan = make_fake_plan(source)
    assert plan.left_out == {"gpu": "this machine has no gpu"}
    assert "gpu" not in plan.variants
    assert "gpu" in make_fake_plan(source, site=replace(PINNED, capabilities=("gpu",))).variants
