"""Fixtures for the tests of trisock.pluto."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Iterator

import pytest

from helpers.deadline import DEADLINE
from helpers.pluto import pluto_certificate
from trisock.pluto.blocking import background
from trisock.pluto.trio_thread import TrioThread
from trisock.testing import Authority


@pytest.fixture
def bounded(no_leaked_descriptor: None) -> Iterator[None]:
    """Limit a test's time, even inside a blocking call. Then stop the background thread."""

    def time_out(*_: object) -> None:
        raise TimeoutError("this test takes too long")

    before = signal.signal(signal.SIGALRM, time_out)
    # Repeat the signal: CPython can miss a signal that arrives just before a thread waits for a
    # lock. Send no signal before the deadline: at the end of a run, Trio closes its wakeup file
    # descriptor, and CPython could still write such a signal to it.
    signal.setitimer(signal.ITIMER_REAL, DEADLINE, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.collect()
        background.stop()


@pytest.fixture(scope="session")
def certs(authority: Authority) -> list[dict[str, str | bytes]]:
    return [pluto_certificate(authority.certificate())]


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that lists the failures that trisock.pluto has logged so far."""
    caplog.set_level(logging.INFO, "trisock.pluto")

    def logged() -> list[str]:
        records = [each for each in caplog.records if each.name == "trisock.pluto"]
        assert all(each.levelno == logging.INFO for each in records)
        return [each.getMessage() for each in records]

    return logged


@pytest.fixture
def own_thread() -> Iterator[TrioThread]:
    """A background thread for this test only."""
    thread = TrioThread()
    yield thread
    thread.stop()
