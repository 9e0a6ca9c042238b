"""Shared fixtures and the `--require-parts` switch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import parts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-parts",
        action="store_true",
        help="a missing part (SGLang stack, ...) is a failure, not a skip",
    )


def pytest_configure(config: pytest.Config) -> None:
    parts.REQUIRE_PARTS = bool(config.getoption("--require-parts"))
