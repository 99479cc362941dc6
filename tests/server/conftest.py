"""Fixtures for the tests of servers."""

from __future__ import annotations

import logging

import pytest
import trio.testing


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """An autojump clock that jumps only after bytes in flight have had time to arrive."""
    return trio.testing.MockClock(autojump_threshold=0.05)
