"""Fixtures for the tests of servers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio.testing

from helpers.services import Systemd, systemd


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """An autojump clock that jumps only after bytes in flight have had time to arrive."""
    return trio.testing.MockClock(autojump_threshold=0.05)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """systemd, for a service in this process."""
    with systemd(tmp_path / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        yield manager
