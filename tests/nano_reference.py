"""Answers questions about a model folder with `transformers`, in the interpreter of a stack: a JSON object on
standard input (`model` and the inputs of the question named in `argv[1]`), a JSON value on standard
output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable


def greedy(question: dict) -> list[dict]:
    """Greedy continuation of each prompt by `steps` tokens in float32: ids, log probabilities, and the gap to
    the runner-up.

    Each step is a full forward pass without any cache, so nothing of a server's way of working is in it.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(
        question["model"], dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    answers = []
    with torch.no_grad():
        for prompt in question["prompts"]:
            ids = list(prompt)
            answer = {"ids": [], "logprobs": [], "gaps": []}
            for _ in range(question["steps"]):
                scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
                best = torch.topk(scores, 2)
                ids.append(int(best.indices[0]))
                answer["ids"].append(ids[-1])
                answer["logprobs"].append(float(best.values[0]))
                answer["gaps"].append(float(best.values[0] - best.values[1]))
            answers.append(answer)
    return answers


def there_and_back(question: dict) -> list[dict]:
    """Each of `texts` encoded, and decoded again."""
    tokenizer = load_tokenizer(question)
    ids = [tokenizer.encode(text) for text in question["texts"]]
    return [{"ids": one, "text": tokenizer.decode(one)} for one in ids]


def as_text_again(question: dict) -> list[dict]:
    """Each of the id lists `ids` decoded and encoded again: other ids may spell the same text."""
    tokenizer = load_tokenizer(question)
    return [{"ids": tokenizer.encode(tokenizer.decode(ids))} for ids in question["ids"]]


def back_and_there(question: dict) -> list[int]:
    """How many tokens each of the id lists `ids` has after decoding and encoding, as a load generator does
    it."""
    tokenizer = load_tokenizer(question)
    return [len(tokenizer.encode(tokenizer.decode(one))) for one in question["ids"]]


def chat(question: dict) -> dict:
    """The chat template applied to `messages`: the text, its ids, and the tokenizer's special tokens."""
    tokenizer = load_tokenizer(question)
    text = tokenizer.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True)
    return {
        "text": text,
        "ids": tokenizer.encode(text),
        "special": {name: tokenizer.convert_tokens_to_ids(name) for name in question["special"]},
        "eos": tokenizer.eos_token_id,
        "vocab": len(tokenizer),
    }


def load_tokenizer(question: dict):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(question["model"])


QUESTIONS: dict[str, Callable[[dict], object]] = {
    function.__name__: function for function in (greedy, there_and_back, as_text_again, back_and_there, chat)
}

if __name__ == "__main__":
    answer = QUESTIONS[sys.argv[1]](json.load(sys.stdin))
    json.dump(answer, sys.stdout)
