"""What a test does when a part it needs is absent: skip with the reason, or fail under `--require-parts`."""

from __future__ import annotations

import pytest

REQUIRE_PARTS = False


def need(condition: bool, reason: str) -> None:
    """Skip the running test with `reason` unless `condition`; fail instead where parts are required."""
    if condition:
        return
    if REQUIRE_PARTS:
        pytest.fail(f"a required part is missing: {reason}")
    pytest.skip(reason)
