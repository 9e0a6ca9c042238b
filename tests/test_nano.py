"""The real nano model, made by a real stack: its bytes, its tokenizer, and what SGLang makes of it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from parts import need

from lab import modelfiles, nano
from lab.modelfiles import ensure_model, with_python
from lab.models import get_model

ROOT = Path(__file__).resolve().parent.parent
HANDBOOK = ROOT / "lab" / "data" / "handbook.md"
REFERENCE = Path(__file__).with_name("nano_reference.py")
START_LIMIT_S = 240.0
PROMPT_LENGTHS = (1, 7, 40, 150, 300)
STEPS = 24


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of the cpu stack."""
    try:
        found = request.getfixturevalue("stack_python")
    except pytest.FixtureLookupError:
        need(False, "no stack_python fixture: the cpu stack cannot be built here")
        raise
    assert isinstance(found, Path)
    return found


@pytest.fixture(scope="module")
def folder(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model(
        get_model("nano"), cache=tmp_path_factory.mktemp("cache"), builder=with_python(python), say=print
    )


def ask(python: Path, question: str, **inputs: object) -> object:
    """The answer of `nano_reference.py`."""
    done = subprocess.run(
        [python, "-I", REFERENCE, question],
        input=json.dumps({key: str(value) if key == "model" else value for key, value in inputs.items()}),
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_builder_imports_nothing_of_the_lab() -> None:
    tree = ast.parse((ROOT / "lab" / "nano.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} >= {"numpy", "tokenizers", "safetensors"}
    assert not [name for name in names if name.startswith(("lab", "."))]


def test_weights_are_drawn_exactly() -> None:
    """The first numbers, worked out again from the generator's raw output in whole numbers and fractions."""
    import numpy as np

    name, tensor = next(nano.draw_weights())
    assert name == "model.embed_tokens.weight"
    raw = np.random.Philox(nano.WEIGHTS_SEED).random_raw(5)
    expected = [((int(word) >> 40) - 2**23) * 7 / 2**25 for word in raw]
    assert tensor[0, :5].tolist() == [float(np.float32(value)) for value in expected]


def test_same_bytes_whatever_the_threads_and_hash_seed(python: Path, tmp_path: Path) -> None:
    expected = "".join(f"{digest}  {name}\n" for name, digest in get_model("nano").files)
    for number in ("1", "3"):
        env = {"PATH": os.environ["PATH"], "RAYON_NUM_THREADS": number, "PYTHONHASHSEED": number}
        command = [python, modelfiles.BUILDER, tmp_path / number]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout == expected, (
            "not the sums of the catalogue: if nano was changed on purpose, put these there"
        )


def test_config_says_what_the_catalogue_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    model = get_model("nano")
    assert config["max_position_embeddings"] == model.context >= 8192
    assert config["vocab_size"] == model.vocab >= 10240
    assert config["tie_word_embeddings"] is False
    # the weights of exactly that shape, in four bytes each
    attention = model.head_dim * model.hidden * (2 * model.heads + 2 * model.kv_heads)
    layer = attention + 3 * model.hidden * model.intermediate + 2 * model.hidden
    numbers = 2 * model.vocab * model.hidden + model.layers * layer + model.hidden
    size = (folder / "model.safetensors").stat().st_size
    header = int.from_bytes((folder / "model.safetensors").open("rb").read(8), "little") + 8
    assert size - header == 4 * numbers


def test_any_text_comes_back(python: Path, folder: Path) -> None:
    rng = random.Random(0)
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x110000))]
    wild = ["".join(rng.choices(characters, k=200)) for _ in range(20)]
    tame = ["", " ", "  two  spaces\n\n\tand a tab ", "naïve café 漢字 \U0001f600", "<|im_start|>user"]
    texts = [HANDBOOK.read_text(), *tame, *wild]
    answers = ask(python, "there_and_back", model=folder, texts=texts)
    assert isinstance(answers, list)
    assert [answer["text"] for answer in answers] == texts
    # The handbook is the long prompt of the chat experiment: about one token a word and a mark.
    assert 6000 < len(answers[0]["ids"]) < 8000


def test_random_ids_keep_their_number(python: Path, folder: Path) -> None:
    """Decoded and encoded again, as `bench_serving` and its server do it: independent ids, and runs of
    consecutive ones."""
    rng = random.Random(0)
    vocab = get_model("nano").vocab
    independent = [[rng.randrange(vocab) for _ in range(2048)] for _ in range(20)]
    runs = [[(start + i) % vocab for i in range(2048)] for start in range(0, vocab, 512)]
    short_runs = [[(start + i) % vocab for i in range(256)] for start in range(0, vocab, 128)]
    lists = [*independent, *runs, *short_runs]
    lengths = ask(python, "back_and_there", model=folder, ids=lists)
    assert isinstance(lengths, list)
    drift = [length / len(ids) - 1 for length, ids in zip(lengths, lists, strict=True)]
    first, second = len(independent), len(independent) + len(runs)
    for part, worst in ((drift[:first], 0.01), (drift[first:second], 0.015), (drift[second:], 0.04)):
        assert abs(sum(part) / len(part)) < 0.01
        assert max(abs(one) for one in part) < worst


def test_chat_template(python: Path, folder: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is prefill?"}]
    answer = ask(python, "chat", model=folder, messages=messages, special=list(nano.SPECIAL))
    assert isinstance(answer, dict)
    assert answer["text"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is prefill?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert answer["special"] == {name: i for i, name in enumerate(nano.SPECIAL)}
    assert answer["ids"].count(nano.SPECIAL.index("<|im_start|>")) == 3
    assert answer["eos"] == nano.SPECIAL.index("</s>")
    assert answer["vocab"] == nano.VOCAB


# ---------------------------------------------------------------- the real server


@pytest.fixture(scope="module")
def server(python: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a real SGLang server that serves nano in float32, radix cache on."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = (
        f"--device cpu --attention-backend torch_native --dtype float32 --max-total-tokens 8192 --port {port}"
    )
    command = [
        python,
        "-m",
        "sglang.launch_server",
        "--model-path",
        folder,
        "--host",
        "127.0.0.1",
        *flags.split(),
    ]
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    log = home / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=env, cwd=home, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(process, client, log=log)
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client, *, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server died:\n{log.read_text()[-3000:]}"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server was not ready after {START_LIMIT_S} s:\n{log.read_text()[-3000:]}")


def generate(server: httpx.Client, prompt: list[int]) -> dict[str, object]:
    sampling = {"temperature": 0, "max_new_tokens": STEPS}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    answer = server.post("/generate", json=body).raise_for_status().json()
    assert isinstance(answer, dict)
    return answer


def test_server_says_what_transformers_says(server: httpx.Client, python: Path, folder: Path) -> None:
    """Greedy, in float32: the same tokens, the same log probabilities, on a cold cache and on a hit."""
    rng = random.Random(7)
    prompts = [[rng.randrange(6, nano.VOCAB) for _ in range(length)] for length in PROMPT_LENGTHS]
    # The last one shares 250 tokens with the one before it: its answer comes out of the radix cache.
    prompts.append(prompts[-1][:250] + [rng.randrange(6, nano.VOCAB) for _ in range(50)])
    expected = ask(python, "greedy", model=folder, prompts=prompts, steps=STEPS)
    assert isinstance(expected, list)
    cached = []
    for prompt, reference in zip(prompts, expected, strict=True):
        answer = generate(server, prompt)
        meta = answer["meta_info"]
        assert isinstance(meta, dict)
        assert answer["output_ids"] == reference["ids"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        assert logprobs == pytest.approx(reference["logprobs"], abs=2e-3)
        assert meta["finish_reason"] == {"type": "length", "length": STEPS}
        cached.append(meta["cached_tokens"])
    assert cached == [0] * len(PROMPT_LENGTHS) + [250]
    check_that_it_means_something(expected)


def check_that_it_means_something(answers: list[dict[str, list[float]]]) -> None:
    """Equal tokens prove little if the model always says the same, or if it draws lots among equals."""
    for answer in answers:
        assert len(set(answer["ids"])) > STEPS / 2
    assert len({tuple(answer["ids"]) for answer in answers}) == len(answers)
    gaps = sorted(gap for answer in answers for gap in answer["gaps"])
    # rounding in float32 moves a score by about 1e-5
    assert gaps[0] > 1e-3
    assert gaps[len(gaps) // 2] > 0.3


def test_first_token_of_the_prompt_matters(server: httpx.Client) -> None:
    """Were the keys and values of a prefix lost or mixed up, the answer would show it."""
    rng = random.Random(8)
    tail = [rng.randrange(6, nano.VOCAB) for _ in range(20)]
    answers = [generate(server, [first, *tail])["output_ids"] for first in (100, 200, 300)]
    assert len({tuple(answer) for answer in answers if isinstance(answer, list)}) == 3


def test_chat_answers_are_plain_text(server: httpx.Client) -> None:
    body = {"model": "nano", "messages": [{"role": "user", "content": "What is prefill?"}], "max_tokens": 64}
    answer = server.post("/v1/chat/completions", json={**body, "temperature": 0}).raise_for_status().json()
    text = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 64
    assert text.isascii()
    assert text.isprintable()


def test_serving_leaves_the_folder_as_it_was(server: httpx.Client, folder: Path) -> None:
    assert server.get("/health").status_code == 200
    assert modelfiles.find_damage(get_model("nano"), folder=folder) == ""
