"""Questions that share a system prompt, asked one after the other with SGLang's own frontend language.

This is the program of the lab's plan, run for real: `sgl.function`, a RuntimeEndpoint, `max_tokens` of
answer. One JSON line a request goes to --output-file: what the client saw (time to first token, times
between stream events) and what the server said of the request (prompt and cached tokens).
Run it with the stack's interpreter: `python chat.py --url http://127.0.0.1:PORT ...`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sglang as sgl


@sgl.function
def chat(s, system, question, max_tokens):
    s += sgl.system(system)
    s += sgl.user(question)
    # The model is asked for the full length, so that every request does the same work.
    s += sgl.assistant(sgl.gen("answer", max_tokens=max_tokens, temperature=0, ignore_eos=True))


def ask(order, question, *, system, max_tokens):
    """One request; seconds from just before it is sent. `itls_s` are gaps between stream events."""
    sent = time.time()
    start = last = time.perf_counter()
    ttft, gaps = None, []
    state = chat.run(system=system, question=question, max_tokens=max_tokens, stream=True)
    for _ in state.text_iter("answer"):
        now = time.perf_counter()
        if ttft is None:
            ttft = now - start
        else:
            gaps.append(now - last)
        last = now
    error = state.error()
    meta = state.get_meta_info("answer") or {}
    return {
        "order": order,
        "question": question,
        "rid": meta.get("id"),
        "sent": sent,
        "ttft_s": ttft,
        "e2e_s": last - start,
        "itls_s": gaps,
        "prompt_tokens": meta.get("prompt_tokens"),
        "cached_tokens": meta.get("cached_tokens"),
        "completion_tokens": meta.get("completion_tokens"),
        "error": "" if error is None else repr(error),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--system-file", type=Path, required=True)
    parser.add_argument("--system-chars", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--output-file", type=Path, required=True)
    parser.add_argument("--question", action="append", required=True)
    args = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url))
    system = args.system_file.read_text(encoding="utf-8")[: args.system_chars]
    failed = False
    with args.output_file.open("w", encoding="utf-8") as out:
        for order, question in enumerate(args.question):
            row = ask(order, question, system=system, max_tokens=args.max_tokens)
            out.write(json.dumps(row) + "\n")
            failed |= bool(row["error"])
            print(
                f"{order} {question!r} prompt {row['prompt_tokens']} cached {row['cached_tokens']} "
                f"ttft {1000 * (row['ttft_s'] or 0):.1f} ms {row['error']}"
            )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
