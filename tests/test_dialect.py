"""What the lab says to each release of SGLang, held against that release: its parsers, its routes, its metrics, its modules.

A stack with CUDA cannot be installed without it; its arguments go to the same release on a CPU, its twin.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from realstack import real_stack

from lab import places
from lab.dialect import DIALECTS, Dialect, dialect_of, get_dialect
from lab.errors import LabError
from lab.experiment import Experiment, load_experiment
from lab.models import get_model
from lab.plan import Plan, fill, from_json, to_json
from lab.planning import make_plan
from lab.servable import left_out_of
from lab.site import Site
from lab.stack import Stack, list_stacks, load_stack
from lab.stacks.check import python_of, site_packages
from lab.stacks.run import child_env
from lab.workload import RandomIds

STACKS = {name: load_stack(name, root=places.ROOT) for name in list_stacks(places.ROOT)}
EXPERIMENTS = [file.stem for file in sorted(places.EXPERIMENTS.glob("[!_]*.py"))]
VALUES = {
    "STACK": "/stack",
    "MODEL": "/model",
    "LAB": str(places.PACKAGE),
    "JIT": "/jit",
    "TRIAL": "/trial",
    "LOAD": "/load",
    "SCRATCH": "/scratch",
    "PORT": "30000",
}

# Run in a stack's Python with a file of command lines: what the real parsers say against each, "" for nothing. The client
# programs are run as they are, up to the moment that they have parsed their arguments.
ASK = """
import argparse, contextlib, io, json, runpy, sys

class Parsed(BaseException):
    pass

real = argparse.ArgumentParser.parse_args

def exact(parser, words):
    parser.allow_abbrev = False
    real(parser, words)

def parse_and_stop(parser, args=None, namespace=None):
    exact(parser, sys.argv[1:])
    raise Parsed

def server(words):
    from sglang.srt.server_args import ServerArgs
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    exact(parser, words)

def client(words):
    argparse.ArgumentParser.parse_args = parse_and_stop
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__")
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except Parsed:
        return
    finally:
        argparse.ArgumentParser.parse_args = real
    raise SystemExit("it never parsed its arguments")

answers = []
for kind, words in json.load(open(sys.argv[1])):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            {"server": server, "client": client}[kind](words)
        answers.append("")
    except SystemExit as stop:
        answers.append(said.getvalue().strip().splitlines()[-1] if said.getvalue() else f"ended with {stop.code}")
