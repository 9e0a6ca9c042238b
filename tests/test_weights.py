"""Where a model's files come from: folders that are right and folders that are not, the Hugging Face cache, dummies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.dummymodel import SYLLABLES, config_text, dummy_files, dummy_sha256
from lab.errors import LabError
from lab.modelcheck import check_folder, fingerprint
from lab.modelfiles import with_python
from lab.models import CATALOGUE, Model, get_model
from lab.weights import Weights, container_folder, ensure_weights, hub_cache, locate, require, snapshots

SMALL = replace(
    get_model("llama-3.1-8b"),
    name="small-llama",
    hidden=64,
    intermediate=128,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=32_768,
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def safetensors(path: Path, name: str = "x") -> None:
    """A file of the format with one tensor of 16 bytes."""
    header = json.dumps({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder as the hub has it, two shards, for SMALL."""
    return put_model(tmp_path / "whole")


def put_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = json.loads(config_text(SMALL))
    config |= {"bos_token_id": 128_000, "eos_token_id": [128_001, 128_009], "transformers_version": "4.42.3"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    for name in SHARDS:
        safetensors(folder / name)
    index = {"metadata": {"total_size": 32}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refusal(folder: Path) -> LabError:
    with pytest.raises(LabError) as caught:
        check_folder(SMALL, folder=folder)
    return caught.value


# ---- a folder that somebody names


def test_a_whole_folder_passes(whole: Path) -> None:
    check_folder(SMALL, folder=whole)
    for name in (*SHARDS, "model.safetensors.index.json"):
        (whole / name).unlink()
    safetensors(whole / "model.safetensors")
    check_folder(SMALL, folder=whole)


def edit(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))

    return change


def cut(name: str, *, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (cut("config.json", by=20), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json holds no JSON object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json is no JSON"),
        (edit(hidden_size=128), "hidden_size is 128, expected 64"),
        (edit(num_hidden_layers=2), "num_hidden_layers is 2, expected 1"),
        (edit(vocab_size="gone"), "vocab_size is None, expected 32768"),
        (edit(num_key_value_heads="two"), "num_key_value_heads is 'two', expected 2"),
        (edit(num_attention_heads=0, head_dim="gone"), "num_attention_heads is 0, expected 4"),
        (edit(model_type="qwen2"), "model_type is 'qwen2', expected 'llama'"),
        (edit(architectures=["LlamaForSequenceClassification"]), "architectures is ['LlamaForSequence"),
        (edit(tie_word_embeddings=True), "tie_word_embeddings is True, expected False"),
        (edit(torch_dtype="float16"), "torch_dtype is 'float16', expected 'bfloat16'"),
        (edit(rope_scaling=None), "factor is None, expected 8.0"),
        (
            edit(quantization_config={"bits": 4}),
            "quantization_config; the catalogue's model is not quantised",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "it has no tokenizer (tokenizer.json or tokenizer.model)",
        ),
        (lambda f: (f / "tokenizer_config.json").unlink(), "it has no tokenizer_config.json"),
        (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]} is missing, which model.safetensors.index.json"),
        (cut(SHARDS[0], by=1), f"{SHARDS[0]} has "),
        (cut(SHARDS[0], by=30), f"{SHARDS[0]} has a header that cannot be read"),
        (lambda f: (f / SHARDS[0]).write_bytes(b""), f"{SHARDS[0]} has a header that cannot be read"),
        (lambda f: (f / SHARDS[0]).write_bytes(b"\xff" * 64), f"{SHARDS[0]} has a header that cannot be"),
        (cut("model.safetensors.index.json", by=5), "model.safetensors.index.json is no JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json names no files"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "it has no weights (model.safetensors or"),
    ],
)
def test_what_is_wrong_is_named(whole: Path, harm: Callable[[Path], None], word: str) -> None:
    harm(whole)
    error = refusal(whole)
    assert f"{whole} is not the model 'small-llama'" in error.problem
    assert word in error.why
    assert "--weights dummy" in error.fix


def test_no_folder(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "none").why


def test_a_config_of_transformers_5_and_one_without_head_dim(whole: Path) -> None:
    """The rotary embedding stands below rope_parameters there, the precision is called dtype."""
    config = json.loads((whole / "config.json").read_text())
    rope = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    config |= {"rope_parameters": rope, "dtype": config.pop("torch_dtype")}
    del config["head_dim"], config["tie_word_embeddings"]
    (whole / "config.json").write_text(json.dumps(config))
    check_folder(SMALL, folder=whole)


