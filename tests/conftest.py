"""Hooks, and the fixtures of all tests: certificates, a deadline, no descriptor left open."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

pytest.register_assert_rewrite("helpers")  # an assert in there tells as much as one in a test

from helpers.authority import Authority
from helpers.deadline import DEADLINE
from trisock import ClientTLS, ServerTLS
from trisock.pluto.blocking import background

# May be missing also with --all-programs: Debian installs this one or proftpd, not both.
OPTIONAL = {"vsftpd"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-programs",
        action="store_true",
        help="a test whose programs are not installed fails instead of being skipped",
    )
    parser.addoption(
        "--times",
        type=int,
        default=1,
        help="do so many times as much in the tests that try what chance brings",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip (or fail) a test marked ``needs(program, ...)`` where such a program is missing."""
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if shutil.which(program) is None:
                wanted = item.config.getoption("--all-programs") and program not in OPTIONAL
                give_up = pytest.fail if wanted else pytest.skip
                give_up(f"the program {program} is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound each async test from inside: a fixture's deadline does not bound the test."""
    for item in items:
        function = getattr(item, "obj", None)
        if function is not None and _is_async(function):
            item.obj = _bounded(function)  # type: ignore[attr-defined]


def pytest_configure() -> None:
    """Have Ctrl-C work, and servers found, here and in what tests start."""
    # A shell's background jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Debian keeps servers where only root's path looks.
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collection before and after each test."""
    gc.collect()
    gc.freeze()


def _is_async(function: object) -> bool:
    import inspect

    return inspect.iscoroutinefunction(function)


def _bounded(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    import functools

    @functools.wraps(function)
    async def bounded(**kwargs: object) -> None:
        with trio.fail_after(DEADLINE):
            await function(**kwargs)

    return bounded


@pytest.fixture(autouse=True)
def no_leaked_descriptor() -> Iterator[None]:
    """Fail a test that leaves a descriptor open."""
    gc.collect()
    before = _sockets()
    yield
    background.stop()  # the thread of trisock.pluto
    gc.collect()
    left = _sockets() - before
    assert not left, f"left open: {left}"


def _sockets() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if "anon_inode" not in target:
                found.add(f"{number} {target}")
    return found


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def other_authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def server_tls(authority: Authority) -> ServerTLS:
    return ServerTLS(authority.issue("localhost", "example.org", "127.0.0.1", "::1"))


@pytest.fixture(scope="session")
def client_tls(authority: Authority) -> ClientTLS:
    return ClientTLS("example.org", ca=authority.pem)


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    """How many times as much to try as in a usual run (``--times``)."""
    number: int = request.config.getoption("--times")
    return number


@pytest.fixture
def pem(authority: Authority, tmp_path: Path) -> Path:
    """A directory with ca.pem, and a server's chain.pem and key.pem (readable by its owner)."""
    good = authority.issue("localhost", "127.0.0.1")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "chain.pem").write_bytes(good._chain)
    (tmp_path / "key.pem").touch(mode=0o600)
    (tmp_path / "key.pem").write_bytes(good._private_key)
    return tmp_path


@pytest.fixture
def trusted(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tests' authority in the system's trust store, as far as this process sees it."""
    path = tmp_path / "trusted.pem"
    path.write_bytes(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
