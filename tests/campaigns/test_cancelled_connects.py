"""Connecting, cancelled at every moment (helpers/cancellation.py tells how)."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import CLEAR, Attempt, Kit, at_every_moment, covers, jumping
from helpers.pairs import closing
from helpers.peers import Peer, Script
from trisock import Socket, pluto


class Acceptor:
    """A listening socket without Trio, and the peers that it has accepted."""

    def __init__(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        self.listening = listening
        self.peers: list[Peer] = []
        self.secure: Callable[[Peer], None] = lambda peer: None

    def act(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                peer = Peer(self.listening.accept()[0])
                self.peers.append(peer)
                self.secure(peer)
        for peer in self.peers:
            peer.act()

    def acting(self) -> Script:
        while True:
            yield
            self.act()

    def close(self) -> None:
        for peer in self.peers:
            peer.raw.close()
        self.listening.close()


@contextlib.contextmanager
def accepting(address: str | tuple[str, int], secure: Callable[[Peer], None]) -> Iterator[Acceptor]:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind(address)
        listening.listen()
        acceptor = Acceptor(listening)
        acceptor.secure = secure
        yield acceptor
        acceptor.close()


async def assert_connected_or_nothing_left(
    attempt: Attempt, sock: Socket | None, acceptor: Acceptor
) -> None:
    """Check what connect has left, or not: a connection that works, or none."""
    assert attempt.error is None
    acceptor.act()
    if attempt.cancelled:
        assert all(peer.gone and not peer.heard for peer in acceptor.peers)
        return
    assert sock is not None
    async with closing(sock):
        await sock.send(b"hello")
        acceptor.act()
        assert [bytes(peer.heard) for peer in acceptor.peers] == [b"hello"]


@covers("connect", "connect_unix", "pluto.socket.connect")
@pytest.mark.parametrize(
    ("how", "layer"),
    [
        ("pluto", CLEAR),
        *itertools.product(
            ["connect", "connect_unix"], [CLEAR, "TLSv1_2 client", "TLSv1_3 client"]
        ),
    ],
)
async def test_a_cancelled_connect_leaves_nothing(
    how: str, layer: str, kit: Kit, tmp_path: Path
) -> None:
    tls = None if layer == CLEAR else kit.client_tls

    def secure(peer: Peer) -> None:
        if tls is not None:
            kit.turn_to_tls(peer, layer)

    async def connect(acceptor: Acceptor) -> Any:
        address = acceptor.listening.getsockname()
        if how == "connect_unix":
            return await trisock.connect_unix(address, tls=tls)
        if how == "connect":
            return await trisock.connect(*address, tls=tls)
        return await pluto.socket.connect(*address)

    async def scenario(attempt: Attempt) -> None:
        path = tmp_path / "socket"
        path.unlink(missing_ok=True)
        with accepting(
            str(path) if how == "connect_unix" else ("127.0.0.1", 0), secure
        ) as acceptor:
            await attempt(lambda: connect(acceptor), acceptor.acting())
            connected = getattr(attempt.value, "_sock", attempt.value)
            await assert_connected_or_nothing_left(attempt, connected, acceptor)

    await at_every_moment(scenario)


class Resolver(trio.abc.HostnameResolver):
    """Gives a name several addresses."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    async def getaddrinfo(self, host: object, port: object, *_: object) -> Any:
        await trio.lowlevel.checkpoint()
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (each, port)) for each in self.hosts]

    async def getnameinfo(self, *_: object) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("tls", [False, True])
async def test_a_cancelled_connect_to_several_addresses_leaves_nothing(
    tls: bool, kit: Kit, mock_clock: trio.testing.MockClock
) -> None:
    """One refuses, one does not answer, and one does when the others have had their time."""

    def secure(peer: Peer) -> None:
        if tls:
            kit.turn_to_tls(peer, "TLSv1_3 client")

    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2", "127.0.0.3"))

    async def scenario(attempt: Attempt) -> None:
        with accepting(("127.0.0.3", 0), secure) as acceptor, contextlib.ExitStack() as stack:
            port = acceptor.listening.getsockname()[1]
            full = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
            for _ in range(2):  # as many as its backlog holds: the next gets no answer
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            await attempt(
                lambda: trisock.connect("example.org", port, tls=kit.client_tls if tls else None),
                jumping(mock_clock, acceptor.acting()),
            )
            await assert_connected_or_nothing_left(attempt, attempt.value, acceptor)

    await at_every_moment(scenario)


async def test_a_cancelled_connect_that_nobody_accepts_leaves_nothing() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2"))
    with socket.create_server(("127.0.0.3", 0)) as elsewhere:
        port = elsewhere.getsockname()[1]

        async def scenario(attempt: Attempt) -> None:
            await attempt(lambda: trisock.connect("example.org", port))
            assert attempt.cancelled or isinstance(attempt.error, ConnectionRefusedError)

        await at_every_moment(scenario)


async def test_a_cancelled_connect_unix_behind_a_full_backlog_leaves_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async def scenario(attempt: Attempt) -> None:
        path = tmp_path / "socket"
        path.unlink(missing_ok=True)
        with (
            accepting(str(path), lambda peer: None) as acceptor,
            socket.socket(socket.AF_UNIX) as first,
        ):
            acceptor.listening.listen(0)
            first.connect(str(path))

            def script() -> Script:
                yield
                yield
                yield from acceptor.acting()

            await attempt(lambda: trisock.connect_unix(path), jumping(mock_clock, script()))
            first.close()
            acceptor.act()
            acceptor.peers.pop(0).raw.close()
            await assert_connected_or_nothing_left(attempt, attempt.value, acceptor)

    await at_every_moment(scenario)
