"""The fixtures of the tests of hs.socket's objects."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.hammerspoon_kit import Calls
from trisock import hammerspoon
from trisock.hammerspoon import Sockets


@pytest.fixture
async def hs() -> AsyncIterator[Sockets]:
    async with hammerspoon.open_sockets() as hs:
        yield hs


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "trisock.hammerspoon")
    return caplog


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """A clock that jumps when nothing is left to do; the rest leaves loopback some time."""
    return trio.testing.MockClock(autojump_threshold=0.05)