print(json.dumps(answers))
"""

Command = tuple[str, tuple[str, ...]]


def twin_of(stack: Stack) -> str:
    """The stack for CPUs that has the same release."""
    found = [s.name for s in STACKS.values() if s.device == "cpu" and s.sglang == stack.sglang]
    assert len(found) == 1, f"{stack.name} has no twin: what is said to it is not tested"
    return found[0]


def ask(cpu_stack: str, commands: list[Command], folder: Path) -> list[str]:
    """What the parsers of the release say against each command, "" where they take it."""
    stack, built = real_stack(cpu_stack)
    script, file = folder / "ask.py", folder / "commands.json"
    script.write_text(ASK)
    file.write_text(json.dumps(commands))
    done = subprocess.run(
        (str(python_of(built)), str(script), str(file)),
        env={**child_env(os.environ), **dict(stack.env), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answers, list)
    assert len(answers) == len(commands)
    return answers


def plan_of(name: str, stack: Stack) -> Plan:
    model = get_model("nano")
    return make_plan(
        load_experiment(name, folder=places.EXPERIMENTS),
        stack=stack,
        model=model,
        model_sha256=model.sha256,
        site=Site(name="here", runtime="process"),
        places={},
        repeats=1,
    )


def commands_of(plan: Plan) -> list[Command]:
    """Every server's and client's command line of a plan, placeholders filled, each once."""
    found: list[Command] = []
    for trial in plan.trials:
        assert trial.server.argv[1:3] == ("-m", "sglang.launch_server")
        found.append(("server", trial.server.argv[3:]))
        found += [("client", step.argv) for step in trial.loads]
    filled = [(kind, tuple(fill(word, VALUES) for word in words)) for kind, words in found]
    return list(dict.fromkeys(filled))


@pytest.mark.parametrize("name", STACKS)
def test_every_command_of_every_experiment_is_taken_by_the_release(name: str, tmp_path: Path) -> None:
    stack = STACKS[name]
    commands = [command for e in EXPERIMENTS for command in commands_of(plan_of(e, stack))]
    assert {kind for kind, _ in commands} == {"server", "client"}
    answers = ask(twin_of(stack), commands, tmp_path)
    wrong = {" ".join(words): said for (_, words), said in zip(commands, answers, strict=True) if said}
    assert wrong == {}


BENCH = ("-m", "sglang.bench_serving", "--backend", "sglang", "--dataset-name", "random-ids")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.release)
def test_what_a_release_is_said_to_lack_it_lacks(dialect: Dialect, tmp_path: Path) -> None:
    """And the other way round: a flag that only newer releases are said to have is one that they have."""
    (cpu_stack,) = (s.name for s in STACKS.values() if s.device == "cpu" and s.dialect == dialect.release)
    valued = {
        "--radix-eviction-policy": "lru",
        "--export-metrics-to-file-dir": "x",
        "--max-queued-requests": "1",
    }
    flags = sorted({flag for d in DIALECTS for flag in d.unknown_flags})
    options = sorted({pair for d in DIALECTS for pair in d.implied})
    commands: list[Command] = [
        ("server", ("--model-path", "m", flag, *filter(None, [valued.get(flag)]))) for flag in flags
    ]
    commands += [("client", (*BENCH, flag, *filter(None, [value]))) for flag, value in options]
    commands += [("client", (*BENCH, *d.added)) for d in DIALECTS if d is dialect]
    answers = ask(cpu_stack, commands, tmp_path)
    lacks = {*dialect.unknown_flags, *(flag for flag, _ in dialect.implied)}
    for word, said in zip((*flags, *(flag for flag, _ in options)), answers, strict=False):
        assert ("unrecognized arguments" in said) == (word in lacks), f"{word}: {said}"
    assert answers[-1] == "", "bench_serving does not take what every load gets"


def test_the_question_to_the_parsers_can_be_answered_with_no(tmp_path: Path) -> None:
    commands: list[Command] = [
        ("server", ("--model-path", "m", "--no-such-flag")),
        ("server", ("--model-path", "m", "--max-total", "5")),  # an abbreviation
        ("server", ("--model-path", "m", "--schedule-policy", "slowest-first")),
        ("client", (*BENCH, "--no-such-flag")),
        ("client", (str(places.PACKAGE / "load" / "chat.py"), "--url", "u")),
        ("server", ("--model-path", "m")),
    ]
    *refused, taken = ask("cpu046", commands, tmp_path)
    assert all(refused), refused
    assert taken == ""


# ---- the release's source


@cache
def source(dialect: Dialect, *names: str) -> str:
    """A file of the release, the first of `names` that it has."""
    (name,) = (s.name for s in STACKS.values() if s.device == "cpu" and s.dialect == dialect.release)
    stack, built = real_stack(name)
    files = [site_packages(stack, built) / "sglang" / part for part in names]
    return next(file for file in files if file.is_file()).read_text(encoding="utf-8")


def routes(text: str) -> set[str]:
    """The paths that functions are decorated with: `@app.get("/health")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).startswith("app."):
                found |= {a.value for a in decorator.args if isinstance(a, ast.Constant)}
    return found


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.release)
def test_the_release_has_the_endpoints(dialect: Dialect) -> None:
    has = routes(source(dialect, "srt/entrypoints/http_server.py"))
    assert len(has) > 10
    assert {dialect.health, dialect.info, dialect.flush} <= has
    if dialect.info != "/server_info":
        assert "/server_info" not in has


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.release)
def test_the_release_has_the_metrics_and_no_other(dialect: Dialect) -> None:
    text = source(dialect, "srt/observability/metrics_collector.py", "srt/metrics/collector.py")
    kinds = (
        "requests_total",
        "prompt_total",
        "cached_total",
        "generated_total",
        "evicted_total",
        "retracted_total",
    )
    for kind in kinds:
        names = {getattr(d, kind) for d in DIALECTS} - {""}
        assert {n for n in names if f"sglang:{n}" in text} == {getattr(dialect, kind)} - {""}, kind


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.release)
def test_the_release_has_the_modules_and_the_environment(dialect: Dialect) -> None:
    (name,) = (s.name for s in STACKS.values() if s.device == "cpu" and s.dialect == dialect.release)
    stack, built = real_stack(name)
    site = site_packages(stack, built)
    for module in (*dialect.preload, dialect.bench):
        path = site.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
    everything = "".join(file.read_text(encoding="utf-8") for file in (site / "sglang/srt").rglob("*.py"))
    for variable, value in dialect.server_env:
        assert variable in everything, variable
        if "${LAB}" in value:
            assert Path(fill(value, VALUES)).is_file()


def test_why_a_load_sends_one_request_more() -> None:
    """0.4.6.post5 parses --warmup-requests and calls its benchmark without it."""
    tree = ast.parse(source(get_dialect("0.4.6.post5"), "bench_serving.py"))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "benchmark")
    assert {"flush_cache", "max_concurrency"} <= {k.arg for k in call.keywords}
    assert "warmup_requests" not in {k.arg for k in call.keywords}
    (benchmark,) = (
        n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == "benchmark"
    )
    defaults = dict(
        zip([a.arg for a in benchmark.args.args][::-1], benchmark.args.defaults[::-1], strict=False)
    )
    assert ast.literal_eval(defaults["warmup_requests"]) == get_dialect("0.4.6.post5").bench_extra == 1


# ---- the choice, and what a release cannot do


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_and_the_plans_made_with_it_speak_alike(name: str) -> None:
    """A plan has the release only; what it speaks must be what stack.toml says."""
    assert dialect_of(STACKS[name].sglang) is get_dialect(STACKS[name].dialect)


@pytest.mark.parametrize(
    ("release", "dialect"),
    [
        ("0.4.6.post5", "0.4.6.post5"),
        ("0.4.6.post6", "0.4.6.post5"),
        ("0.5.21", "0.5.21"),
        ("0.5.23", "0.5.21"),
    ],
)
def test_the_nearest_dialect_that_is_not_newer(release: str, dialect: str) -> None:
    assert dialect_of(release).release == dialect


@pytest.mark.parametrize("release", ["0.4.6.post4", "0.4.7", "0.5.20", "", "newest"])
def test_a_release_that_nobody_looked_at_is_refused(release: str) -> None:
    with pytest.raises(LabError, match="does not know how SGLang") as caught:
        dialect_of(release)
    assert "0.4.6.post5, 0.5.21" in caught.value.why


def test_an_unknown_dialect_names_the_known_ones() -> None:
    with pytest.raises(LabError, match=r"0\.4\.6") as caught:
        get_dialect("0.4.6")
    assert "0.4.6.post5" in f"{caught.value.why}{caught.value.fix}"


OLD, NEW = get_dialect("0.4.6.post5"), get_dialect("0.5.21")


def test_a_clients_command_in_the_words_of_a_release() -> None:
    asked = (*BENCH, "--cache-report", "--gsp-range-ratio", "1.0", "--seed", "1")
    assert NEW.client(asked) == asked
    assert OLD.client(asked) == (*BENCH, "--seed", "1", "--flush-cache")
    own = ("${LAB}/load/chat.py", "--cache-report")
    assert OLD.client(own) == own
    with pytest.raises(LabError, match=r"has no --gsp-range-ratio, and 0\.5 was asked for"):
        OLD.client((*BENCH, "--gsp-range-ratio", "0.5"))


def small(**changes: object) -> Experiment:
    """radix without the variant that an older release cannot serve."""
    found = load_experiment("radix", folder=places.EXPERIMENTS).experiment
    both = tuple(variant for variant in found.variants if variant.name != "lfu")
    loads = tuple(replace(load, variants=()) for load in found.loads)
    return replace(replace(found, variants=both, loads=loads), **changes)  # type: ignore[arg-type]


def test_a_variant_that_a_release_refuses_is_left_out_and_said(tmp_path: Path) -> None:
    radix = small()
    lru = replace(radix.variants[0], name="lru", args=("--radix-eviction-policy", "lru"))
    experiment = replace(radix, variants=(*radix.variants, lru))
    stack = STACKS["cpu046"]
    reasons = left_out_of(experiment, stack=stack, dialect=OLD)
    assert reasons == {"lru": "SGLang 0.4.6.post5 has no --radix-eviction-policy"}
    assert left_out_of(experiment, stack=STACKS["cpu"], dialect=NEW) == {}
    source_ = replace(load_experiment("radix", folder=places.EXPERIMENTS), experiment=experiment)
    model = get_model("nano")
    plan = make_plan(
        source_,
        stack=stack,
        model=model,
        model_sha256=model.sha256,
        site=Site(name="x"),
        places={},
        repeats=2,
    )
    assert {t.variant for t in plan.trials} == {"cache-on", "cache-off"}
    assert from_json(to_json(plan), where="plan.json").left_out == reasons
    assert "left_out" not in to_json(plan_of("overlap", stack))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--tp-size", "2"), "no --tp-size 2 without a GPU: its all-reduce and all-gather need a GPU"),
        (
            ("--tp-size", "1", "--tp-size", "4"),
            "no --tp-size 4 without a GPU: its all-reduce and all-gather need a GPU",
        ),
        (("--page-size", "16"), "no --page-size 16 without a GPU: its paged allocator is a Triton kernel"),
        (
            ("--attention-backend", "triton"),
            "no --attention-backend triton without a GPU: the others need a GPU",
        ),
        (("--tp-size", "2", "--tp-size", "1"), ""),
        (("--attention-backend", "torch_native", "--disable-radix-cache"), ""),
    ],
)
def test_what_a_release_cannot_do_without_a_gpu_is_left_out_there_only(
    args: tuple[str, ...], reason: str
) -> None:
    assert OLD.refused(args, device="cpu") == ((reason,) if reason else ())
    assert OLD.refused(args, device="cuda") == ()
    both = reason and "tp-size" not in reason  # ranks on CPUs came later
    assert bool(NEW.refused(args, device="cpu")) == bool(both)
    assert NEW.refused(args, device="cuda") == ()
    radix = small()
    experiment = replace(
        radix, variants=(*radix.variants, replace(radix.variants[0], name="more", args=args))
    )
    left = left_out_of(experiment, stack=STACKS["cpu046"], dialect=OLD)
    assert left == ({"more": f"SGLang 0.4.6.post5 has {reason}"} if reason else {})
    assert left_out_of(experiment, stack=STACKS["cu125"], dialect=OLD) == {}


@pytest.mark.parametrize("name", STACKS)
def test_no_stack_is_told_what_its_release_cannot_do(name: str) -> None:
    stack = STACKS[name]
    told = (*stack.server_args, *stack.observe_args)
    assert get_dialect(stack.dialect).refused(told, device=stack.device) == ()


def test_an_experiment_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(LabError, match="cannot run on stack 'cpu046'") as caught:
        left_out_of(small(server=("--skip-server-warmup",)), stack=STACKS["cpu046"], dialect=OLD)
    assert caught.value.why == "SGLang 0.4.6.post5 has no --skip-server-warmup"


def test_a_load_without_a_program_is_refused() -> None:
    class Other(RandomIds):
        dataset = "other"

    load = Other(name="o", seed=1, prompts=1, input_tokens=1, output_tokens=1)
    with pytest.raises(LabError, match="cannot run") as caught:
        left_out_of(small(loads=(load,)), stack=STACKS["cpu046"], dialect=OLD)
    assert "no load 'other'" in caught.value.why
