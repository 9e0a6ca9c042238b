"""Whether models fit into the plan's box of seven A100s, as `--dry-run --hardware` tells it on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Copy, Done, assert_refused, make_copy
from nvmlstandin import PLAN_BOX, hardware_of

from lab.hardware.model import to_json

EXPERIMENT = '''\
"""Ranks."""

from lab.claims import Claim, Measure
from lab.experiment import Experiment, Variant
from lab.workload import RandomIds

EXPERIMENT = Experiment(
    name="ranks", question="How do ranks scale?", mechanism="By sharing.", sources=(), server=(), try_next=(), repeats=1,
    variants=tuple(
        Variant(name=f"tp{n}", says=f"{n} ranks", args=("--tp-size", str(n))) for n in (1, 2, 3, 4)
    ),
    loads=(RandomIds(name="load", seed=1, prompts=4, input_tokens=512, output_tokens=128),),
    claims=(
        Claim(
            name="c", says="It is served.", measure=Measure(table="loads", load="load", column="generated_tokens"),
            variant="tp4", op=">", threshold=1,
        ),
    ),
)
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    made = make_copy(tmp_path_factory.mktemp("copy"))
    (made.root / "box.json").write_text(to_json(hardware_of(PLAN_BOX)))
    (made.root / "lab/experiments/ranks.py").write_text(EXPERIMENT)
    return made


def dry(copy: Copy, experiment: str, model: str, *more: str) -> Done:
    where = ("--hardware", "box.json", "--stack", "cu125", "--runtime", "docker")
    return copy.invoke(f"exp.{experiment}", "--dry-run", "--model", model, *where, *more)


def test_70b_is_refused_on_one_gpu_with_the_number(copy: Copy) -> None:
    done = dry(copy, "small", "llama-3.1-70b")
    assert_refused(done, "llama-3.1-70b does not fit", "70.55e9 parameters x 2 bytes = 141 GB (131.4 GiB)")
    assert "80.0 GiB - 1 for CUDA" in done.text
    assert "it would fit on 2 GPUs (TP=2), and this experiment's servers have TP=1" in done.text


def test_70b_fits_on_two_and_four_gpus_and_the_others_are_left_out(copy: Copy) -> None:
    done = dry(copy, "ranks", "llama-3.1-70b", "--weights", "dummy")
    assert done.code == 0, done.text
    assert "65.7 GiB on each of 2 GPUs" in done.text
    assert "160 KiB a token: 19,795 tokens" in done.text
    assert "80 KiB a token: 449,498 tokens" in done.text
    assert "64 attention heads, which 3 tensor-parallel ranks cannot share equally" in done.text
    assert "tp2-r0" in done.out
    assert "tp4-r0" in done.out
    assert "tp1-r0" not in done.out
    assert "tp3-r0" not in done.out
    assert "--load-format dummy" in done.out
    assert "weights not looked for" in done.text


@pytest.mark.parametrize(
    ("model", "said"), [("llama-3.1-8b", "446,975 tokens"), ("mistral-7b", "458,911 tokens")]
)
def test_what_fits_on_one(copy: Copy, model: str, said: str) -> None:
    done = dry(copy, "small", model)
    assert done.code == 0, done.text
    assert said in done.text


def test_without_a_gpu_the_machine_counts(copy: Copy, tmp_path: Path) -> None:
    done = copy.invoke(
        "exp.small", "--dry-run", "--model", "llama-3.1-70b", "--weights", "dummy", "--stack", "cpu"
    )
    assert_refused(done, "llama-3.1-70b does not fit", "x 4 bytes = 282 GB")
    gone = copy.invoke("exp.small", "--dry-run", "--weights", str(tmp_path))
    assert_refused(gone, "the model 'nano' has no other weights than its own")
