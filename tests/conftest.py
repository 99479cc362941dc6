"""What the tests share: connected pairs, certificates, a deadline."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import trisock
from trisock import Certificate, ClientTLS, ServerTLS, Socket
from trisock._sides import background

# Every test is bounded: a hang is a failure and not a stuck run. No test waits so long when it
# passes.
DEADLINE = 60

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


class Authority:
    """A certificate authority and what it has issued, made once per run: keys are slow."""

    def __init__(self) -> None:
        self.ca = trustme.CA()
        self.pem = self.ca.cert_pem.bytes()
        self._issued: dict[object, Certificate] = {}

    def issue(self, *names: str, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> Certificate:
        key = (names, key_type)
        if key not in self._issued:
            self._issued[key] = certificate(self.ca.issue_cert(*names, key_type=key_type))
        return self._issued[key]


def certificate(leaf: trustme.LeafCert) -> Certificate:
    return Certificate(
        b"".join(blob.bytes() for blob in leaf.cert_chain_pems), leaf.private_key_pem.bytes()
    )


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


async def tcp_pair() -> tuple[Socket, Socket]:
    """Return the two ends (client, server) of a TCP connection."""
    async with await trisock.listen(0, "127.0.0.1") as listener:
        client = await trisock.connect("127.0.0.1", listener.port)
        return client, await listener.accept()


async def tls_pair(client_tls: Any, server_tls: Any) -> tuple[Socket, Socket]:
    """Return the two ends (client, server) of a connection after starttls."""
    client, server = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.starttls, server_tls)
        await client.starttls(client_tls)
    return client, server


@contextlib.asynccontextmanager
async def closing(*socks: Socket) -> AsyncIterator[None]:
    """Abort sockets at the end, whatever became of them."""
    try:
        yield
    finally:
        for sock in socks:
            sock.abort()


async def all_served(server: trisock.Server, accepted: int) -> None:
    """Wait until a server has accepted so many connections and has no more to do with any."""
    while server.stats().accepted < accepted or server.stats().active:
        await trio.lowlevel.checkpoint()


def raw_pair() -> tuple[Socket, socket.socket]:
    """Return a Socket and the plain, blocking socket at its other end, over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        raw = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent is on its way
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
    return Socket(stream, side="server"), raw


def unix_pair() -> tuple[Socket, Socket]:
    """Return the two ends of a Unix connection: what fills it is known exactly, unlike over TCP."""
    a, b = (trio.socket.from_stdlib_socket(each) for each in socket.socketpair())
    return Socket(trio.SocketStream(a)), Socket(trio.SocketStream(b), side="server")


async def pair(layer: str, client_tls: Any, server_tls: Any) -> tuple[Socket, Socket]:
    """Return the two ends of a TCP connection, after starttls if the layer is ``"tls"``."""
    return await (tls_pair(client_tls, server_tls) if layer == "tls" else tcp_pair())


async def small_pair(layer: str, client_tls: Any, server_tls: Any) -> tuple[Socket, Socket]:
    """Return a connected pair that holds little: what it takes before it is full is bounded."""
    a, b = unix_pair()
    if layer == "tls":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(client_tls)
    return a, b


async def clog(sock: Socket) -> None:
    """Fill a Unix connection until a send would have to wait (the peer must not be reading)."""
    while sock._transport.writable_now():
        await sock.send(b"x" * 100)
    if not sock.istls():  # a plain send tries before it waits: leave it no room at all
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(sock.fileno(), b"x")
