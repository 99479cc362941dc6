"""Cancel connection attempts at every cancel point (see helpers/cancellation.py)."""

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
from helpers.cancellation import (
    PLAIN,
    Attempt,
    Connections,
    advancing,
    at_every_cancel_point,
    core_of,
    covers,
    during,
)
from helpers.pairs import closing
from helpers.peers import Peer, Script
from helpers.resolver import Resolver
from trisock import Socket, pluto


class Acceptor:
    """A listening socket that does not use Trio, and the peers that it has accepted."""

    def __init__(self, listening: socket.socket, secure: Callable[[Peer], None]) -> None:
        listening.setblocking(False)
        self.listening = listening
        self.peers: list[Peer] = []
        self._secure = secure

    def act(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                peer = Peer(self.listening.accept()[0])
                self.peers.append(peer)
                self._secure(peer)
        for peer in self.peers:
            peer.act()

    def acting(self) -> Script:
        while True:
            self.act()
            yield


@contextlib.contextmanager
def accepting(
    address: str | tuple[str, int], secure: Callable[[Peer], None] = lambda peer: None
) -> Iterator[Acceptor]:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind(address)
        listening.listen()
        acceptor = Acceptor(listening, secure)
        yield acceptor
        for peer in acceptor.peers:
            peer.raw.close()


async def assert_connected_or_nothing_left(
    attempt: Attempt, sock: Socket | None, acceptor: Acceptor
) -> None:
    """Check that connect leaves a working connection, or no connection if it was cancelled."""
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


def resolve_example_org_to(*addresses: str) -> None:
    resolver = Resolver(**{"example.org": [*addresses]})
    trio.socket.set_custom_hostname_resolver(resolver)


@covers("connect", "connect_unix", "pluto.socket.connect")
@pytest.mark.parametrize(
    ("how", "layer"),
    [
        ("pluto", PLAIN),
        *itertools.product(
            ["connect", "connect_unix"], [PLAIN, "TLSv1_2 client", "TLSv1_3 client"]
        ),
    ],
)
@at_every_cancel_point
async def test_a_cancelled_connect_leaves_nothing_open(
    attempt: Attempt, how: str, layer: str, connections: Connections, tmp_path: Path
) -> None:
    tls = connections.role_of(layer)

    async def connect(acceptor: Acceptor) -> Any:
        address = acceptor.listening.getsockname()
        if how == "connect_unix":
            return await trisock.connect_unix(address, tls=tls)
        if how == "connect":
            return await trisock.connect(*address, tls=tls)
        return await pluto.socket.connect(*address)

    path = tmp_path / "socket"
    path.unlink(missing_ok=True)
    with accepting(
        str(path) if how == "connect_unix" else ("127.0.0.1", 0),
        lambda peer: connections.start_tls(peer, layer),
    ) as acceptor:
        await attempt(lambda: connect(acceptor), during(acceptor.acting()))
        connected = core_of(attempt.value)
        await assert_connected_or_nothing_left(attempt, connected, acceptor)


@at_every_cancel_point
async def test_a_cancelled_connect_sends_a_whole_proxy_header_or_nothing(attempt: Attempt) -> None:
    header = trisock.ProxyHeader()
    with accepting(("127.0.0.1", 0)) as acceptor:
        address = acceptor.listening.getsockname()
        await attempt(
            lambda: trisock.connect(*address, proxy_header=header), during(acceptor.acting())
        )
        assert attempt.error is None
        if attempt.cancelled:
            acceptor.act()
            assert all(peer.gone for peer in acceptor.peers)
            assert {bytes(peer.heard) for peer in acceptor.peers} <= {b"", header.to_bytes()}
            return
        async with closing(attempt.value):
            acceptor.act()
            assert [bytes(peer.heard) for peer in acceptor.peers] == [header.to_bytes()]


@pytest.mark.parametrize("layer", [PLAIN, "TLSv1_3 client"])
@at_every_cancel_point
async def test_a_cancelled_connect_to_several_addresses_leaves_nothing_open(
    attempt: Attempt, layer: str, connections: Connections, mock_clock: trio.testing.MockClock
) -> None:
    """One address refuses, one does not answer, and the last one accepts."""
    resolve_example_org_to("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with (
        accepting(("127.0.0.3", 0), lambda peer: connections.start_tls(peer, layer)) as acceptor,
        contextlib.ExitStack() as stack,
    ):
        port = acceptor.listening.getsockname()[1]
        full = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
        for _ in range(2):  # fill the backlog of 127.0.0.2: its next client gets no answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        await attempt(
            lambda: trisock.connect("example.org", port, tls=connections.role_of(layer)),
            advancing(mock_clock, during(acceptor.acting())),
        )
        await assert_connected_or_nothing_left(attempt, attempt.value, acceptor)


@at_every_cancel_point
async def test_a_cancelled_connect_to_refusing_addresses_leaves_nothing_open(
    attempt: Attempt,
) -> None:
    resolve_example_org_to("127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.3", 0)) as elsewhere:
        port = elsewhere.getsockname()[1]
        await attempt(lambda: trisock.connect("example.org", port))
        assert attempt.cancelled or isinstance(attempt.error, ConnectionRefusedError)


@at_every_cancel_point
async def test_cancelling_connect_unix_on_a_full_backlog_leaks_nothing(
    attempt: Attempt, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "socket"
    path.unlink(missing_ok=True)
    with accepting(str(path)) as acceptor, socket.socket(socket.AF_UNIX) as first:
        acceptor.listening.listen(0)
        first.connect(str(path))
        await attempt(
            lambda: trisock.connect_unix(path),
            advancing(mock_clock, during(during(acceptor.acting()))),
        )
        first.close()
        acceptor.act()
        acceptor.peers.pop(0).raw.close()
        await assert_connected_or_nothing_left(attempt, attempt.value, acceptor)
