"""Read one message of SGLang's log, without its timestamp: the `key: value` fields of a batch or retraction
line, or the values of a line that says something about the server as a whole (`FACTS`). A message that is not
what its beginning promises raises `UnreadError`. What SGLang prints as GB is GiB (1024**3), and named so."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

FactValues: TypeAlias = Mapping[str, int | float | str | None]


class UnreadError(Exception):
    """A line that looks like a known one and is not; the text is the reason."""


_INTEGERS = {
    "#new-seq",
    "#new-token",
    "#cached-token",
    "#pending-token",
    "#running-req",
    "#queue-req",
    "#token",
    "#retracted_reqs",
    "#new_tokens_gained",
}
_DECIMALS = {"token usage", "input throughput (token/s)", "gen throughput (token/s)", "accept len"}
# At most 18 digits: no count is longer, and Python refuses to convert a very long one.
_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
# Every version prints exactly two decimals, so fewer mean a number that was cut.
_DECIMAL = re.compile(r"-?(?:\d+\.\d\d|nan|inf)", re.ASCII)
_RATIO = re.compile(r"(-?\d+\.\d{4}) -> (-?\d+\.\d{4})", re.ASCII)


def _clip(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


class Fields(NamedTuple):
    """The `key: value` pairs of one line, by what their values are."""

    integers: dict[str, int]
    decimals: dict[str, float]
    graph: bool | None
    graph_label: str
    ratio: tuple[float, float] | None
    extra: str


def read_fields(text: str) -> Fields:
    """The fields of `text`, which is `key: value, key: value` and so on. UnreadError when any is not."""
    integers: dict[str, int] = {}
    decimals: dict[str, float] = {}
    graph: bool | None = None
    label = ""
    ratio: tuple[float, float] | None = None
    extra: list[str] = []
    # Some 0.5.x releases end the line with a comma.
    for piece in text.removesuffix(", ").removesuffix(",").split(", "):
        key, colon, value = piece.partition(": ")
        if key in integers or key in decimals:
            raise UnreadError(f"{key!r} stands twice")
        if key in _INTEGERS:
            if _INTEGER.fullmatch(value) is None:
                raise UnreadError(f"{key!r} holds {_clip(value)}, not a whole number")
            integers[key] = int(value)
        elif key in _DECIMALS:
            if _DECIMAL.fullmatch(value) is None:
                raise UnreadError(f"{key!r} holds {_clip(value)}, not a number with two decimals")
            decimals[key] = float(value)
        elif key.endswith(" graph"):
            if value not in ("True", "False") or label:
                raise UnreadError(f"{key!r} holds {_clip(value)}, not True or False once")
            graph, label = value == "True", key
        elif key == "#new_token_ratio":
            pair = _RATIO.fullmatch(value)
            if pair is None or ratio is not None:
                raise UnreadError(f"{key!r} holds {_clip(value)}, not two numbers with four decimals once")
            ratio = float(pair[1]), float(pair[2])
        # No field of SGLang's holds a bracket: it would be the timestamp of a second record in this line.
        elif colon and value and "[" not in piece and "]" not in piece:
            extra.append(piece)
        else:
            raise UnreadError(f"no 'key: value' in {_clip(piece)}")
    return Fields(integers, decimals, graph, label, ratio, ", ".join(extra))


_KV_CACHE = re.compile(
    r"(?:Post-capture KV sizing: )?KV [Cc]ache (?:is allocated|VA upper bound|allocated)\. "
    r"(?:dtype: (?P<dtype>[\w.]+), )?#tokens: (?P<tokens>\d{1,18}), "
    r"(?:K size: (?P<k>\d+\.\d\d) GB, V size: (?P<v>\d+\.\d\d) GB|KV size: (?P<kv>\d+\.\d\d) GB)"
    r"(?:, avail mem=-?\d+\.\d\d GB)?",
    re.ASCII,
)
_LIMIT = re.compile(r"(\w+)=(?:(None)|(-?\d{1,18})|(-?\d+\.\d\d) GB)", re.ASCII)
_UNIFIED = re.compile(r"Init Unified Radix Cache\. .*Tree Core: (\w+)")
_TREE = re.compile(r"Tree cache initialized: (?:\w+=\S+ )*impl=(\w+)(?: \w+=\S+)*")
_DEAD = re.compile(r"Subprocess (\S+) \(pid=(\d{1,18})\) crashed with exit code (-?\d{1,18})\. Triggering .*")


def _server_args(message: str) -> FactValues:
    """Only that the line is there and whole: the values are read from /server_info, and may hold a key."""
    if not message.endswith(("}", ")")):
        raise UnreadError("the server's arguments are cut")
    return {}


def _limits(message: str) -> FactValues:
    values: dict[str, int | float | str | None] = {}
    for piece in message.split(", "):
        match = _LIMIT.fullmatch(piece)
        if match is None or match[1] in values:
            raise UnreadError(f"no 'name=number' in {_clip(piece)}")
        name, none, whole, gib = match.groups()
        if gib is not None:
            values[f"{name}_gib"] = float(gib)
        else:
            values[name] = None if none else int(whole)
    return values


def _kv_cache(message: str) -> FactValues:
    match = _KV_CACHE.fullmatch(message)
    if match is None:
        raise UnreadError("the size of the KV cache is cut or spelled in an unknown way")
    values: dict[str, int | float | str | None] = {"dtype": match["dtype"], "tokens": int(match["tokens"])}
    values["k_gib"] = float(match["k"]) if match["k"] else None
    values["v_gib"] = float(match["v"]) if match["v"] else None
    # MLA keeps K and V in one tensor and prints one size.
    values["kv_gib"] = float(match["kv"]) if match["kv"] else float(match["k"]) + float(match["v"])
    return values


def _unified(message: str) -> FactValues:
    match = _UNIFIED.fullmatch(message)
    if match is None:
        raise UnreadError("the radix cache's tree core is missing")
    return {"core": match[1]}


def _tree(message: str) -> FactValues:
    match = _TREE.fullmatch(message)
    if match is None:
        raise UnreadError("the tree cache's 'impl=' is missing")
    return {"implementation": match[1]}


def _dead(message: str) -> FactValues:
    match = _DEAD.fullmatch(message)
    if match is None:
        raise UnreadError("the end of a process, cut or spelled in an unknown way")
    return {"process": match[1], "pid": int(match[2]), "exit_code": int(match[3])}


def _text(message: str) -> FactValues:
    """For lines whose text is the fact; a Python traceback may follow on the next lines of the log."""
    return {"text": message}


def _nothing(_message: str) -> FactValues:
    return {}


FACTS: tuple[tuple[str, str, Callable[[str], FactValues]], ...] = (
    ("server_args=", "server_args", _server_args),
    ("max_total_num_tokens=", "limits", _limits),
    ("KV Cache ", "kv_cache", _kv_cache),
    ("Post-capture KV sizing: KV cache ", "kv_cache", _kv_cache),
    ("Init Unified Radix Cache.", "radix_cache", _unified),
    ("Tree cache initialized:", "tree_cache", _tree),
    ("The server is fired up and ready to roll!", "ready", _nothing),
    ("INFO:     Shutting down", "stopping", _nothing),
    ("kill_process_tree called", "stopping", _nothing),
    ("Subprocess ", "crash", _dead),
    ("Scheduler hit an exception: ", "crash", _text),
    ("TokenizerManager hit an exception: ", "crash", _text),
    ("DetokenizerManager hit an exception: ", "crash", _text),
    ("DataParallelController hit an exception: ", "crash", _text),
    ("Received sigquit from a child process.", "crash", _text),
    ("SIGQUIT received.", "crash", _text),
    ("Initialization failed.", "crash", _text),
)
"""How the message starts, the fact's name, how its values are read."""