def test_copies_are_told_apart_without_reading_them_whole(whole: Path) -> None:
    before = fingerprint(whole)
    assert len(before) == 64
    edit(eos_token_id=1)(whole)
    assert fingerprint(whole) != before
    assert fingerprint(whole / "none") == ""


# ---- --weights


def in_cache(tmp_path: Path, *, revision: str = SMALL.revision, links: bool = True) -> Path:
    """SMALL in a Hugging Face cache below tmp_path/hub, with links to blobs as its own tools make it."""
    folder = snapshots(SMALL, hub=tmp_path / "hub") / revision
    put_model(folder)
    if links:
        blobs = folder.parent.parent / "blobs"
        blobs.mkdir()
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(blobs / str(number))
            file.symlink_to(Path("../../blobs") / str(number))
    return folder


def located(model: Model, asked: str, tmp_path: Path) -> Weights:
    return locate(model, asked=asked, cache=tmp_path / "cache", hub=tmp_path / "hub")


@pytest.mark.parametrize(
    ("env", "where"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ],
)
def test_the_cache_is_where_its_own_tools_have_it(env: dict[str, str], where: str) -> None:
    assert str(hub_cache(env)) == where


@pytest.mark.parametrize("asked", ["", "cache"])
def test_the_cache_is_used_when_it_has_the_model(asked: str, tmp_path: Path) -> None:
    folder = in_cache(tmp_path)
    found = located(SMALL, asked, tmp_path)
    assert (found.kind, found.folder) == ("cache", folder)
    assert len(found.sha256) == 64
    require(SMALL, found)


def test_a_gated_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabError) as caught:
        require(SMALL, located(SMALL, "", tmp_path))
    assert "are not in the Hugging Face cache" in caught.value.problem
    assert "it is gated, so its owner must give your account access first" in caught.value.why
    assert "the lab downloads no weights by itself" in caught.value.why
    assert f"hf download {SMALL.repository} --revision {SMALL.revision}" in caught.value.fix
    assert "hf auth login" in caught.value.fix
    assert "--weights dummy" in caught.value.fix


def test_an_open_model_that_is_not_there(tmp_path: Path) -> None:
    model = get_model("qwen2.5-7b")
    with pytest.raises(LabError) as caught:
        require(model, located(model, "", tmp_path))
    assert "gated" not in caught.value.why
    assert "login" not in caught.value.fix


def test_the_page_was_seen_but_the_weights_were_not_given(tmp_path: Path) -> None:
    """What a refused download leaves: the model's folder in the cache, without the revision's files."""
    (snapshots(SMALL, hub=tmp_path / "hub") / SMALL.revision).mkdir(parents=True)
    with pytest.raises(LabError, match="not in the Hugging Face cache"):
        require(SMALL, located(SMALL, "", tmp_path))


def test_a_download_that_was_cut(tmp_path: Path) -> None:
    folder = in_cache(tmp_path)
    (folder / SHARDS[1]).resolve().unlink()
    with pytest.raises(LabError) as caught:
        require(SMALL, located(SMALL, "", tmp_path))
    assert f"{SHARDS[1]} is missing" in caught.value.why


def test_another_revision(tmp_path: Path) -> None:
    other = in_cache(tmp_path, revision="0123456789" * 4)
    with pytest.raises(LabError) as caught:
        require(SMALL, located(SMALL, "", tmp_path))
    assert "in another revision only" in caught.value.problem
    assert f"--weights {other}" in caught.value.fix
    require(SMALL, located(SMALL, str(other), tmp_path))
    unpinned = replace(SMALL, revision="")
    (other.parent.parent / "refs").mkdir()
    (other.parent.parent / "refs" / "main").write_text(f"{'0123456789' * 4}\n")
    require(unpinned, located(unpinned, "", tmp_path))


def test_a_folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = located(SMALL, "whole", tmp_path)
    assert (found.kind, found.folder) == ("local", whole)
    require(SMALL, found)
    with pytest.raises(LabError, match="is not the model"):
        require(SMALL, located(SMALL, "hole", tmp_path))


def test_nano_has_its_own(tmp_path: Path) -> None:
    found = located(get_model("nano"), "", tmp_path)
    assert (found.kind, found.sha256) == ("built", get_model("nano").sha256)
    with pytest.raises(LabError, match="has no other weights than its own"):
        located(get_model("nano"), "dummy", tmp_path)


