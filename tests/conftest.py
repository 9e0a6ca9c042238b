"""Shared fixtures, the `--require-parts` switch, and `--update-golden`, which writes tests/golden/ anew."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "lab" / "probe"))  # as PYTHONPATH does for a server

import parts

settings.register_profile("lab", deadline=None)  # no test asserts a wall time
settings.load_profile("lab")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-parts",
        action="store_true",
        help="a missing part (SGLang stack, ...) is a failure, not a skip",
    )
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the files of tests/golden/ from what the code makes now; read the diff before committing",
    )


def pytest_configure(config: pytest.Config) -> None:
    parts.REQUIRE_PARTS = bool(config.getoption("--require-parts"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name in tests/golden/, or write it there with `--update-golden`."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), (
            f"{name} changed; if that is right: pytest --update-golden"
        )

    return compare


@pytest.fixture(scope="session")
def stack_dir() -> Path:
    """The built `cpu` stack in the user's cache; built on first use, as a user's first run does."""
    from lab import places
    from lab.errors import LabError
    from lab.stack import load_stack
    from lab.stacks.build import ensure

    try:
        return ensure(load_stack("cpu", root=places.ROOT), cache=places.cache(), say=print)
    except LabError as error:
        parts.need(False, f"the cpu stack: {error}")
        raise


@pytest.fixture(scope="session")
def stack_python(stack_dir: Path) -> Path:
    """The interpreter of the `cpu` stack."""
    return stack_dir / "bin" / "python"


@pytest.fixture(scope="session")
def nano(stack_python: Path) -> Path:
    """The `nano` model in the user's cache."""
    from lab import places
    from lab.modelfiles import ensure_model, with_python
    from lab.models import get_model

    return ensure_model(get_model("nano"), cache=places.cache(), builder=with_python(stack_python), say=print)
