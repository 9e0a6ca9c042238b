"""runs/index.md: every run on one page. In go the folder of runs and the names of the experiments; out comes Markdown with
the success criteria, the newest run of each experiment, and whatever has no result, with the reason. Nothing depends on
the clock, and no run can break the page."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lab.criteria import BOXES, RULE, Box, decide
from lab.digest import Digest, read_digest
from lab.rundir import index_file, list_runs, write_text


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """All runs, newest first: the newest with a result of each experiment, the older ones, and those without a result."""

    newest: tuple[Digest, ...]
    older: tuple[Digest, ...]
    without: tuple[Digest, ...]


def write_index(root: Path, *, experiments: Collection[str]) -> Path:
    """Write the index of all runs below `root`, and return its path. `experiments` are those that could be run."""
    page = index_page([read_digest(run) for run in list_runs(root)], experiments=experiments)
    write_text(index_file(root), page)
    return index_file(root)


def index_page(digests: list[Digest], *, experiments: Collection[str], boxes: tuple[Box, ...] = BOXES) -> str:
    """The page, as text; links are relative to the folder of runs. `digests` are in order, oldest first."""
    found = sort(digests)
    by_name = {digest.experiment: digest for digest in found.newest}
    jinja = jinja2.Environment(  # noqa: S701  the output is Markdown, not HTML
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    jinja.filters["cell"] = _cell
    return jinja.get_template("index.md.j2").render(
        runs=len(digests),
        criteria=decide(by_name, boxes=boxes),
        rule=RULE,
        newest=found.newest,
        older=found.older,
        without=found.without,
        never=[name for name in sorted(experiments) if name not in by_name],
        newer_without={name: _newer_without(digest, found.without) for name, digest in by_name.items()},
    )


def sort(digests: list[Digest]) -> Sorted:
    """Put the digests, oldest first, into the page's three parts."""
    newest: dict[str, Digest] = {}
    older: list[Digest] = []
    without: list[Digest] = []
    for digest in reversed(digests):
        if digest.state != "reported":
            without.append(digest)
        elif digest.experiment in newest:
            older.append(digest)
        else:
            newest[digest.experiment] = digest
    return Sorted(newest=tuple(newest.values()), older=tuple(older), without=tuple(without))


def _newer_without(digest: Digest, without: tuple[Digest, ...]) -> int:
    """How many runs of the same experiment began after this one and have no result."""
    return sum(other.experiment == digest.experiment and other.name > digest.name for other in without)


def _cell(text: object) -> str:
    """Text that may stand in a Markdown table cell or list."""
    return str(text).replace("|", "\\|").replace("\n", " ")
