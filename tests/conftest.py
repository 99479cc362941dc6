"""Hooks and fixtures for all tests: certificates, a deadline, a check for open descriptors."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path

import pytest
import trio

# Cache the tests' bytecode even with PYTHONDONTWRITEBYTECODE: compiling all tests takes 6 s in each
# worker. The programs that tests start find trisock compiled, too.
sys.dont_write_bytecode = False

pytest.register_assert_rewrite("helpers")  # makes failed asserts in helpers show values

from helpers.deadline import DEADLINE
from helpers.pluto import background_threads
from trisock import ClientTLS, ServerTLS, Socket
from trisock.pluto.blocking import background
from trisock.testing import Authority

# These may be missing even with --all-programs: Debian does not install vsftpd beside ProFTPD, Exim
# beside Postfix, and Cyrus beside Dovecot.
OPTIONAL = {"vsftpd", "exim4", "cyrmaster"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-programs",
        action="store_true",
        help="fail a test whose programs are not installed, instead of skipping it",
    )
    parser.addoption(
        "--times",
        type=int,
        default=1,
        help="multiply the rounds of randomized tests by this number",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip (or fail) a test marked ``needs(program, ...)`` if one of the programs is missing."""
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if shutil.which(program) is None:
                required = item.config.getoption("--all-programs") and program not in OPTIONAL
                fail_or_skip = pytest.fail if required else pytest.skip
                fail_or_skip(f"the program {program} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Start the workers at different files, so that each compiles only some of the tests."""
    report = yield
    if isinstance(collector, pytest.Dir) and report.passed:
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        first = len(report.result) * worker // workers
        report.result = report.result[first:] + report.result[:first]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the randomized tests. Give each async test a deadline, which a fixture cannot do."""
    items.sort(key=lambda item: item.path)  # all workers must have the same order
    for item in items:
        if "times" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.chance)
        function = getattr(item, "obj", None)
        if function is not None and _is_async(function):
            item.obj = _bounded(function)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Run one worker more than there are cores, because tests wait for much of their time."""
    return (yield) + 1


def pytest_configure() -> None:
    """Enable Ctrl-C and extend PATH, also for the programs that tests start."""
    # A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Debian installs servers in directories that only root has on its PATH.
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    # Python's development mode checks each block of memory. These checks are slow, and only
    # extensions in C need them.
    os.environ["PYTHONMALLOC"] = "default"


def pytest_collection_finish() -> None:
    """Exclude imported modules from the garbage collection after each test."""
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
    before = _descriptors()
    yield
    background.stop()  # the thread of trisock.pluto
    for thread in background_threads():  # a failed thread closes its sockets after its calls ended
        thread.join(DEADLINE)
    gc.collect()
    gc.freeze()  # test reports accumulate, and would make each collection slower
    left = _descriptors() - before
    assert not left, f"descriptors left open: {left}"


def _descriptors() -> set[str]:
    found: set[str] = set()
    try:
        numbers = os.listdir("/proc/self/fd")
    except OSError:  # only Linux has this directory
        return found
    for number in numbers:
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
    return authority.server_tls("localhost", "example.org", "127.0.0.1", "::1")


@pytest.fixture(scope="session")
def client_tls(authority: Authority) -> ClientTLS:
    return authority.client_tls("example.org")


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    """The factor for the rounds of randomized tests (``--times``)."""
    number: int = request.config.getoption("--times")
    return number


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on.

    It is below the ports that the kernel chooses, so no other test gets it by listening on port 0.
    """
    while True:
        port = secrets.randbelow(15_000) + 15_000
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


@pytest.fixture
def pem(authority: Authority, tmp_path: Path) -> Path:
    """A directory with ca.pem, and a server's chain.pem and key.pem (mode 0600)."""
    good = authority.certificate()
    (tmp_path / "ca.pem").write_bytes(authority.ca)
    (tmp_path / "chain.pem").write_bytes(good._chain)
    (tmp_path / "key.pem").touch(mode=0o600)
    (tmp_path / "key.pem").write_bytes(good._private_key)
    return tmp_path


@pytest.fixture
def trusted(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the tests' authority to the system's trust store, for this process only."""
    path = tmp_path / "trusted.pem"
    path.write_bytes(authority.ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


@pytest.fixture
def a(ends: tuple[Socket, Socket]) -> Socket:
    """The client's socket. The fixture ``ends`` is defined in the test's folder or file."""
    return ends[0]


@pytest.fixture
def b(ends: tuple[Socket, Socket]) -> Socket:
    """The server's socket, which is connected to ``a``."""
    return ends[1]
