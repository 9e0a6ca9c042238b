"""What the lab adds to a trial for its two containers, beside plain `docker run --rm` of the same two; limit: 1 s."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dockerbench import Bench
from dockerparts import base_image, docker

from lab.boxes import Folders, Names, container
from lab.container import PORT, Container, run_words
from lab.plan import Process
from lab.runtime.docker import DockerRuntime, caller
from lab.runtime.engine import connect

TIMES = 10
SLEEP = ("sleep", "600")


def by_the_lab(bench: Bench, rt: DockerRuntime) -> None:
    """Server and client as in a trial, with nothing to do."""
    rt.values(trial=bench.folder / "trial", scratch=bench.folder / "scratch", port=0)
    server = rt.start(bench.command(*SLEEP, port=PORT))
    client = rt.start(bench.command(*SLEEP, name="client"))
    rt.port_of(server)
    rt.stop(client)
    rt.stop(server)


def box(bench: Bench, name: str, *, network: str, publish: int | None) -> Container:
    return container(
        name,
        Process(argv=SLEEP if publish is not None else ("true",), env=(("PATH", "/bin:/usr/bin"),), cpus=()),
        setup=bench.setup,
        names=Names(run_id=bench.run_id),
        folders=Folders(trial=str(bench.folder / "trial"), scratch=str(bench.folder / "scratch")),
        network=network,
        user=caller(),
        log=f"{name}.log",
        publish=publish,
    )


def by_the_same_words(bench: Bench) -> None:
    """The same two with all their options, by the docker client alone."""
    server = box(bench, "plain-server", network=bench.prefix, publish=0)
    client = box(bench, "plain-client", network=f"container:{server.name}", publish=None)
    docker("run", "--rm", "--detach", *(word for option in run_words(server) for word in option))
    docker("run", "--rm", *(word for option in run_words(client) for word in option))
    docker("port", server.name)
    docker("kill", "--signal", "SIGINT", server.name)
    while docker("ps", "--all", "--quiet", "--filter", f"name={server.name}").stdout:
        time.sleep(0.02)


def barest(bench: Bench) -> None:
    """Two containers without any option."""
    for _ in range(2):
        docker("run", "--rm", bench.setup.image, "true")


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), connect(), image=base_image(), docker=docker)
        taken: dict[str, list[float]] = {"lab": [], "same words": [], "barest": []}
        begin = time.perf_counter()
        with bench.runtime() as rt:
            opened = time.perf_counter() - begin
            for _ in range(TIMES):  # in turn, so that whatever else the machine does meets all of them
                taken["lab"].append(seconds(lambda: by_the_lab(bench, rt)))
                taken["same words"].append(seconds(lambda: by_the_same_words(bench)))
                taken["barest"].append(seconds(lambda: barest(bench)))
            begin = time.perf_counter()
        closed = time.perf_counter() - begin
        bench.check_nothing_left()
    middle = {name: median(values) for name, values in taken.items()}
    print(f"two containers, {TIMES} times, median:")
    print(f"  by the lab, started and stopped:            {middle['lab']:.2f} s")
    for name, words in (
        ("same words", "docker run with the same options"),
        ("barest", "docker run --rm, no option"),
    ):
        added, ratio = middle["lab"] - middle[name], middle["lab"] / middle[name]
        print(f"  {words + ':':43} {middle[name]:.2f} s; the lab adds {added:+.2f} s, {ratio:.2f} times")
    print(f"once a run: network and volumes made {opened:.2f} s, removed {closed:.2f} s")
    assert middle["lab"] - middle["barest"] < 1, "the lab adds more than 1 s to a trial"


if __name__ == "__main__":
    main()