def test_a_container_gets_the_files_and_not_the_links(tmp_path: Path) -> None:
    folder = in_cache(tmp_path)
    found = located(SMALL, "", tmp_path)
    seen = container_folder(SMALL, found, cache=tmp_path / "cache")
    assert seen != folder
    assert not any(file.is_symlink() for file in seen.iterdir())
    assert (seen / SHARDS[0]).samefile(folder / SHARDS[0])  # no second copy of the weights
    check_folder(SMALL, folder=seen)
    assert container_folder(SMALL, found, cache=tmp_path / "cache") == seen
    plain = replace(found, kind="local", folder=put_model(tmp_path / "plain"))
    assert container_folder(SMALL, plain, cache=tmp_path / "cache") == plain.folder


# ---- dummies


@pytest.fixture(scope="module")
def nano_text(nano: Path) -> str:
    return (nano / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name, model in CATALOGUE.items() if model.source == "hub"])
def test_dummies_are_the_same_every_time_and_cover_the_vocabulary(name: str, nano_text: str) -> None:
    model = get_model(name)
    files = dummy_files(model, nano_tokenizer=nano_text)
    assert files == dummy_files(model, nano_tokenizer=nano_text)
    assert json.loads(files["config.json"])["vocab_size"] == model.vocab
    vocab = json.loads(files["tokenizer.json"])["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(model.vocab))
    texts = [token.replace("\u0120", " ") for token in vocab]
    assert all(text.isascii() and text.isprintable() for text in texts)


def test_a_dummy_has_the_shapes_of_the_real_folder() -> None:
    """What a config.json of the real one is held against passes for the dummy's, but for the tokens that end a text."""
    for model in CATALOGUE.values():
        config = json.loads(config_text(model))
        assert config["architectures"] == [model.architecture]
        assert (config["num_key_value_heads"], config["head_dim"]) == (model.kv_heads, model.head_dim)
    assert json.loads(config_text(get_model("llama-3.1-8b")))["rope_scaling"]["rope_type"] == "llama3"


def test_the_sum_of_a_dummy_is_known_before_it_is_made(tmp_path: Path, nano: Path) -> None:
    found = located(SMALL, "dummy", tmp_path)
    assert found.sha256 == dummy_sha256(SMALL)
    assert dummy_sha256(replace(SMALL, layers=2)) != found.sha256
    assert not found.folder.exists()


def test_a_dummy_is_written_once_and_mended(tmp_path: Path, nano: Path) -> None:
    found = located(SMALL, "dummy", tmp_path)
    (tmp_path / "cache/models").mkdir(parents=True)
    (tmp_path / "cache/models" / nano.name).symlink_to(nano)
    said: list[str] = []

    def ensure() -> Path:
        python = with_python(Path(sys.executable))
        return ensure_weights(SMALL, found, cache=tmp_path / "cache", builder=python, say=said.append)

    folder = ensure()
    assert ensure() == folder
    assert said == [f"writing {folder.name}: shapes and tokenizer, no weights"]
    assert not list(folder.glob("*.safetensors"))
    (folder / "config.json").write_text("{")
    ensure()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_vocabulary_that_cannot_be_filled(nano_text: str) -> None:
    with pytest.raises(ValueError, match="smaller than"):
        dummy_files(replace(SMALL, vocab=5000), nano_tokenizer=nano_text)
    with pytest.raises(ValueError, match="words for"):
        dummy_files(replace(SMALL, vocab=len(SYLLABLES) ** 3 + 20_000), nano_tokenizer=nano_text)


ROUND_TRIP = """
import json, random, sys
from transformers import AutoTokenizer
folder, vocab = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(vocab)]
draw = random.Random(1)
changes = []
for _ in range(40):
    first = draw.randrange(vocab)
    ids = [(first + k) % vocab for k in range(512)]
    changes.append(len(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)) / 512 - 1)
print(json.dumps({
    "length": len(tokenizer),
    "odd": [i for i, t in enumerate(texts) if not (t and t.isascii() and t.isprintable())],
    "worst": max(map(abs, changes)),
}))
"""


@pytest.mark.parametrize("stack", ["cpu", "cpu046"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "mistral-7b"])
def test_the_real_tokenizer_prints_every_token_and_keeps_lengths(
    name: str, stack: str, nano_text: str, tmp_path: Path
) -> None:
    """As the server and bench_serving load it, with the transformers of each stack."""
    from realstack import real_stack

    model = get_model(name)
    for file, content in dummy_files(model, nano_tokenizer=nano_text).items():
        (tmp_path / file).write_bytes(content)
    _, folder = real_stack(stack)
    argv = [str(folder / "bin" / "python"), "-c", ROUND_TRIP, str(tmp_path), str(model.vocab)]
    env = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["length"] == model.vocab
    assert said["odd"] == [2]  # the end of a text
    assert said["worst"] < 0.05
