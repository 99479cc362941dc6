"""The fixtures of the tests of trisock.pluto."""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from helpers.authority import Authority
from helpers.deadline import DEADLINE
from helpers.pluto_kit import mapping
from trisock.pluto.blocking import background
from trisock.pluto.trio_thread import TrioThread


@pytest.fixture
def bounded(no_leaked_descriptor: None) -> Iterator[None]:
    """Bound a test, also one that blocks, and end its background thread."""

    end = time.monotonic() + DEADLINE

    def look_at_the_time(*_: object) -> None:
        if time.monotonic() > end:
            raise TimeoutError("this test takes too long")

    before = signal.signal(signal.SIGALRM, look_at_the_time)
    # Often, since CPython does not notice a signal that comes in the moment before it waits for a
    # lock until the wait ends: the next signal ends it.
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.collect()
        background.stop()


@pytest.fixture(scope="session")
def certs(authority: Authority) -> list[dict[str, str | bytes]]:
    return [mapping(authority.ca.issue_cert("localhost", "127.0.0.1"))]


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the reasons of failures that were logged so far."""
    caplog.set_level(logging.INFO, "trisock.pluto")

    def logged() -> list[str]:
        records = [each for each in caplog.records if each.name == "trisock.pluto"]
        assert all(each.levelno == logging.INFO for each in records)
        return [each.getMessage() for each in records]

    return logged


@pytest.fixture
def own() -> Iterator[TrioThread]:
    """A background thread of the test's own."""
    made = TrioThread()
    yield made
    made.stop()
