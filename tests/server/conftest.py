"""Fixtures for the tests of servers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio.testing

from helpers.services import Systemd, systemd
from helpers.stopping import lock_filter
from trisock import Listener


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
    """A stand-in for systemd that supervises a service in this process."""
    with systemd(tmp_path / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        yield manager


@pytest.fixture(params=["filter", "full backlog"])
def prepare(request: pytest.FixtureRequest) -> Callable[[Listener], None]:
    """Make a stopping server keep out new clients with a filter, or with a full backlog."""
    if request.param == "full backlog":
        return lock_filter
    if os.geteuid() != 0:
        pytest.skip("attaching a filter may need root")
    return lambda listener: None
