"""Sites: what a TOML file may say, and what is detected where it says nothing."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from lab import places
from lab.errors import LabError
from lab.site import Site, detect, load_site, site_names


def load(tmp_path: Path, text: str) -> Site:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return load_site(str(file), folder=places.SITES)


def refused(tmp_path: Path, text: str) -> LabError:
    with pytest.raises(LabError) as caught:
        load(tmp_path, text)
    assert caught.value.why
    assert caught.value.fix
    return caught.value


def test_the_sites_that_come_with_the_lab_can_be_read() -> None:
    assert "local" in site_names(places.SITES)
    for name in site_names(places.SITES):
        assert load_site(name, folder=places.SITES).name == name


def test_unknown_site_lists_the_known_ones() -> None:
    with pytest.raises(LabError, match="unknown site 'loca'") as caught:
        load_site("loca", folder=places.SITES)
    assert "local" in caught.value.why
    assert "did you mean 'local'" in caught.value.fix


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="there is no site file"):
        load_site(str(tmp_path / "none.toml"), folder=places.SITES)


def test_a_whole_file(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    site = load(
        tmp_path,
        f'name = "box"\nruntime = "process"\nscheduler = "here"\ncapabilities = ["gpu"]\n'
        f'server_cpus = [{cpu}]\nserver_mems = [0]\ngpus = [0, "GPU-7"]\nshm_gb = 2\n'
        "port = 31000\nready_s = 60\nload_s = 30.5\nstop_s = 5\n",
    )
    assert (site.name, site.port, site.ready_s, site.load_s, site.stop_s) == ("box", 31000, 60, 30.5, 5)
    assert site.capabilities == ("gpu",)
    assert (site.server_cpus, site.client_cpus, site.server_mems) == ((cpu,), (), (0,))
    assert (site.gpus, site.shm_gb, site.memory_gb) == (("0", "GPU-7"), 2, None)
    assert site.reasons == ("CPUs as the site's file says",)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("prot = 1", "unknown key in mine.toml: 'prot'"),
        ("[needs]\ngpu = true", "unknown key in mine.toml: 'needs'"),
        ('reasons = ["none"]', "unknown key in mine.toml: 'reasons'"),
        ('port = "31000"', "port = '31000'"),
        ("port = 70000", "port = 70000"),
        ("port = -1", "port = -1"),
        ("port = 1.5", "port = 1.5"),
        ("port = true", "port = True"),
        ("ready_s = -3", "ready_s = -3"),
        ("ready_s = 0", "ready_s = 0"),
        ("ready_s = nan", "ready_s = nan"),
        ("load_s = inf", "load_s = inf"),
        ("load_s = 1e9", "load_s = 1000000000.0"),
        ("stop_s = true", "stop_s = True"),
        ("server_cpus = 3", "server_cpus = 3"),
        ("server_cpus = [-1]", "server_cpus = [-1]"),
        ('server_cpus = ["0-3"]', "server_cpus = ['0-3']"),
        ("server_cpus = [4095]", "asks for CPUs [4095]"),
        ("client_cpus = [4095]", "asks for CPUs [4095]"),
        ('capabilities = "gpu"', "capabilities = 'gpu'"),
        ('capabilities = ["gpus"]', "unknown capability 'gpus'"),
        ('runtime = "podman"', "unknown runtime 'podman'"),
        ('scheduler = ""', "scheduler = ''"),
        ("ready_s = ", "mine.toml is not valid TOML"),
    ],
)
def test_what_a_site_may_not_say(tmp_path: Path, line: str, problem: str) -> None:
    assert problem in refused(tmp_path, f'name = "mine"\n{line}\n').problem


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "mine"\nprot = 1\n')
    assert all(f.name in error.why for f in fields(Site) if f.name != "reasons")
    assert "did you mean 'port'" in error.fix


def test_a_site_needs_a_name(tmp_path: Path) -> None:
    assert "no key 'name'" in refused(tmp_path, "port = 0\n").problem


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabError, match="not valid TOML"):
        load_site(str(tmp_path / "mine.toml"), folder=places.SITES)


def test_cpus_given_are_taken_as_they_are() -> None:
    site = detect(Site(name="x", server_cpus=(1,)), cpus=(0, 1, 2, 3))
    assert (site.server_cpus, site.client_cpus) == ((1,), ())


def test_server_and_client_do_not_share_a_cpu() -> None:
    with pytest.raises(LabError, match=r"gives CPUs \[1\] to both server and client"):
        detect(Site(name="x", server_cpus=(0, 1), client_cpus=(1,)), cpus=(0, 1, 2, 3))
